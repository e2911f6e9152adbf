"""Beam search: the published tokens, the best text by its score, and the same whatever stands beside a prompt."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from adakron.config import AdapterConfig, GenerationConfig
from adakron.decoding import BeamDecoder, decode_prompts
from adakron.errors import ConfigError, NumericalError
from adakron.launcher import World
from adakron.models import adapt, route_experts
from adakron.nn import Projection
from adakron.reference import import_checkpoint
from adakron.tasks.causal import Prompts
from tests.helpers.architectures import DECODERS, tiny_model
from tests.helpers.published import golden

CPU = torch.device("cpu")
END = 0
ENDS = {END, 7, 19}


def numbers(count: int, positions: int, *, end: int = END, pad: int = END) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the numbers of its tokens."""
    words = [str(number) for number in range(count)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[-1]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=words[end], pad_token=words[pad], model_max_length=positions)


def random_model(vocabulary: int = 40, *, seed: int = 0, **settings: Any) -> GPT2LMHeadModel:
    """An adapted GPT-2 with distributions that are far from flat."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    model = GPT2LMHeadModel(config).eval()
    adapt(model, AdapterConfig(**{"bottleneck_dim": 8, "init_std": 0.5, **settings}), seed=seed)
    route_experts(model, seed)
    return model.eval()


def some_prompts(count: int, vocabulary: int = 40, longest: int = 12) -> list[np.ndarray]:
    """Of very different lengths, with the end behind each."""
    generator = np.random.default_rng(5)
    lengths = generator.integers(1, longest, count)
    return [np.append(generator.integers(1, vocabulary, length), END).astype(np.int32) for length in lengths]


def flat(prompts: Sequence[np.ndarray]) -> Prompts:
    offsets = np.cumsum([0, *map(len, prompts)])
    return Prompts(np.concatenate(prompts), offsets, [[] for _ in prompts], [str(prompt) for prompt in prompts])


def decoder(model: Any, vocabulary: int = 40, *, use_cache: bool = True, **settings: Any) -> BeamDecoder:
    options = {"num_beams": 4, "max_new_tokens": 10, "eos_token_id": "7,19", **settings}
    return BeamDecoder(model, numbers(vocabulary, 64), GenerationConfig(**options), device=CPU, use_cache=use_cache)


def test_published_beams() -> None:
    base, file, expected = golden("gpt2_tiny_e4")
    model = import_checkpoint(file, str(base)).model
    model.set_attn_implementation("eager")
    prompts = expected["input_ids"][:, :5].numpy()
    settings = GenerationConfig(num_beams=3, max_new_tokens=8, length_penalty=0.8, no_repeat_ngram_size=4)
    tokenizer = numbers(model.config.vocab_size, model.config.n_positions, end=1, pad=0)
    found = BeamDecoder(model, tokenizer, settings, device=CPU)
    assert found.tokens(list(prompts)) == expected["beam3_output"][:, 5:].tolist()
    assert [found.tokens([prompt])[0] for prompt in prompts] == expected["beam3_output"][:, 5:].tolist()


def log_probability(model: Any, prompt: np.ndarray, text: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt.tolist(), *text]])
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    return float(sum(logs[len(prompt) - 1 + place, token] for place, token in enumerate(text)))


@pytest.mark.parametrize("length_penalty", [0.0, 0.8, 3.0])
def test_the_best_of_all_texts(length_penalty: float) -> None:
    model, vocabulary, longest = random_model(5), 5, 3
    every = [
        text
        for length in range(1, longest + 1)
        for text in itertools.product(range(vocabulary), repeat=length)
        if END not in text[:-1] and (text[-1] == END or length == longest)
    ]
    settings = GenerationConfig(
        num_beams=vocabulary**longest, max_new_tokens=longest, length_penalty=length_penalty, no_repeat_ngram_size=0, early_stopping="never"
    )
    found = BeamDecoder(model, numbers(vocabulary, 64), settings, device=CPU)
    for prompt in some_prompts(4, vocabulary, longest=6):
        # The end counts as a token: that is what the published code divides by, too.
        best = max(every, key=lambda text: log_probability(model, prompt, text) / len(text) ** length_penalty)
        assert found.tokens([prompt])[0] == [token for token in best if token != END]


def published_search(model: Any, prompt: np.ndarray, *, beams: int, longest: int, ngram: int, length_penalty: float) -> list[int]:
    """The rule of docs/decoding.md's column "published", one prompt at a time without a cache: what ended gives up its place."""
    unfinished: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    best: tuple[float, tuple[int, ...]] = (-np.inf, ())
    for length in range(1, longest + 1):
        grown = []
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.tolist(), *text] for _, text in unfinished])).logits[:, -1].double()
        for row, (score, text) in zip(logits, unfinished, strict=True):
            for start in range(len(text) - ngram + 1):
                if text[start : start + ngram - 1] == text[len(text) - ngram + 1 :]:
                    row[text[start + ngram - 1]] = -torch.inf
            grown += [(score + more, (*text, token)) for token, more in enumerate(torch.log_softmax(row, -1).tolist())]
        kept = sorted(grown, reverse=True)[:beams]
        ended = [(score / length**length_penalty, text) for score, text in kept if text[-1] in ENDS or length == longest]
        best = max([best, *ended])
        unfinished = [(score, text) for score, text in kept if text[-1] not in ENDS]
        if not unfinished:
            break
    return [token for token in best[1] if token not in ENDS]


@pytest.mark.parametrize(("beams", "most_differ"), [(2, 0.1), (10, 0.0)])
def test_the_published_search_finds_the_same(beams: int, most_differ: float) -> None:
    differ, lengths = 0, set()
    for seed in range(3):
        model, prompts = random_model(seed=seed), some_prompts(8)
        expected = [published_search(model, prompt, beams=beams, longest=12, ngram=2, length_penalty=0.8) for prompt in prompts]
        lengths |= {*map(len, expected)}
        for early_stopping in ("never", "false"):
            settings = {"no_repeat_ngram_size": 2, "max_new_tokens": 12, "early_stopping": early_stopping}
            found = decoder(model, num_beams=beams, length_penalty=0.8, **settings).tokens(prompts)
            differ += sum(text != other for text, other in zip(found, expected, strict=True))
    assert len(lengths) > 3
    assert differ <= most_differ * 48


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("ngram", [0, 1, 2])
def test_a_text_does_not_depend_on_its_batch(beams: int, ngram: int) -> None:
    model, prompts = random_model(), some_prompts(9)
    settings = {"num_beams": beams, "no_repeat_ngram_size": ngram, "repetition_penalty": 1.3}
    alone = [decoder(model, **settings).tokens([prompt])[0] for prompt in prompts]
    assert len({len(tokens) for tokens in alone}) > 1, "texts of several lengths, or nothing is tested"
    assert decoder(model, **settings).tokens(prompts) == alone
    for world_size, batch_size in itertools.product((1, 2, 4), (1, 2, 5)):
        found = {}
        for rank in range(world_size):
            world = World(rank, world_size)
            for rows in decode_prompts(decoder(model, **settings), flat(prompts), np.arange(9), batch_size=batch_size, world=world):
                assert len(rows) <= batch_size and not {row.index for row in rows} & {*found}
                found |= {row.index: row.tokens for row in rows}
        assert [found[index] for index in range(9)] == alone


def test_only_pending_prompts_are_decoded() -> None:
    pending = np.array([1, 4, 6])
    batches = decode_prompts(decoder(random_model()), flat(some_prompts(9)), pending, batch_size=2)
    assert sorted(row.index for rows in batches for row in rows) == [1, 4, 6]


def test_the_cache_changes_nothing() -> None:
    model, prompts = random_model(), some_prompts(6)
    assert decoder(model, use_cache=False).tokens(prompts) == decoder(model).tokens(prompts)


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_decoder_reads_prompts_once_and_apart(model_type: str) -> None:
    model = tiny_model(model_type, auto_class="AutoModelForCausalLM", vocab_size=40, initializer_range=0.4)
    adapt(model, AdapterConfig(bottleneck_dim=8, init_std=0.3), seed=0)
    model.eval()
    prompts = [*some_prompts(6), np.array([5], dtype=np.int32)]
    alone = [decoder(model).tokens([prompt])[0] for prompt in prompts]
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(lambda _, __, values: shapes.append(tuple(values["input_ids"].shape)), with_kwargs=True)
    assert decoder(model).tokens(prompts) == alone
    assert shapes[0] == (7, max(map(len, prompts)) - 1) and {*shapes[1:]} == {(7 * 4, 1)}
    without = decoder(model)
    without._read_ahead = lambda *_: {}  # type: ignore[method-assign]
    assert without.tokens(prompts) == alone
    shapes.clear()
    decoder(model).tokens(prompts[-1:])
    assert shapes[0] == (1, 1), "as many passes as beside longer prompts"


@pytest.mark.parametrize("beams", [1, 4])
def test_a_model_that_diverged_writes_nothing(beams: int) -> None:
    model = random_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="generating: the model's outputs are not numbers"):
        decoder(model, num_beams=beams).tokens(some_prompts(3))


def test_texts_end_at_every_end_and_not_too_early() -> None:
    model, prompts = random_model(), some_prompts(8)
    found = decoder(model).tokens(prompts)
    assert not any(token in ENDS for tokens in found for token in tokens)
    assert min(map(len, found)) < 6
    late = decoder(model, min_new_tokens=6).tokens(prompts)
    assert all(len(tokens) >= 6 and not {*tokens} & ENDS for tokens in late)


def test_repetitions_count_in_the_text_alone() -> None:
    model = random_model()
    free, once = (decoder(model, num_beams=1, no_repeat_ngram_size=size, max_new_tokens=12) for size in (0, 1))
    prompts = [np.array([token, *prompt], dtype=np.int32) for prompt in some_prompts(3) for token in range(1, 40)]
    first = [tokens[:1] for tokens in free.tokens(prompts)]
    repeating = [place for place, tokens in enumerate(first) if tokens and tokens[0] in prompts[place]]
    assert len(repeating) > 2, "prompts that hold what the model says first, or nothing is tested"
    texts = once.tokens(prompts)
    assert [tokens[:1] for tokens in texts] == first
    assert all(len({*tokens}) == len(tokens) for tokens in texts)


def test_experts_are_averaged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(method="madakron", num_experts=3, expert_scores="random")
    computed: list[Projection] = []
    original = Projection._averaged
    monkeypatch.setattr(Projection, "_averaged", lambda self: computed.append(self) or original(self))  # type: ignore[func-returns-value]
    found = decoder(model)
    texts = found.tokens(some_prompts(6))
    assert len(computed) == len({id(projection) for projection in computed}) == 2 * 2  # layers x down projections
    for module in model.modules():  # the average as it stands in the experts' place
        if isinstance(module, Projection) and module.num_experts > 1:
            weight, bias = original(module)
            with torch.no_grad():
                module.weight.copy_(weight.expand_as(module.weight))
                module.bias.copy_(bias.expand_as(module.bias))
    assert found.tokens(some_prompts(6)) == texts


def test_the_backbones_own_settings_do_not_count() -> None:
    model, prompts = random_model(), some_prompts(5)
    texts = decoder(model).tokens(prompts)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=9.0, min_length=30, bad_words_ids=[[5]])
    assert decoder(model).tokens(prompts) == texts


def test_a_prompt_that_is_too_long_loses_its_beginning() -> None:
    model = random_model()
    long = np.arange(60, dtype=np.int32) % 30 + 1
    found = decoder(model, max_new_tokens=12)
    assert found.longest_prompt == 52
    assert found.tokens([long]) == found.tokens([long[8:]]) != found.tokens([long[9:]])


def test_what_is_refused() -> None:
    mixture = random_model(method="madakron", num_experts=2, inference_level=0)
    with pytest.raises(ConfigError, match="inference_level is 0, which draws experts at random"):
        decoder(mixture)
    with pytest.raises(ConfigError, match="eos_token_id names 40, but the tokenizer has the tokens 0 to 39"):
        decoder(random_model(), eos_token_id="40")
    with pytest.raises(ConfigError, match="max_new_tokens is 64, but the model has 64 positions"):
        decoder(random_model(), max_new_tokens=64)
    with pytest.raises(ConfigError) as caught:
        GenerationConfig(num_beams=0, min_new_tokens=9, max_new_tokens=8, repetition_penalty=0.0, eos_token_id="a,b")
    assert len(caught.value.problems) == 4


def test_ranks_in_step_without_prompts_still_compute(tmp_path: Path) -> None:
    found = decoder(random_model())
    found.in_step = True
    calls: list[int] = []
    found.tokens = lambda prompts: calls.append(len(prompts)) or [[] for _ in prompts]  # type: ignore[func-returns-value, method-assign]
    boundaries: list[int] = []
    for rank in range(2):
        world = World(rank, 2)
        rows = list(
            decode_prompts(found, flat(some_prompts(5)), np.arange(5), batch_size=2, world=world, boundary=lambda: boundaries.append(1))
        )
        assert len(rows) == (2, 1)[rank]
    assert calls == [2, 1, 2, 1]
    assert len(boundaries) == 4

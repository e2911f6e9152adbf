import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adakron import causal
from adakron.config import AdapterConfig, DataConfig, ModelConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.models import adapt, route_experts
from adakron.objectives import consistency_sum
from adakron.tasks import create_task
from adakron.tasks.base import EncodedSplit
from adakron.tasks.causal import CausalTask, PairTask
from launch.new_decoder import new_gpt2
from tests.helpers.shared import shared_data
from tests.helpers.tiny import byte_tokenizer, save_tiny_bert, write_jsonl

END = 256  # of byte_tokenizer
TOKENIZER = byte_tokenizer()
MADAKRON = AdapterConfig(method="madakron", bottleneck_dim=8, num_experts=3, init_std=0.8)


def pairs(folder: Path, rows: list[dict[str, Any]], *, smoothing: float = 0.0, **settings: Any) -> PairTask:
    file = write_jsonl(folder / "train.jsonl", rows)
    task = create_task(DataConfig(task_name="pairs", train_file=str(file), **settings), TrainingConfig(label_smoothing=smoothing))
    assert isinstance(task, PairTask)
    return task


ROWS = [
    {"source": "name : A", "target": "A is here."},
    {"source": "name : Bb | area : C", "target": ["Bb in C.", "In C there is Bb, it seems."]},
    {"source": "x", "target": "Y"},
]


def decoder(adapter: AdapterConfig | None = AdapterConfig(bottleneck_dim=8), positions: int = 128) -> nn.Module:  # noqa: B008
    model = new_gpt2(TOKENIZER, n_layer=2, n_embd=32, n_head=4, n_positions=positions, seed=5)
    if adapter is not None:
        adapt(model, adapter, seed=3)
    causal.accept_targets(model)
    return model


def texts(task: CausalTask, split: str, encoded: EncodedSplit) -> list[tuple[str, str]]:
    assert encoded.labels is not None
    ids, offsets = encoded.features["input_ids"], encoded.offsets
    return [
        (TOKENIZER.decode(ids[start : start + first]), TOKENIZER.decode(ids[start + first : end]))
        for start, first, end in zip(offsets[:-1], encoded.labels, offsets[1:], strict=True)
    ]


def test_a_pair_is_source_end_space_target_end(tmp_path: Path) -> None:
    task = pairs(tmp_path, ROWS)
    encoded = task.encode("train", TOKENIZER)
    assert texts(task, "train", encoded) == [
        ("name : A<|end|>", " A is here.<|end|>"),
        ("name : Bb | area : C<|end|>", " Bb in C.<|end|>"),
        ("name : Bb | area : C<|end|>", " In C there is Bb, it seems.<|end|>"),
        ("x<|end|>", " Y<|end|>"),
    ]
    assert encoded.target_counts.tolist() == [12, 10, 29, 3]
    assert encoded.truncated == 0


def test_a_tokenizer_that_begins_texts_begins_sources_only(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    encoded = pairs(tmp_path, ROWS[2:]).encode("train", tokenizer)
    assert tokenizer.decode(encoded.features["input_ids"]) == "<s>x<|end|> Y<|end|>"
    assert pairs(tmp_path, ROWS[2:]).prompts("train", tokenizer).input_ids.tolist() == [257, *tokenizer("x")["input_ids"][1:], 256]


def test_long_pairs_lose_the_end_of_the_target_then_the_beginning_of_the_source(tmp_path: Path) -> None:
    rows = [{"source": "abc", "target": "defghijk"}, {"source": "abcdefghijkl", "target": "mnopqr"}, {"source": "a", "target": "b"}]
    task = pairs(tmp_path, rows, max_seq_length=10)
    encoded = task.encode("train", TOKENIZER)
    assert texts(task, "train", encoded) == [("abc<|end|>", " defgh"), ("ijkl<|end|>", " mnop"), ("a<|end|>", " b<|end|>")]
    assert encoded.lengths.max() == 10
    assert encoded.truncated == 2
    with pytest.raises(ConfigError, match="max_seq_length leaves 3 tokens"):
        pairs(tmp_path, rows, max_seq_length=3).encode("train", TOKENIZER)


def test_prompts_are_the_distinct_sources_with_all_their_references(tmp_path: Path) -> None:
    rows = [*ROWS, {"source": "name : A", "target": "Here A is."}]
    prompts = pairs(tmp_path, rows).prompts("train", TOKENIZER)
    assert prompts.sources == ["name : A", "name : Bb | area : C", "x"]
    assert prompts.references == [["A is here.", "Here A is."], ["Bb in C.", "In C there is Bb, it seems."], ["Y"]]
    assert [TOKENIZER.decode(prompts.prompt(i)) for i in range(len(prompts))] == [f"{source}<|end|>" for source in prompts.sources]
    assert prompts.categories is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_labels_ignored_outside_the_target(tmp_path: Path, smoothing: float) -> None:
    task, model = pairs(tmp_path, ROWS, smoothing=smoothing), decoder()
    encoded = task.encode("train", TOKENIZER)
    batch = task.collate(encoded, [2, 0, 3], END)
    loss, logits = task.loss(model, batch)
    assert logits.shape == (29 + 12 + 3, 257)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # By hand: whole strings, labels of -100 on the source and on padding, transformers' own loss.
    lines = [(f"{source}<|end|>", f" {target}<|end|>") for source, target in (
        ("name : Bb | area : C", "In C there is Bb, it seems."), ("name : A", "A is here."), ("x", "Y"),
    )]  # fmt: skip
    ids = torch.full((3, 64), 7)
    labels, mask = torch.full((3, 64), -100), torch.zeros(3, 64, dtype=torch.int64)
    for row, (source, target) in enumerate(lines):
        tokens, before = TOKENIZER(source + target)["input_ids"], len(TOKENIZER(source)["input_ids"])
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        labels[row, before : len(tokens)] = torch.tensor(tokens[before:])
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    expected = F.cross_entropy(*shifted, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    if not smoothing:
        torch.testing.assert_close(output.loss * 44, expected)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    expected.backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-5, msg=name)


def test_packed_batches_have_the_loss_and_gradient_of_padded_ones(tmp_path: Path) -> None:
    rows = [{"source": "s" * (1 + i % 7), "target": "t u v w "[: 2 + i % 5] + str(i)} for i in range(13)]
    results = []
    for pack in (False, True):
        task, model = pairs(tmp_path, rows, pack=pack, max_seq_length=40, smoothing=0.1), decoder()
        encoded = task.encode("train", TOKENIZER)
        batch = task.collate(encoded, np.arange(13)[::-1], END)
        loss, _ = task.loss(model, batch)
        loss.backward()
        results.append(
            (batch, loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, task.predict(model, batch))
        )
    (padded, *one), (rows_, *other) = results
    assert rows_["input_ids"].numel() < padded["input_ids"].numel()
    assert rows_["input_ids"].shape[1] <= 40
    assert torch.equal(rows_["targets"], padded["targets"])
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_consistency_is_taken_at_the_targets_alone(tmp_path: Path) -> None:
    task, model = pairs(tmp_path, ROWS), decoder(MADAKRON)
    router = route_experts(model, 3)
    assert router is not None
    model.train()
    encoded = task.encode("train", TOKENIZER)
    batch = task.collate(encoded, [0, 2], END)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    narrow, whole = [], []
    for index in (0, 1):
        router.training_pass(0, 0, index)
        narrow.append(task.loss(model, batch)[1])
        router.training_pass(0, 0, index)
        whole.append(model(**inputs).logits.detach())
    expected = 0.0
    first, second = (logits.double().log_softmax(-1) for logits in whole)
    for row, example in enumerate((0, 2)):
        length, start = int(encoded.lengths[example]), int(encoded.labels[example])  # type: ignore[index]
        for place in range(start - 1, length - 1):
            p, q = first[row, place], second[row, place]
            expected += 0.5 * float((q.exp() * (q - p)).sum() + (p.exp() * (p - q)).sum())
    assert expected > 1e-6
    assert float(consistency_sum(narrow[0], narrow[1], task.output_kind).detach()) == pytest.approx(expected, rel=1e-3)


def lm(folder: Path, text: str, **settings: Any) -> CausalTask:
    file = folder / "validation.txt"
    file.write_text(text, encoding="utf-8")
    task = create_task(DataConfig(task_name="lm", train_file=str(file), validation_file=str(file), **settings), TrainingConfig())
    assert isinstance(task, CausalTask)
    return task


@pytest.mark.parametrize("stride", [1, 5, 8, 15])
def test_perplexity_is_that_of_every_token_in_its_window(tmp_path: Path, stride: int) -> None:
    text = "It was näive, the  best of times;\nit was the worst of tîmes.\n"
    task, model = lm(tmp_path, text, max_seq_length=16, stride=stride), decoder()
    encoded = task.encode("validation", TOKENIZER)
    outputs = [task.predict(model, task.collate(encoded, [i], END)).detach().numpy() for i in range(len(encoded))]
    scores = task.score("validation", np.concatenate(outputs))

    tokens = [END, *TOKENIZER(text)["input_ids"]]
    total = 0.0
    for place in range(1, len(tokens)):
        # The window that reaches this token first: those after the first end at 16 + k stride.
        window = max(0, math.ceil((place + 1 - 16) / stride))
        context = torch.tensor(tokens[window * stride : place])
        with torch.no_grad():
            logits = model(input_ids=context[None]).logits[0, -1].double()
        total -= float(logits.log_softmax(-1)[tokens[place]])
    assert scores["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / (len(tokens) - 1)), rel=1e-4)
    assert scores["word_perplexity"] == pytest.approx(math.exp(total / 13), rel=1e-3)
    assert scores["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_training_windows_make_every_token_a_target_once_and_keep_documents_apart(tmp_path: Path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    for name, size in (("b.txt", 1), ("a.txt", 23), ("c.txt", 9)):
        (folder / name).write_text(name[0] * size)
    task = create_task(DataConfig(task_name="lm", train_file=str(folder), max_seq_length=10), TrainingConfig())
    encoded = task.encode("train", TOKENIZER)
    assert encoded.lengths.tolist() == [10, 10, 6, 2, 10]
    assert encoded.labels is not None and encoded.labels.tolist() == [1] * 5
    assert encoded.target_counts.sum() == 23 + 1 + 9
    shown = [TOKENIZER.decode(encoded.features["input_ids"][a:b]) for a, b in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)]
    assert shown == ["<|end|>" + "a" * 9, "a" * 10, "a" * 6, "<|end|>b", "<|end|>" + "c" * 9]


def test_a_limit_keeps_the_first_windows(tmp_path: Path) -> None:
    task = lm(tmp_path, "abcdefghijklmnop", max_seq_length=4, max_train_samples=2)
    encoded = task.encode("train", TOKENIZER)
    assert len(encoded) == 2
    assert TOKENIZER.decode(encoded.features["input_ids"]) == "<|end|>abccdef"


def test_tokens_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pairs(tmp_path, ROWS).encode("train", TOKENIZER)

    def no_more(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr("adakron.data.encoding._tokenise_pieces", no_more)
    assert pairs(tmp_path, ROWS).encode("train", TOKENIZER).digest() == first.digest()
    with pytest.raises(AssertionError, match="tokenised again"):
        pairs(tmp_path, ROWS[1:]).encode("train", TOKENIZER)


def one(task_name: str, folder: Path, row: dict[str, Any], split: str = "train") -> PairTask:
    write_jsonl(folder / f"{split}.jsonl", [row])
    task = create_task(DataConfig(task_name=task_name, data_dir=str(folder)), TrainingConfig())
    assert isinstance(task, PairTask)
    return task


def test_the_forms_of_the_published_runs(tmp_path: Path) -> None:
    e2e = {"meaning_representation": "name[The Eagle, inn], eatType[pub]", "human_reference": " A pub,\nthe Eagle. "}
    assert one("e2e_nlg", tmp_path, e2e).splits()["train"][0] == {
        "source": "name : The Eagle, inn | eatType : pub", "target": "A pub,\nthe Eagle.",
    }  # fmt: skip
    triples = [["A_B", "cityServed", '"X, Y"'], ["A_B", "Runs", "2"]]
    web = {"triples": triples, "texts": ["bad", "Good.", "Fine."], "comments": ["toFix", "good", "good"], "seen_category": False}
    rows = one("webnlg_2017", tmp_path, web).splits()["train"]
    assert rows["target"][:] == ["Good.", "Fine."]
    assert rows[0]["source"] == 'A_B : cityServed : "X, Y" | A_B : Runs : 2'
    assert rows[0]["category"] == "unseen"
    dart = {"tripleset": triples, "annotations": [{"source": "s", "text": "One."}, {"source": "s", "text": ""}]}
    rows = one("dart", tmp_path, dart).splits()["train"]
    assert rows[:] == {"source": ['A_B : cityserved : "X, Y" | A_B : runs : 2'], "target": ["One."]}


@pytest.mark.parametrize(
    ("task_name", "row", "message"),
    [
        ("e2e_nlg", {"meaning_representation": "a pub", "human_reference": "x"}, r"row 0: meaning_representation is .*like name\[X\]"),
        ("e2e_nlg", {"meaning_representation": "name[A] or", "human_reference": "x"}, r"must read like name\[X\]"),
        ("e2e_nlg", {"meaning_representation": "name[A]", "human_reference": " "}, "row 0: human_reference .* not empty"),
        ("e2e_nlg", {"mr": "name[A]"}, "no column 'meaning_representation'"),
        ("pairs", {"source": "a", "target": 3}, "row 0: target is 3"),
        ("dart", {"tripleset": [["a", "b"]], "annotations": [{"text": "x"}]}, "list of .subject, relation, object"),
        ("dart", {"tripleset": [["a", "b", "c"]], "annotations": [{"text": ""}]}, "has no texts to learn"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, task_name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        one(task_name, tmp_path, row).splits()


def test_a_test_file_needs_no_targets(tmp_path: Path) -> None:
    task = one("pairs", tmp_path, {"source": "a b"}, "test")
    assert task.prompts("test", TOKENIZER).references == [[]]
    with pytest.raises(DataError, match=r"test split of pairs has no targets.*generate\.py"):
        task.encode("test", TOKENIZER)


def test_settings_that_do_nothing_are_refused() -> None:
    for settings, message in (
        ({"task_name": "e2e_nlg", "stride": 4}, "stride is 4, but task e2e_nlg cuts no text .* or set --task_name lm"),
        ({"task_name": "sst2", "pack": True}, "pack is True, but task sst2 keeps every example in a row of its own"),
        ({"task_name": "dart", "source_column": "x"}, "source_column is x, but task dart has its own columns"),
        ({"task_name": "lm", "max_eval_samples": 3}, "max_eval_samples is 3, but task lm scores whole texts"),
        ({"task_name": "pairs", "source_column": "a", "target_column": "a"}, "name the same column 'a'"),
    ):
        with pytest.raises(ConfigError, match=message):
            create_task(DataConfig(**settings), TrainingConfig())
    with pytest.raises(ConfigError, match=r"do_predict: task e2e_nlg predicts by generating, .*launch/generate\.py"):
        create_task(DataConfig(task_name="e2e_nlg"), TrainingConfig(do_predict=True))


def test_windows_without_context_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stride is 8 and windows have 8 tokens"):
        lm(tmp_path, "some text", max_seq_length=8, stride=8).encode("validation", TOKENIZER)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    from adakron.models import check_architecture

    folder = save_tiny_bert(tmp_path / "bert")
    with pytest.raises(ConfigError, match=r"is an encoder, whose tokens see those behind them.*--model_name_or_path"):
        check_architecture(ModelConfig(model_name_or_path=str(folder)), AdapterConfig(), auto_class="AutoModelForCausalLM", options={})


def test_the_published_data_sets(tmp_path: Path) -> None:
    """Counts of shared/data/README.md."""
    counts = {"e2e_nlg": (42061, 4672, 4693, 630), "webnlg_2017": (18025, 2258, 4928, 1862)}
    for name, (*rows, prompts) in counts.items():
        task = create_task(DataConfig(task_name=name, data_dir=str(shared_data(name))), TrainingConfig())
        assert isinstance(task, PairTask)
        assert [len(dataset) for dataset in task.splits().values()] == rows
        found = task.prompts("test", TOKENIZER)
        assert len(found) == prompts
        if found.categories is not None:
            assert [found.categories.count(part) for part in ("seen", "unseen")] == [971, 891]
    first = json.loads((shared_data("e2e_nlg") / "train.jsonl").read_text().splitlines()[0])
    assert first["meaning_representation"].startswith("name[The Vaults]")

"""Texts generated from prompts: batched beam search by transformers' `generate`, on one rank or several.

What a prompt becomes does not depend on the prompts beside it, on the batch size or on the number of ranks, up to the rounding of the
model's own arithmetic.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adakron.config import GenerationConfig
from adakron.data.sampler import evaluation_batches
from adakron.errors import ConfigError, NumericalError
from adakron.launcher import World
from adakron.nn import BottleneckAdapter
from adakron.pretrained import quiet_transformers
from adakron.progress import GenerationProgress
from adakron.tasks.causal.prompts import Prompts


@dataclass(frozen=True)
class Row:
    """What was generated from a prompt. index: of the prompt. tokens: without the one that ended it. text: without special tokens."""

    index: int
    tokens: list[int]
    text: str


class _OfGenerated:
    """A processor that sees what was generated and not the prompt, as in the published code; so it sees no padding either."""

    def __init__(self, inner: Any, prompt_width: int):
        self._inner = inner
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores_BV: Tensor = self._inner(input_ids[:, self._prompt_width :], scores)
        return scores_BV


class _NanWatch:
    """A processor that only notes whether a score was not a number. It is asked once per batch: no step waits for the device."""

    def __init__(self, device: torch.device):
        self.seen = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen |= scores.isnan().any()
        return scores


class BeamDecoder:
    """Decodes batches of prompts with a causal language model in evaluation mode.

    tokenizer: its end-of-sequence token ends a text, as further ones of the settings do; its padding token fills batches up.
    device: where the model runs. in_step: every rank calls the decoder equally often, and each call must make as many forward passes
    as the others' (ZeRO stage 3 on several ranks). use_cache: keep keys and values of earlier tokens; without, for comparison.

    A mixture uses the average of its experts, computed once per model (`nn.Projection.average`). Raises ConfigError where the settings
    do not fit the model or the tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationConfig,
        *,
        device: torch.device,
        in_step: bool = False,
        use_cache: bool = True,
    ):
        self._model = cast(Any, model)
        self._tokenizer = tokenizer
        self._settings = settings
        self._device = device
        self.in_step = in_step
        self._use_cache = use_cache
        self._check_experts()
        self.ends = end_tokens(tokenizer, settings)
        self.longest_prompt = longest_prompt(tokenizer, settings)
        """In tokens: what leaves room for max_new_tokens; longer prompts lose their beginning."""
        # A backbone's folder may ask for sampling or penalties of its own.
        self._model.generation_config = transformers.GenerationConfig()

    def _check_experts(self) -> None:
        levels = {m.inference_level for m in self._model.modules() if isinstance(m, BottleneckAdapter) and m.num_experts > 1} - {3}
        if levels:
            raise ConfigError(
                f"inference_level is {levels.pop()}, which draws experts at random, so a text would depend on the batch it is generated in;"
                " generate with the experts' average: --inference_level 3"
            )

    def tokens(self, prompts: Sequence[np.ndarray]) -> list[list[int]]:
        """What is generated from each prompt (1-D token arrays, at least one), without the token that ended it.

        Raises NumericalError where the model's outputs are not numbers.
        """
        kept = [self._cut(prompt) for prompt in prompts]
        width = max(2, *map(len, kept))  # something to read ahead in every batch: ranks in step make equally many passes
        ids_BT = torch.full((len(kept), width), int(self._tokenizer.pad_token_id), dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        # On the left, so that every row goes on at the same column; positions are counted along the mask.
        for row, prompt in enumerate(kept):
            ids_BT[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask_BT[row, width - len(prompt) :] = 1
        ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
        watch = _NanWatch(self._device)
        with quiet_transformers():  # it takes the end that every prompt has for padding, and recommends a mask to mask it with
            output_BT: Tensor = self._model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                generation_config=self._library_config(),
                logits_processor=transformers.LogitsProcessorList([watch, *self._processors(width)]),
                synced_gpus=self.in_step,
                **(self._read_ahead(ids_BT, mask_BT) if self._use_cache and self._settings.num_beams > 1 else {}),
            )
        if watch.seen:
            raise NumericalError(
                "generating: the model's outputs are not numbers; the training diverged: lower --learning_rate and train again"
            )
        return [self._until_end(row) for row in output_BT[:, width:].tolist()]

    @torch.no_grad()
    def _read_ahead(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, Any]:
        """Keys and values of all columns but the last, for `generate`, which by itself reads every prompt once for each beam."""
        cache = transformers.DynamicCache(config=self._model.config.get_text_config(decoder=True))
        # PEFT's wrapper takes anything, and hands it on to the model inside.
        inside = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        accepted = inspect.signature(inside.forward).parameters
        further: dict[str, Any] = {"position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, :-1], "logits_to_keep": 1}
        self._model(
            input_ids=ids_BT[:, :-1],
            attention_mask=mask_BT[:, :-1],
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in further.items() if name in accepted},
        )
        cache.batch_repeat_interleave(self._settings.num_beams)
        return {"past_key_values": cache}

    def texts(self, prompts: Sequence[np.ndarray]) -> list[tuple[list[int], str]]:
        """Tokens and text of each prompt."""
        return [(tokens, str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()) for tokens in self.tokens(prompts)]

    def _cut(self, prompt: np.ndarray) -> np.ndarray:
        """A prompt that is too long without its beginning, but with the token that the tokenizer begins every text with."""
        if len(prompt) <= self.longest_prompt:
            return prompt
        start = int(prompt[0] == self._tokenizer.bos_token_id)
        return np.concatenate((prompt[:start], prompt[len(prompt) - self.longest_prompt + start :]))

    def _until_end(self, tokens: list[int]) -> list[int]:
        return tokens[: next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))]

    def _library_config(self) -> transformers.GenerationConfig:
        settings, early = self._settings, {"never": "never", "false": False, "true": True}
        beams: dict[str, Any] = {}
        if settings.num_beams > 1:
            beams = {"length_penalty": settings.length_penalty, "early_stopping": early[settings.early_stopping]}
        return transformers.GenerationConfig(
            do_sample=False,
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None,
            eos_token_id=list(self.ends),
            pad_token_id=int(self._tokenizer.pad_token_id),
            use_cache=self._use_cache,
            # What is forbidden counts for nothing: the published code forbids before its softmax.
            renormalize_logits=True,
            **beams,
        )

    def _processors(self, prompt_width: int) -> list[_OfGenerated]:
        found: list[Any] = []
        if self._settings.repetition_penalty != 1.0:
            found.append(transformers.RepetitionPenaltyLogitsProcessor(self._settings.repetition_penalty))
        if self._settings.no_repeat_ngram_size:
            found.append(transformers.NoRepeatNGramLogitsProcessor(self._settings.no_repeat_ngram_size))
        return [_OfGenerated(processor, prompt_width) for processor in found]


def end_tokens(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> tuple[int, ...]:
    """The tokens that end a text. ConfigError where there is none, or a setting names one that the tokenizer does not have."""
    unknown = [token for token in settings.further_ends if token >= len(tokenizer)]
    if unknown:
        raise ConfigError(
            f"eos_token_id names {unknown[0]}, but the tokenizer has the tokens 0 to {len(tokenizer) - 1} (set --eos_token_id)"
        )
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ends = tuple(dict.fromkeys([*own, *settings.further_ends]))
    if not ends:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token; name the tokens that end a text: --eos_token_id"
        )
    if len(ends) >= len(tokenizer):
        raise ConfigError(f"eos_token_id names all of the tokenizer's {len(tokenizer)} tokens, so no text could be made of any; name fewer")
    return ends


def longest_prompt(tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig) -> int:
    """Tokens of a prompt that leave room for the text; ConfigError where none do."""
    limit = int(tokenizer.model_max_length) - settings.max_new_tokens
    if limit < 1:
        raise ConfigError(
            f"max_new_tokens is {settings.max_new_tokens}, but the model has {tokenizer.model_max_length} positions for prompt and text"
            " together; lower --max_new_tokens"
        )
    return limit


def rank_batches(prompts: Prompts, pending: np.ndarray, batch_size: int, world: World) -> list[np.ndarray]:
    """The indices of this rank's batches of the pending prompts, longest first; equally many batches per rank, the last ones empty."""
    lengths = np.diff(prompts.offsets)[pending]
    return [pending[places] for places in evaluation_batches(lengths, batch_size, world.world_size, world.rank)]


def decode_prompts(
    decoder: BeamDecoder,
    prompts: Prompts,
    pending: np.ndarray,
    *,
    batch_size: int,
    world: World = World(),  # noqa: B008, an immutable value
    boundary: Callable[[], None] = lambda: None,
    progress: GenerationProgress | None = None,
) -> Iterator[list[Row]]:
    """This rank's share of the pending prompts (their indices), batch by batch, longest prompts first.

    batch_size: prompts per batch and rank; each takes num_beams rows of the model. boundary: passed before every batch, by all ranks
    equally often; what it raises ends the work. Where ranks go in step, one without prompts left decodes one for nothing.
    """
    for indices in rank_batches(prompts, pending, batch_size, world):
        boundary()
        if len(indices):
            found = decoder.texts([prompts.prompt(index) for index in indices])
            rows = [Row(int(index), tokens, text) for index, (tokens, text) in zip(indices, found, strict=True)]
            if progress is not None:
                progress.advance(len(rows), sum(len(row.tokens) for row in rows))
            yield rows
        elif decoder.in_step:
            decoder.tokens([prompts.prompt(pending[0])])

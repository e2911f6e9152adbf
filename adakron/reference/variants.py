"""Files of one format differ in what has no effect. It is recorded at import, so that an export writes the same file again."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakron.errors import CheckpointError

TIED_KEYS = ("lm_head.decoder.weight", "lm_head.weight")
"""The output layer of GPT-2, which is the embedding: its name in the published code (`NLG/src/model.py:340`), and transformers'."""

_EXTRA = "reference"


@dataclass(frozen=True)
class Variant:
    """What a text-generation file may or may not hold; the defaults are what the published code writes under DDP.

    ddp_prefix: names begin with "module.". output_key: the name of the output layer, None without one.
    causal_masks: each layer's attention mask is there. lone_scores: scores of modules with one expert that are not 0.
    """

    ddp_prefix: bool = True
    output_key: str | None = TIED_KEYS[0]
    causal_masks: bool = True
    lone_scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], prefixed: bool, lone: Collection[str]) -> "Variant":
        """The variant that a file's tensors, by name without the prefix, are."""
        return cls(
            ddp_prefix=prefixed,
            output_key=next((key for key in TIED_KEYS if key in stored), None),
            causal_masks=any(key.endswith(".attn.bias") for key in stored),
            lone_scores={key: float(stored[key]) for key in lone if float(stored[key]) != 0.0},
        )

    def to_extra(self, **more: str) -> dict[str, Any]:
        """The `extra` of an adapter folder that holds this, and what else there is to say about the file."""
        return {_EXTRA: {**more, **dataclasses.asdict(self)}}

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any], folder: str | Path) -> "Variant":
        """The inverse of `to_extra`; the defaults where the folder was not imported. CheckpointError on values of other kinds."""
        if _EXTRA not in extra:
            return cls()
        try:
            variant = cls(**{name: extra[_EXTRA][name] for name in cls.__dataclass_fields__})
            scores = {str(key): float(score) for key, score in variant.lone_scores.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder}: what its adapter_config.json records of the imported file is damaged; import it again"
            ) from error
        return dataclasses.replace(variant, lone_scores=scores)


def derived_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What older code saved beside the parameters although it follows from the configuration, by name."""
    config, prefix = model.config, model.base_model_prefix
    if config.model_type != "gpt2":
        # transformers 4.4, in the encoder's embeddings
        return {f"{prefix}.embeddings.position_ids": torch.arange(config.max_position_embeddings)[None]}
    mask = torch.ones(config.n_positions, config.n_positions).tril()[None, None]
    return {f"{prefix}.h.{layer}.attn.bias": mask for layer in range(config.n_layer)}

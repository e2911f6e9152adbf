"""Two-layer random models of every supported architecture: the same structure as the real ones, in a few kilobytes."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

_BERT_LIKE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64}

SIZES: dict[str, dict[str, Any]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE | {"max_position_embeddings": 66},
    "electra": _BERT_LIKE | {"embedding_size": 16},
    "deberta": _BERT_LIKE | _DEBERTA,
    "deberta-v2": _BERT_LIKE | _DEBERTA | {"conv_kernel_size": 3},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1},
}
"""Model type -> configuration: 2 layers, hidden 32, vocabulary 50."""


def tiny_model(model_type: str, *, auto_class: str = "AutoModelForSequenceClassification", **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode, the same at every call; options go to its configuration."""
    config = AutoConfig.for_model(model_type, **(SIZES[model_type] | {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3} | options))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    return model.eval()


def tiny_batch() -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (3, 7), the last row padded by two."""
    input_ids = torch.arange(2, 23).reshape(3, 7)
    mask = torch.ones_like(input_ids)
    input_ids[2, 5:], mask[2, 5:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}

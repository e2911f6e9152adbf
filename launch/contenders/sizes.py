"""Backbones of known sizes with random weights: what a step costs does not depend on what a model knows, and nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, RobertaConfig

from adakron.packaged import packaged_minilm
from adakron.pretrained import quiet_transformers

_ROBERTA: dict[str, dict[str, Any]] = {
    "roberta-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "roberta-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}

SIZES = (*_ROBERTA, "minilm")


def save_backbone(size: str, folder: Path) -> None:
    """Write a backbone of that size into an existing folder, with the packaged MiniLM's tokenizer, as transformers saves them.

    Its vocabulary is the tokenizer's, so the embedding, which does not train, has fewer rows than RoBERTa's own.
    """
    packaged = packaged_minilm()
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    architecture: PreTrainedConfig
    if size in _ROBERTA:
        architecture = RobertaConfig(
            **_ROBERTA[size], vocab_size=len(tokenizer), max_position_embeddings=514, layer_norm_eps=1e-5,
            type_vocab_size=2,  # RoBERTa's has 1; this tokenizer numbers the two texts of a pair
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        )  # fmt: skip
    else:
        architecture = AutoConfig.from_pretrained(packaged)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        AutoModel.from_config(architecture).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

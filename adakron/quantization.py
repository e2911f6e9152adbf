"""Frozen backbones in 8 or 4 bits, quantised by bitsandbytes while transformers loads them."""

import re
from collections.abc import Sequence

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from adakron.config import ModelConfig
from adakron.errors import ConfigError


def check_quantization(config: ModelConfig) -> None:
    """ConfigError where a quantisation was asked for whose library is not installed."""
    if config.quantization is not None and not is_bitsandbytes_available():
        raise ConfigError(
            f"quantization {config.quantization} needs the package bitsandbytes, which is not installed (or too old); pip install"
            " bitsandbytes, or drop --quantization"
        )


def quantization_config(config: ModelConfig, keep: Sequence[str], compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """What transformers' `from_pretrained` takes as quantization_config; None where the backbone stays as it is.

    keep: modules that are not quantised, by name: those that train. compute_dtype: of the products in 4 bits.
    4 bits are NF4 with nested quantisation of its constants, as QLoRA has them (https://arxiv.org/abs/2305.14314, section 3).
    """
    if config.quantization is None:
        return None
    skipped = [re.escape(name) for name in keep] or None  # None: bitsandbytes leaves out a vocabulary projection
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,
    )

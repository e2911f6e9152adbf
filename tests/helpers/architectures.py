"""Two-layer random models of every supported architecture: the same structure as the real ones, in a few kilobytes."""

from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

_BERT_LIKE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_LLAMA_LIKE = _BERT_LIKE | {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1}
_T5_LIKE: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "eos_token_id": 1}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64}

SIZES: dict[str, dict[str, Any]] = {
    "bert": _BERT_LIKE,
    "roberta": _BERT_LIKE | {"max_position_embeddings": 66},
    "electra": _BERT_LIKE | {"embedding_size": 16},
    "deberta": _BERT_LIKE | _DEBERTA,
    "deberta-v2": _BERT_LIKE | _DEBERTA | {"conv_kernel_size": 3},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1},
    "xlm-roberta": _BERT_LIKE | {"max_position_embeddings": 66},
    "camembert": _BERT_LIKE | {"max_position_embeddings": 66},
    "albert": _BERT_LIKE | {"embedding_size": 16},
    "mpnet": _BERT_LIKE | {"max_position_embeddings": 66},
    # One layer of full attention and one of local attention, whose window is shorter than the batch's rows.
    "modernbert": _BERT_LIKE
    | {"layer_types": ["full_attention", "sliding_attention"], "local_attention": 4, "max_position_embeddings": 64}
    | dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1),
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}
    | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 1},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32}
    | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1},
    "phi": _LLAMA_LIKE | {"num_key_value_heads": 2},
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": 4},
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
    "gemma": _LLAMA_LIKE,
    "gemma2": _LLAMA_LIKE | {"sliding_window": 4},
    "t5": _T5_LIKE | {"decoder_start_token_id": 0},
    "mt5": _T5_LIKE | {"decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 1}
    | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64, "decoder_start_token_id": 1}
    | {"bos_token_id": 1, "forced_eos_token_id": None},
}
"""Model type -> configuration: 2 layers (of each stack; ALBERT's are one layer used twice), hidden 32, vocabulary 50."""


DECODERS = ("gpt2", "gpt_neo", "gptj", "opt", "bloom", "phi", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
ENCODER_DECODERS = ("t5", "mt5", "bart")

_BERT_PLACES = ("attention.output.dense", "output.dense")
_LLAMA_PLACES = ("self_attn.o_proj", "mlp.down_proj")
_LLAMA = [("model.layers.N", *_LLAMA_PLACES)]
_T5 = [
    ("transformer.encoder.block.N", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo"),
    ("transformer.decoder.block.N", "layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo"),
]
PLACES: dict[str, list[tuple[str, str, str]]] = {
    "bert": [("bert.encoder.layer.N", *_BERT_PLACES)],
    "roberta": [("roberta.encoder.layer.N", *_BERT_PLACES)],
    "xlm-roberta": [("roberta.encoder.layer.N", *_BERT_PLACES)],
    "camembert": [("roberta.encoder.layer.N", *_BERT_PLACES)],
    "electra": [("electra.encoder.layer.N", *_BERT_PLACES)],
    "deberta": [("deberta.encoder.layer.N", *_BERT_PLACES)],
    "deberta-v2": [("deberta.encoder.layer.N", *_BERT_PLACES)],
    "distilbert": [("distilbert.transformer.layer.N", "attention.out_lin", "ffn.lin2")],
    "albert": [("albert.encoder.albert_layer_groups.0.albert_layers.0", "attention.dense", "ffn_output")],
    "mpnet": [("mpnet.encoder.layer.N", "attention.attn.o", "output.dense")],
    "modernbert": [("model.layers.N", "attn.Wo", "mlp.Wo")],
    "gpt2": [("transformer.h.N", "attn.c_proj", "mlp.c_proj")],
    "gpt_neo": [("transformer.h.N", "attn.attention.out_proj", "mlp.c_proj")],
    "gptj": [("transformer.h.N", "attn.out_proj", "mlp.fc_out")],
    "opt": [("model.decoder.layers.N", "self_attn.out_proj", "fc2")],
    "bloom": [("transformer.h.N", "self_attention.dense", "mlp.dense_4h_to_h")],
    "phi": [("model.layers.N", "self_attn.dense", "mlp.fc2")],
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "t5": _T5,
    "mt5": _T5,
    "bart": [(f"model.{stack}.layers.N", "self_attn.out_proj", "fc2") for stack in ("encoder", "decoder")],
}
"""Written out, independent of PLACEMENT: of each stack of a classifier its layers (N: number), the attention and the FFN place."""

FLAT_FFN = ("opt",)
"""Model types that flatten (B, T, D) to (B T, D) before the FFN, so that an adapter there cannot tell sentences apart."""

WITHOUT_CHECKPOINTING = ("albert", "mpnet")
"""Model types whose code in transformers cannot compute activations again."""

WITHOUT_BIASES = ("modernbert", "llama", "mistral", "qwen3", "gemma", "gemma2", "t5", "mt5")
"""Model types that have no bias outside their head, so that bitfit has nothing to train."""

KEY_BIASES = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), "attention.self.key.bias") | {
    "albert": "attention.key.bias",
    "bart": "attn.k_proj.bias",
    "deberta-v2": "attention.self.pos_key_proj.bias",
    "distilbert": "attention.k_lin.bias",
    "mpnet": "attention.attn.k.bias",
    "opt": "attn.k_proj.bias",
}
"""Model type -> how the biases end whose gradient is zero: one adds the same to a query's scores of all keys, and softmax takes only
their differences. Rotary positions turn it, and DeBERTa multiplies its other key bias with positions; GPT-2's is part of a longer one.
"""


def language_model_class(model_type: str) -> str:
    """The Auto class of the architecture's language model."""
    if model_type in ENCODER_DECODERS:
        return "AutoModelForSeq2SeqLM"
    return "AutoModelForCausalLM" if model_type in DECODERS else "AutoModelForMaskedLM"


def tiny_model(model_type: str, *, auto_class: str = "AutoModelForSequenceClassification", **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode, the same at every call; options go to its configuration."""
    config = AutoConfig.for_model(model_type, **(SIZES[model_type] | {"vocab_size": 50, "pad_token_id": 0, "num_labels": 3} | options))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    return model.eval()


def tiny_batch() -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (3, 7), the last row padded by two; each text ends in token 1, where encoder-decoders classify."""
    input_ids = torch.arange(2, 23).reshape(3, 7)
    mask = torch.ones_like(input_ids)
    input_ids[:2, 6], input_ids[2, 4] = 1, 1
    input_ids[2, 5:], mask[2, 5:] = 0, 0
    return {"input_ids": input_ids, "attention_mask": mask}

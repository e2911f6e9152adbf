"""What an adapter was trained on, in a few hundred numbers: enough to tell a backbone from any other that would load as well.

Recorded: the architecture, every parameter's name and shape, values of some weights, and what the tokenizer makes of text.
Left out: the task head and a pooler (whether a model has one depends on the task's class), names of files and folders, and
where the adapters go, which the adapter folder lists itself.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedModel, PreTrainedTokenizerBase

from adakron import weights as weights_of
from adakron.backbone import is_inside
from adakron.errors import CheckpointError

log = logging.getLogger(__name__)

SAMPLED_MATRICES, SAMPLED_VECTORS = 12, 4
"""Weights that are sampled of either kind, evenly over the model: an even step over all of them could meet biases alone."""

HASHED_VALUES, KEPT_VALUES = 64, 4
"""Values of one weight that its hash covers, and how many of them are kept for comparisons across precisions."""

_GOLDEN_RATIO = 0.6180339887498949

_PLAIN = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What holds weights as they are; quantised ones are integers or bytes.

# Case, accents, digits, punctuation, white space, scripts, an emoji, a word in pieces, the special tokens around one text and two.
_PROBES: tuple[tuple[str, ...], ...] = (
    ("The quick brown fox doesn't jump over 1,234.5 lazy dogs!",),
    ("Ünïcödé  naïve\tÉtude\nstraße ﬁn ½", "antidisestablishmentarianism re-tokenised"),
    ("日本語のテキスト русский текст عربى हिन्दी 🙂",),
    ("def f(x):\n    return x**2  # http://example.org/a_b?c=d", "UPPER lower CamelCase"),
)

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "cls", "mask")
# Not the padding token: it is masked, and a decoder without one is given another's (`load_backbone`).


@dataclass(frozen=True)
class WeightSample:
    """Values of one weight at fixed positions.

    name: in the base model, without the wrapper's part of an adapted layer. dtype: as it was loaded, e.g. "float32".
    values: the first KEPT_VALUES of the sampled values. sha256: of all HASHED_VALUES of them in float32.
    """

    name: str
    dtype: str
    values: tuple[float, ...]
    sha256: str


@dataclass(frozen=True)
class TokenizerFingerprint:
    """tokens: size of the vocabulary. vocabulary, probes: SHA-256 of its tokens with their ids, and of the ids of fixed texts.

    special_ids: of the special tokens that mean something to the model.
    """

    tokens: int
    vocabulary: str
    special_ids: dict[str, int]
    probes: str


@dataclass(frozen=True)
class BackboneFingerprint:
    """What `take_fingerprint` finds; None where a model does not say, or where quantised layers hide it.

    hidden_size: width D. vocab_size: rows of the embedding. parameters: number of weights.
    names_and_shapes: SHA-256 of every weight's name and shape. weights: the samples.
    """

    model_type: str
    backbone_class: str
    hidden_size: int | None
    num_layers: int | None
    vocab_size: int | None
    parameters: int | None
    names_and_shapes: str | None
    weights: tuple[WeightSample, ...]
    tokenizer: TokenizerFingerprint | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, content: Any) -> "BackboneFingerprint":
        """What `to_dict` wrote, read back from JSON. Raises CheckpointError where it is something else."""
        try:
            fields = dict(content)
            samples = [WeightSample(**(sample | {"values": tuple(map(float, sample["values"]))})) for sample in fields["weights"]]
            unknown = {sample.dtype for sample in samples} - _PLAIN.keys()
            if unknown:
                raise ValueError(f"dtype {', '.join(map(str, unknown))}")
            fields["weights"] = tuple(samples)
            if fields["tokenizer"] is not None:
                fields["tokenizer"] = TokenizerFingerprint(**fields["tokenizer"])
            return cls(**fields)
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"backbone is not a fingerprint of this version's ({type(error).__name__}: {error})") from None


def take_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> BackboneFingerprint:
    """The fingerprint of a loaded backbone, with or without adapters in it, before training has changed any of its weights.

    Reads about a thousand numbers whatever the model's size. Quantised weights are not sampled. All ranks together, where ZeRO
    stage 3 has taken the weights apart. Raises CheckpointError where the model is on the meta device.
    """
    weights = dict(_backbone_weights(model))
    floating = {name: weight for name, weight in weights.items() if _is_plain(weight)}
    matrices = [name for name, weight in floating.items() if len(weights_of.shape(weight)) > 1]
    vectors = [name for name, weight in floating.items() if len(weights_of.shape(weight)) == 1]
    chosen = [*_evenly(matrices, SAMPLED_MATRICES), *_evenly(vectors, SAMPLED_VECTORS)]
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    quantised = _is_quantised(model, weights)
    shapes = sorted(f"{name} {weights_of.shape(weight)}" for name, weight in weights.items())
    return BackboneFingerprint(
        model_type=model.config.model_type,
        backbone_class=_backbone_class(model),
        hidden_size=getattr(config, "hidden_size", None),
        num_layers=getattr(config, "num_hidden_layers", None),
        vocab_size=embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None,
        parameters=None if quantised else len(weights),
        names_and_shapes=None if quantised else _sha256("\n".join(shapes).encode()),
        weights=tuple(_sample(name, floating[name]) for name in chosen),
        tokenizer=None if tokenizer is None else _tokenizer_fingerprint(tokenizer),
    )


def backbone_differences(
    saved: BackboneFingerprint,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    loaded_over: Iterable[str] = (),
) -> list[str]:
    """What of a saved fingerprint does not hold for this model, one readable clause each; empty where it is the same backbone.

    Weights are compared exactly where both were loaded in one dtype, else within the rounding of the coarser one. Quantised
    weights are skipped. tokenizer: None skips its part.
    loaded_over: parameters or modules of the model, by name, whose values here do not matter: the adapter brings its own.
    """
    here = take_fingerprint(model, tokenizer)
    found = []
    for field, label in (
        ("model_type", "model type"), ("backbone_class", "class"), ("hidden_size", "hidden size"), ("num_layers", "layers"),
        ("vocab_size", "vocabulary size of the embedding"), ("parameters", "number of weights"),
    ):  # fmt: skip
        before, now = getattr(saved, field), getattr(here, field)
        if before != now and None not in (before, now):
            found.append(f"{label}: saved {before}, here {now}")
    if not found and None not in (saved.names_and_shapes, here.names_and_shapes) and saved.names_and_shapes != here.names_and_shapes:
        found.append("names or shapes of the weights: not those of the saved backbone, though there are equally many")
    found += _weight_differences(saved.weights, model, tuple(loaded_over))
    if saved.tokenizer is not None and here.tokenizer is not None:
        found += _tokenizer_differences(saved.tokenizer, here.tokenizer)
    return found


def _weight_differences(saved: Sequence[WeightSample], model: PreTrainedModel, loaded_over: Sequence[str]) -> list[str]:
    weights = dict(_backbone_weights(model))
    prefix = f"{model.base_model_prefix}."
    own = [name.removeprefix(prefix) for name in loaded_over]
    fixed = [sample for sample in saved if not is_inside(sample.name, own)]
    # What is missing altogether has changed the number or the names of the weights, which is reported.
    samples = [sample for sample in fixed if sample.name in weights and _is_plain(weights[sample.name])]
    if len(samples) < len(fixed):
        skipped = len(fixed) - len(samples)
        log.info("%d of %d sampled weights of the backbone are quantised or missing here and were not compared", skipped, len(fixed))
    differing = []
    for sample in samples:
        now = _sample(sample.name, weights[sample.name])
        pair = _first_difference(sample, now)
        if pair is not None:
            differing.append(f"{sample.name}: saved {pair[0]:.9g}, here {pair[1]:.9g}")
        elif sample.dtype == now.dtype and sample.sha256 != now.sha256:
            differing.append(f"{sample.name} in places of which only the hash was kept")
    if not differing:
        return []
    return [f"weights: {len(differing)} of {len(samples)} sampled weights differ, e.g. {'; '.join(differing[:2])}"]


def _first_difference(saved: WeightSample, here: WeightSample) -> tuple[float, float] | None:
    relative = absolute = 0.0
    if saved.dtype != here.dtype:
        # One unit in the last place of the coarser type, and its smallest number for what it rounds to zero.
        limits = [torch.finfo(_PLAIN[name]) for name in (saved.dtype, here.dtype)]
        relative, absolute = max(limit.eps for limit in limits), max(limit.smallest_normal for limit in limits)
    for before, now in zip(saved.values, here.values, strict=False):
        # "not <=", so that a NaN differs from a number.
        if before != now and not abs(before - now) <= relative * max(abs(before), abs(now)) + absolute:
            return before, now
    return None


def _backbone_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, parameter) of everything but heads, pooler and adapters, by names that no wrapper and no task's class changes."""
    base = model.base_model
    # With a language-modelling head, some sequence-to-sequence models are their own base model.
    outputs = model.get_output_embeddings() if base is model else None
    outside = ["pooler", *(name for name, module in base.named_modules() if outputs is not None and module is outputs)]
    # What holds the backbone's own module beside an adapter's: adapted layers of ours and PEFT's, PEFT's modules that train whole.
    wrappers = [
        (f"{name}.", f"{name}.{inner}.")
        for name, module in base.named_modules()
        for inner in ("base_layer", "original_module")
        if inner in module._modules
    ]
    for full_name, parameter in base.named_parameters():
        name = full_name
        # From the innermost wrapper outwards, so that the outer names still fit.
        for wrapper, own in reversed(wrappers):
            if full_name.startswith(wrapper):
                if not full_name.startswith(own):
                    break  # an adapter's
                name = wrapper + name[len(own) :]
        else:
            if not is_inside(name, outside):
                yield name, parameter


def _sample(name: str, weight: Tensor) -> WeightSample:
    elements = weights_of.size(weight)
    if elements == 0 or weight.is_meta:
        raise CheckpointError(
            f"the backbone's weight {name} holds no values here (shape {tuple(weight.shape)}): a fingerprint is taken of a model that is"
            " loaded; take it of one that is not on the meta device"
        )
    # Multiples of the golden ratio spread evenly over any size, and fall into no pattern with the columns of a matrix.
    places = [int((place + 1) * _GOLDEN_RATIO % 1.0 * elements) for place in range(HASHED_VALUES)]
    with weights_of.gathered([weight]):
        values = weight.detach().reshape(-1)[torch.tensor(places, device=weight.device)].float().cpu()
    digest = hashlib.sha256(values.numpy().astype("<f4").tobytes()).hexdigest()
    # Nine digits name a float32 exactly.
    kept = tuple(float(f"{value:.9g}") for value in values[:KEPT_VALUES].tolist())
    return WeightSample(name, str(weight.dtype).removeprefix("torch."), kept, digest)


def _evenly(names: Sequence[str], count: int) -> list[str]:
    count = min(count, len(names))
    return [names[(2 * index + 1) * len(names) // (2 * count)] for index in range(count)]


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype in _PLAIN.values()


def _is_quantised(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> bool:
    # Some kinds pack their weights into integer parameters, some into buffers that look like no weight at all.
    packed = any(not _is_plain(weight) for weight in weights.values())
    return packed or getattr(model.config, "quantization_config", None) is not None


def _backbone_class(model: PreTrainedModel) -> str:
    own = type(model.base_model).__name__
    if model.base_model is model and type(model.config) in MODEL_MAPPING:
        # Where the table holds several classes for a configuration, this model's own is one of them.
        own = getattr(MODEL_MAPPING[type(model.config)], "__name__", own)
    return own


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> TokenizerFingerprint:
    vocabulary = tokenizer.get_vocab()
    # The ids of texts and not the settings of its pipeline, whose written form changes with the library.
    ids = [tokenizer(*texts, padding=False, truncation=False, verbose=False)["input_ids"] for texts in _PROBES]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL_TOKENS}
    return TokenizerFingerprint(
        tokens=len(vocabulary),
        vocabulary=_sha256(json.dumps(sorted(vocabulary.items())).encode()),
        special_ids={name: number for name, number in special.items() if number is not None},
        probes=_sha256(json.dumps(ids).encode()),
    )


def _tokenizer_differences(saved: TokenizerFingerprint, here: TokenizerFingerprint) -> list[str]:
    found = []
    if saved.tokens != here.tokens:
        found.append(f"tokenizer: saved {saved.tokens} tokens, here {here.tokens}")
    elif saved.vocabulary != here.vocabulary:
        found.append(f"tokenizer: other tokens, or other ids for them, though both have {here.tokens}")
    names = sorted(saved.special_ids.keys() | here.special_ids.keys())
    pairs = [(name, saved.special_ids.get(name), here.special_ids.get(name)) for name in names]
    found += [f"tokenizer: {name} token saved {before}, here {now}" for name, before, now in pairs if before != now]
    if not found and saved.probes != here.probes:
        found.append("tokenizer: the same vocabulary, but other ids for the same text (its case, accents, pieces or special tokens)")
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""From a published checkpoint to an adapted model: every key accounted for, one by one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adakron.architecture import load_config
from adakron.backbone import is_inside
from adakron.config import AdapterConfig, ModelConfig
from adakron.errors import CheckpointError, ConfigError
from adakron.models import adapt
from adakron.placement import some_of
from adakron.reference.base import load_base
from adakron.reference.files import read_tensors
from adakron.reference.layout import AUTO_CLASSES, HEADS, LAYOUTS, AdapterKey, Layout, adapter_keys, home_of, parse_key
from adakron.reference.variants import TIED_KEYS, Variant, derived_tensors
from adakron.trainable import AdaptedModelInfo


@dataclass(frozen=True)
class Imported:
    """A published adapter inside its backbone.

    model: in evaluation mode, with the file's adapters and head. The others: as `adapter_io.save_adapter` takes them.
    layout: which code wrote the file.
    """

    model: PreTrainedModel
    info: AdaptedModelInfo
    adapter: AdapterConfig
    model_options: dict[str, Any]
    extra: dict[str, Any]
    layout: Layout

    @property
    def auto_class(self) -> str:
        """Name of the transformers Auto class of the model."""
        return AUTO_CLASSES[self.layout.format]


def import_checkpoint(file: str | Path, base: str, label_names: Sequence[str] | None = None) -> Imported:
    """Read a checkpoint of AdaKron's or AdaMix's code into the backbone it was trained on.

    file: pytorch_model_expert_soup.bin, model.final.pt or model.<step>.pt. base: folder or hub id of the backbone.
    label_names: of a classifier; default: those of the backbone's configuration where their number fits, else "0", "1", ...
    The scores of experts are taken as they are. Where the file holds the backbone too, it must be that of base, bit for bit.
    Raises CheckpointError listing every unknown, missing and misshapen key, ConfigError where the backbone is at fault.
    """
    file = Path(file)
    stored, prefixed = read_tensors(file)
    parsed = {key: parts for key in stored if (parts := parse_key(key)) is not None}
    layout = _recognise(file, parsed, stored)
    adapter = _settings(file, layout, parsed, stored)
    heads = HEADS[layout.format]
    options = _model_options(file, layout, stored, base, label_names)
    model = load_base(base, auto_class=AUTO_CLASSES[layout.format], options=options, heads=heads)
    prefix = next(iter(parsed.values())).home.partition(".")[0]
    if model.base_model_prefix != prefix:
        raise CheckpointError(
            f"{file} holds adapters of a {prefix} model, {base} is a {model.config.model_type} (set --model_name_or_path to the model"
            " that they were trained on)"
        )
    frozen, optional = _backbone_tensors(model, layout)
    info = adapt(model, adapter, seed=0, heads=heads)
    slots, lone = _slots(model, info, layout, adapter)
    needed = {key: tuple(slot.shape) for key, slot in slots.items()} | dict.fromkeys(lone, (1,))
    # All of the backbone, or nothing: the step files of one loralib hold adapters only.
    if any(key in frozen for key in stored):
        needed |= {key: tuple(tensor.shape) for key, tensor in frozen.items()}
    problems = _key_problems(stored, needed, {key: tuple(tensor.shape) for key, tensor in optional.items()})
    problems = problems or _backbone_problems({**frozen, **optional}, stored, base)
    if problems:
        raise CheckpointError("\n".join(f"{file} ({layout.code}): {problem}" for problem in problems))
    with torch.no_grad():
        for key, slot in slots.items():
            slot.copy_(stored[key])
    extra = Variant.of(stored, prefixed, lone).to_extra(file=file.name, code=layout.code)
    return Imported(model, info, adapter, options, extra, layout)


def _recognise(file: Path, parsed: Mapping[str, AdapterKey], stored: Mapping[str, Tensor]) -> Layout:
    """The layout with these names of modules; shapes cannot tell, at width 16 both factors have 4 rows."""
    if not parsed:
        found = (
            f"its {len(stored)} keys are {some_of([*stored], 4)}" if stored else "it is empty, as step files are without AdaMix's loralib"
        )
        raise CheckpointError(f"{file} holds no adapter, no key with ExpertSoup behind a feed-forward block: {found}")
    form = next(iter(parsed.values())).format
    names = {parts.module for parts in parsed.values() if parts.format == form}
    known = [layout for layout in LAYOUTS if layout.format == form]
    # The largest: AdaMix's names are among AdaKron's in text generation.
    fitting = [layout for layout in known if layout.modules.keys() <= names]
    if not fitting:
        codes = "; ".join(f"{layout.code}: {', '.join(layout.modules)}" for layout in known)
        raise CheckpointError(f"the adapters in {file} consist of {', '.join(sorted(names))}, which no published code writes ({codes})")
    return max(fitting, key=lambda layout: len(layout.modules))


def _settings(file: Path, layout: Layout, parsed: Mapping[str, AdapterKey], stored: Mapping[str, Tensor]) -> AdapterConfig:
    experts: dict[str, set[int]] = {}
    widths: dict[str, int] = {}
    for key, parts in parsed.items():
        projection = layout.modules.get(parts.module)
        if projection is not None and parts.expert is not None:
            experts.setdefault(projection, set()).add(parts.expert)
            if parts.kind == "weight" and stored[key].dim() == 2:
                widths.setdefault(projection, stored[key].shape[1 if projection == "up" else 0])
    incomplete = [module for module, projection in layout.modules.items() if projection not in widths]
    if incomplete:
        raise CheckpointError(f"{file} holds no weight matrix of {', '.join(incomplete)} in any layer")
    several = {projection: len(found) for projection, found in experts.items() if len(found) > 1}
    if len(set(several.values())) > 1:
        counts = ", ".join(f"{module} {len(experts[projection])}" for module, projection in layout.modules.items())
        raise CheckpointError(f"{file} holds unequal numbers of experts ({counts}); modules with experts must have equally many, or one")
    num_experts = max(several.values(), default=1)
    experts_in = tuple(projection for projection in ("down_a", "down_b", "down", "up") if projection in several)
    try:
        return AdapterConfig(
            method=_method(layout, experts_in),
            bottleneck_dim=widths["up"],
            kron_factor=widths.get("down_a", AdapterConfig().kron_factor),
            factor_order=layout.factor_order,
            activation=layout.activation,  # type: ignore[arg-type]
            num_experts=num_experts,
            experts_in=",".join(experts_in),
            # How AdaKron's NLG code starts them; what the file holds is what counts.
            expert_scores="random" if num_experts > 1 and layout.code == "AdaKron's NLG code" else "zeros",
        ).resolved()
    except ConfigError as error:
        raise CheckpointError(f"{file} ({layout.code}): {error}") from error


def _method(layout: Layout, experts_in: tuple[str, ...]) -> str:
    if layout.bottleneck == "plain":
        return "adamix"
    return {("down_a",): "madakron_partial", ("down_a", "down_b"): "madakron"}.get(experts_in, "adakron")


def _model_options(
    file: Path, layout: Layout, stored: Mapping[str, Tensor], base: str, label_names: Sequence[str] | None
) -> dict[str, Any]:
    """num_labels and the names, as `architecture.load_config` takes them."""
    if layout.format == "nlg":
        if label_names is not None:
            raise ConfigError(f"--label_names belongs to classifiers, and {file} holds a language model; drop it")
        return {}
    # BERT's head is one layer, RoBERTa's ends in out_proj.
    last = next((stored[key] for key in ("classifier.weight", "classifier.out_proj.weight") if key in stored), None)
    if last is None or last.dim() != 2:
        raise CheckpointError(f"{file} holds no head: neither classifier.weight nor classifier.out_proj.weight is a matrix in it")
    count = last.shape[0]
    if count == 1:
        if label_names is not None:
            raise ConfigError(f"--label_names names classes, and the head in {file} has one output, a regression; drop it")
        return {"num_labels": 1, "problem_type": "regression"}
    if label_names is not None:
        names = list(label_names)
        if len(names) != count or len(set(names)) != count or not all(names):
            raise ConfigError(f"--label_names gives {', '.join(map(repr, names))}; the head in {file} needs {count} different names")
    else:
        recorded: Mapping[Any, Any] = load_config(ModelConfig(model_name_or_path=base), {}).id2label or {}
        fits = sorted(recorded) == list(range(count)) and len(set(recorded.values())) == count
        names = [str(recorded[index]) if fits else str(index) for index in range(count)]
    return {
        "num_labels": count,
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _backbone_tensors(model: PreTrainedModel, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the file may hold of the backbone: its own tensors, and what follows from them or from the configuration."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_inside(name, HEADS[layout.format])}
    optional = derived_tensors(model)
    if layout.format == "nlg":
        optional |= dict.fromkeys(TIED_KEYS, state["transformer.wte.weight"])
    return {name: tensor for name, tensor in state.items() if name not in optional}, optional


def _slots(model: PreTrainedModel, info: AdaptedModelInfo, layout: Layout, adapter: AdapterConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Where each key's values go, as views of the model's tensors; and the keys of scores that have no effect."""
    state = model.state_dict()
    slots = {name: tensor for name, tensor in state.items() if is_inside(name, info.head_modules)}
    lone = []
    for site in info.sites:
        for key, name, expert in adapter_keys(layout, home_of(site), adapter.num_experts or 1, adapter.expert_projections):
            tensor = state.get(f"{site}.adakron_adapter.{name}")
            if tensor is None:
                lone.append(key)
            else:
                stacked = expert is not None and name.partition(".")[0] in adapter.expert_projections
                slots[key] = tensor[expert] if stacked else tensor
    return slots, lone


def _key_problems(
    stored: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> list[str]:
    known = {**optional, **needed}
    wrong = [
        f"{key} {tuple(tensor.shape)} for {known[key]}" for key, tensor in stored.items() if key in known and tensor.shape != known[key]
    ]
    return list(
        _counted(
            ("missing", [key for key in needed if key not in stored]),
            ("unknown", [key for key in stored if key not in known]),
            ("of another shape than the model's", wrong),
            ("not of floating-point numbers", [key for key in needed if key in stored and not stored[key].is_floating_point()]),
        )
    )


def _counted(*groups: tuple[str, list[str]]) -> Iterator[str]:
    for what, keys in groups:
        if keys:
            yield f"{len(keys)} {'key is' if len(keys) == 1 else 'keys are'} {what}: {some_of(keys)}"


def _backbone_problems(expected: Mapping[str, Tensor], stored: Mapping[str, Tensor], base: str) -> list[str]:
    held = [key for key in expected if key in stored]
    # In the file's precision: a file in float16 is the same model.
    differing = [key for key in held if not torch.equal(expected[key].to(stored[key].dtype), stored[key])]
    if not differing:
        return []
    return [
        f"{len(differing)} of {len(held)} frozen tensors differ from those of {base}: {some_of(differing)}; an adapter belongs to its"
        " backbone (set --model_name_or_path to the model that it was trained on)"
    ]

"""Several saved adapters, each with its head, around one backbone: switched, or mixed row by row in one forward pass.

Every layer that an adapter follows, and every head module, is replaced by one that holds a choice (`mixing.BankModule`). No
hooks: the choices show in `print(model)`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron.adapter_folder import AdapterFolder, read_adapter_config
from adakron.adapter_io import check_backbone, fit_adapter
from adakron.architecture import model_class
from adakron.backbone import is_inside
from adakron.errors import CheckpointError, ConfigError
from adakron.mixing import BankModule, Selection
from adakron.models import cast_parameters, route_experts
from adakron.nn import AdaptedLayer, Router
from adakron.pretrained import quiet_transformers, reason_of


@dataclass(frozen=True)
class _Entry:
    """An adapter in the bank. sites, heads: name in the model -> what it puts there. width: of its logits; None: the model's own.

    router: draws the experts of its mixture, if it is one and has a seed.
    """

    saved: AdapterFolder
    sites: dict[str, nn.Module]
    heads: dict[str, nn.Module]
    width: int | None
    router: Router | None


class AdapterBank:
    """Named adapters with their heads on one loaded backbone.

    model: freshly loaded, without adapters, whole (not wrapped or partitioned by DeepSpeed), of the class that the adapters were
    trained with; its own head may have any number of labels. It stays usable as ever: `bank.model(**batch)` runs the adapter in
    use, or the backbone with its own head. Adapters take the device and the dtype of the layers they join; move the model with
    `bank.model.to`. tokenizer: compared with the adapters' own where it is given.
    A bank serves one forward pass at a time. Raises ConfigError where the model has adapters already.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None):
        wrapped = [name for name, module in model.named_modules() if isinstance(getattr(module, "base_layer", None), nn.Module)]
        if wrapped:
            raise ConfigError(f"the model of an adapter bank must be plain, this one has adapters, e.g. at {wrapped[0]}; load it anew")
        self.model = model
        self.tokenizer = tokenizer
        self._selection = Selection()
        self._entries: dict[str, _Entry] = {}
        self._modules: dict[str, BankModule] = {}
        self._added = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order they were added."""
        return tuple(self._entries)

    @property
    def active(self) -> str | None:
        """The adapter in use; None where it is the backbone."""
        return self._selection.active

    def settings(self, name: str) -> AdapterFolder:
        """What an adapter's folder says, e.g. its labels in model_options. Raises ConfigError on an unknown name."""
        return self._entry(name).saved

    def add(self, name: str, folder: str | Path, *, seed: int | None = None, allow_other_backbone: bool = False) -> None:
        """Add the adapter and head of a folder under a name of its own; it is used when `use` or a call names it.

        seed: of a mixture that draws experts at random in evaluation (inference_level 0 or 1), its run's: it draws as it would by
        itself, from (seed, batch, call); see `evaluation_batch`. None: the global generator draws.
        allow_other_backbone: see `adapter_io.check_backbone`. Raises ConfigError on a name that is taken, and CheckpointError
        on a folder whose adapter cannot share its backbone, was trained on another one, or does not fit. Nothing is then added.
        """
        if not name or name in self._entries:
            raise ConfigError(
                f"the bank's adapters need names of their own, and {name!r} is {'taken' if name else 'empty'}; choose another"
            )
        saved = read_adapter_config(folder)
        if saved.tuned_parameters or saved.adapter.preset is None:
            reason = (
                "trains parameters of the backbone itself, which all adapters of a bank share"
                if saved.tuned_parameters
                else "is one of PEFT's, whose adapters are PEFT's own modules"
            )
            raise CheckpointError(f"{folder} cannot join a bank: its method, {saved.adapter.method}, {reason}; load it by itself")
        check_backbone(self.model, folder, tokenizer=self.tokenizer, allow_other_backbone=allow_other_backbone)
        inputs = next((name for name, module in self.model.named_modules() if module is self.model.get_input_embeddings()), "")
        around = [head for head in saved.head_modules if is_inside(inputs, [head])]
        if around:
            raise CheckpointError(
                f"{folder} cannot join a bank: it trains {', '.join(around)}, which holds the model's input embeddings, and these have to"
                " stay where the model's code looks for them; load it by itself"
            )
        problems = [text for path in saved.head_modules for text in self._place_problems(path, head=True)]
        problems += [text for path in saved.sites for text in self._place_problems(path, head=False)]
        if problems:
            raise CheckpointError(f"{folder} cannot join this bank: {'; '.join(problems[:4])}")
        entry = self._load(folder, saved, seed)
        key = f"adapter_{self._added}"
        self._added += 1
        for path, module in (*entry.sites.items(), *entry.heads.items()):
            place = self._place(path, head=path in entry.heads)
            like = self.model.get_submodule(path)
            weight: Any = like.weight if isinstance(like, AdaptedLayer) else next(like.parameters())
            dtype = weight.dtype if weight.is_floating_point() else self.model.dtype
            if path in entry.sites:
                module.to(dtype)
            else:
                # Its buffers are those of the model's own head, each in its own dtype already.
                cast_parameters(module, dtype)
            place.put(name, key, module.to(weight.device).eval().requires_grad_(False))
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget an adapter; if it was in use, the backbone is. With the last adapter goes every change of the model."""
        entry = self._entry(name)
        if self._selection.active == name:
            self._selection.active = None
        for path in (*entry.sites, *entry.heads):
            place = self._modules[path]
            place.drop(name)
            if not place.keys:
                own = self.model.get_submodule(path).base_layer
                assert isinstance(own, nn.Module)
                self.model.set_submodule(path, own)
                del self._modules[path]
        del self._entries[name]

    def use(self, name: str) -> None:
        """Run `bank.model` with this adapter and its head from here on. Raises ConfigError on an unknown name."""
        self._entry(name)
        self._selection.active = name

    def disable(self) -> None:
        """Run `bank.model` as it was loaded, bit for bit, until the next `use`."""
        self._selection.active = None

    def evaluation_batch(self, index: int) -> None:
        """The next forward passes are those of an evaluation's batch, numbered over all ranks: what random experts depend on."""
        for entry in self._entries.values():
            if entry.router is not None:
                entry.router.evaluation_batch(index)

    @torch.no_grad()
    def __call__(self, names_per_row: Sequence[str], **batch: Tensor) -> list[Tensor]:
        """The logits of every row by its own adapter and head, from one forward pass of the backbone.

        names_per_row: an adapter's name for each row. batch: the model's tensors, (rows, tokens, ...); no labels.
        Returns one tensor per row, in order: (C,), or (T, C) from a head that labels tokens, C being the adapter's own number of
        labels. Equal to the rows of single runs up to rounding, and exactly where all rows name one adapter. Random experts are
        drawn for each adapter's rows in their order and padded width, so they depend on which rows share the batch.
        Raises ConfigError on an unknown name, another number of names than rows, or a model whose rows cannot be told apart.
        """
        unknown = sorted({name for name in names_per_row if name not in self._entries})
        if unknown:
            raise ConfigError(f"the bank has no adapter {', '.join(unknown)}; it has {', '.join(self.names) or 'none'}")
        if "labels" in batch:
            raise ConfigError("a mixed batch takes no labels: every adapter has its own; compute losses from the logits")
        counts = {name: len(tensor) for name, tensor in batch.items()}
        if set(counts.values()) != {len(names_per_row)}:
            raise ConfigError(f"{len(names_per_row)} adapter names for {counts}; every row needs one")
        names, inputs = list(names_per_row), next(iter(batch.values()))
        if len(set(names)) > 1 and inputs.shape[0] == inputs.shape[1]:
            # With one row more, a layer that sees tokens first (XLNet's) cannot pass for one that sees rows first.
            names, batch = [*names, names[-1]], {name: torch.cat([tensor, tensor[-1:]]) for name, tensor in batch.items()}
        before = self._selection.active
        self._choose(names, inputs.shape[1], inputs.device)
        try:
            output = self.model(**batch)
        finally:
            self._selection.active, self._selection.groups = before, {}
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ConfigError(f"{type(self.model).__name__} returns no logits, so rows cannot be mixed; use one adapter per batch (use)")
        return [row[..., : self._entries[name].width] for name, row in zip(names_per_row, logits, strict=False)]

    def _choose(self, names_per_row: Sequence[str], tokens: int, device: torch.device) -> None:
        selection = self._selection
        distinct = list(dict.fromkeys(names_per_row))
        if len(distinct) == 1:
            selection.active, selection.groups = distinct[0], {}
            return
        selection.rows, selection.tokens = len(names_per_row), tokens
        rows = {name: [row for row, own in enumerate(names_per_row) if own == name] for name in distinct}
        selection.groups = {name: torch.tensor(own, device=device) for name, own in rows.items()}

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ConfigError(f"the bank has no adapter {name}; it has {', '.join(self.names) or 'none'}")
        return self._entries[name]

    def _load(self, folder: str | Path, saved: AdapterFolder, seed: int | None) -> _Entry:
        """Adapters and heads by themselves: the whole model is built without memory for its weights, and these parts filled."""
        config = copy.deepcopy(self.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        for option, value in _num_labels_first(saved.model_options).items():
            setattr(config, option, value)
        with quiet_transformers(), torch.device("meta"):
            try:
                skeleton = model_class(saved.auto_class).from_config(config, dtype=torch.float32)
            except ValueError as error:
                raise CheckpointError(f"{folder} does not fit {type(self.model).__name__}: {reason_of(error)}") from error
        if type(skeleton) is not type(self.model):
            raise CheckpointError(
                f"{folder} was trained as {type(skeleton).__name__}, the bank's model is {type(self.model).__name__}; load the backbone"
                f" with {saved.auto_class}"
            )
        info, tensors = fit_adapter(skeleton, folder)
        # Copies: what safetensors returns may be a map of the file.
        skeleton.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=False, assign=True)
        problems = [text for name in info.head_modules for text in self._complete_head(name, skeleton.get_submodule(name))]
        if problems:
            raise CheckpointError(f"{folder} cannot join this bank: {'; '.join(problems[:4])}; load it by itself")
        return _Entry(
            saved,
            {site: skeleton.get_submodule(f"{site}.adakron_adapter") for site in info.sites},
            {name: skeleton.get_submodule(name) for name in info.head_modules},
            skeleton.config.num_labels if info.head_modules else None,
            None if seed is None else route_experts(skeleton, seed),
        )

    def _complete_head(self, path: str, head: nn.Module) -> list[str]:
        """Give a head the buffers of the model's own, as no folder holds them; what is wrong, where that is not all it lacks."""
        place = self.model.get_submodule(path)
        own = dict((place.base_layer if isinstance(place, BankModule) and place.base_layer is not None else place).named_buffers())
        problems = [f"{path}.{name} is shared with the backbone" for name, tensor in head.named_parameters() if tensor.is_meta]
        for name, buffer in list(head.named_buffers()):
            if name not in own or own[name].shape != buffer.shape:
                problems.append(f"the model's own head has no {path}.{name} of shape {tuple(buffer.shape)}")
            else:
                module, _, leaf = name.rpartition(".")
                setattr(head.get_submodule(module), leaf, own[name].clone())
        return problems

    def _place_problems(self, path: str, *, head: bool) -> list[str]:
        found = []
        for other, module in self._modules.items():
            nested = other != path and (is_inside(path, [other]) or is_inside(other, [path]))
            if nested or (other == path and head != (module.base_layer is not None)):
                found.append(f"it changes {path}, and {', '.join(module.keys)} already changes {other}, one inside the other")
        return found

    def _place(self, path: str, *, head: bool) -> BankModule:
        if path not in self._modules:
            own = self.model.get_submodule(path)
            place = BankModule(self._selection, own if head else None)
            self.model.set_submodule(path, (place if head else AdaptedLayer(own, place)).train(own.training))
            self._modules[path] = place
        return self._modules[path]


def _num_labels_first(options: Mapping[str, Any]) -> dict[str, Any]:
    # A configuration makes up new label names when its num_labels changes.
    return dict(sorted(options.items(), key=lambda option: option[0] != "num_labels"))

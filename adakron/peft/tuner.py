"""AdaKron as PEFT builds it: the layer around each adapted layer, and the model around all of them.

PEFT finds and names an adapter's tensors by a rule: `<layer>.<something>.<adapter name>.<weight or bias>` in memory, the same without the
adapter name on disk. So the projections, and not whole adapters, are what is registered under an adapter name: the tensor
`<site>.adakron_adapter.down_a.weight` of our files is `<site>.adakron_adapter.down_a.default.weight` here. Nothing of PEFT's saving and
loading needs to be overridden, in any version.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from adakron.errors import ConfigError
from adakron.models import new_adapter
from adakron.nn import PROJECTIONS, BottleneckAdapter
from adakron.nn.adapter import layer_sizes
from adakron.placement import PLACEMENT

_BASE = "__base__"  # PEFT's name, in adapter_names, for no adapter
_NOT_MERGEABLE = (
    "AdaKron adapters cannot be merged: their output is not linear in the layer's input (a product of two projections, then an activation),"
    " so no weight of the layer equals them; keep the adapter, or call unload() to get the backbone back"
)


class Projections(nn.Module):
    """The projections of all adapters of a layer: each attribute maps adapter names to theirs.

    No ModuleDict, whose keys PEFT 0.21 would take for adapter names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down_a, self.down_b, self.down, self.up = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()


class AdaKronLayer(nn.Module, BaseTunerLayer):
    """A linear layer with any number of named adapters behind it, of which at most one is active.

    bottlenecks: adapter name -> the adapter. Its projections are registered in `adakron_adapter`, the adapter itself is not.
    """

    adapter_layer_names = ("down_a", "down_b", "down", "up")
    other_param_names = ("bottlenecks",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = layer_sizes(base_layer)
        self.adakron_adapter = Projections()
        self.bottlenecks: dict[str, BottleneckAdapter] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    @property
    def down_a(self) -> nn.ModuleDict:
        """Adapter name -> its projection, as PEFT asks for it; so too the others."""
        return self.adakron_adapter.down_a

    @property
    def down_b(self) -> nn.ModuleDict:
        """See `down_a`."""
        return self.adakron_adapter.down_b

    @property
    def down(self) -> nn.ModuleDict:
        """See `down_a`."""
        return self.adakron_adapter.down

    @property
    def up(self) -> nn.ModuleDict:
        """See `down_a`."""
        return self.adakron_adapter.up

    def update_layer(self, adapter_name: str, adapter: BottleneckAdapter, inference_mode: bool = False) -> None:
        """Take in an adapter of that name."""
        self.bottlenecks[adapter_name] = adapter.train(self.training)
        for projection in PROJECTIONS[adapter.bottleneck]:
            getattr(self, projection)[adapter_name] = getattr(adapter, projection)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter, or none; ConfigError for several."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ConfigError(
                f"adapters {', '.join(names)} cannot be active together: AdaKron's changes of a layer do not add up; set one of them, or"
                " choose one per row with adapter_names"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def train(self, mode: bool = True) -> "AdaKronLayer":
        """Training or evaluation mode, of the adapters too."""
        super().train(mode)
        for adapter in self.bottlenecks.values():
            adapter.train(mode)
        return self

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ConfigError with the reason."""
        raise ConfigError(_NOT_MERGEABLE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def _adapted(self, adapter_name: str, hidden: Tensor) -> Tensor:
        adapter = self.bottlenecks[adapter_name]
        dtype = next(adapter.parameters()).dtype
        return adapter(self._cast_input_dtype(hidden, dtype)).to(hidden.dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        """(..., inputs of the layer) -> (..., outputs of the layer). adapter_names: of each row, instead of the active one."""
        hidden: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return hidden
        if adapter_names is None:
            for name in self.active_adapters:
                if name in self.bottlenecks:
                    hidden = self._adapted(name, hidden)
            return hidden
        if hidden.dim() < 3:
            # Rows could be tokens here, and their number that of the sentences by chance.
            raise ConfigError(
                f"adapter_names: this model's layers see tokens without sentences, shape {tuple(hidden.shape)}; split the batch"
            )
        # A name that this layer does not know may have adapters in other layers.
        for name in sorted(self.bottlenecks.keys() & set(adapter_names)):
            rows = torch.tensor([row for row, chosen in enumerate(adapter_names) if chosen == name], device=hidden.device)
            hidden = hidden.index_copy(0, rows, self._adapted(name, hidden.index_select(0, rows)))
        return hidden


class AdaKronModel(BaseTuner):
    """A model with AdaKron adapters; made by `get_peft_model` and `PeftModel.from_pretrained`."""

    # With the dot, so that what follows is a projection: PEFT 0.20 and transformers put the adapter's name behind it.
    prefix = "adakron_adapter."
    tuner_layer_cls = AdaKronLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model. Raises ConfigError on settings that do not fit it, and on names that files cannot keep."""
        if adapter_name in AdaKronLayer.adapter_layer_names:
            raise ConfigError(
                f"{adapter_name!r} is the name of a projection, so no adapter can be called that; choose another adapter_name"
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT shortens long lists to endings that match the same layers of this model; whole names match the same in every model.
        sites = [name for name, module in model.named_modules() if isinstance(module, AdaKronLayer) and adapter_name in module.bottlenecks]
        config: Any = self.peft_config[adapter_name]
        config.target_modules = sites

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config  # `_prepare_model` does it, where the model is at hand

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        peft_config.complete(model, self._check_target_module_exists)
        self._generator = None if peft_config.seed is None else torch.Generator("cpu").manual_seed(peft_config.seed)
        if _refuse_adapter_names not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(_refuse_adapter_names, with_kwargs=True)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        adapter = new_adapter(target, peft_config.adapter, self.model.dtype, self._generator)
        if isinstance(target, AdaKronLayer):
            target.update_layer(adapter_name, adapter, inference_mode=peft_config.inference_mode)
            return
        layer = AdaKronLayer(target).train(target.training)
        layer._active_adapter = [adapter_name] if adapter_name in self.active_adapters else list(self.active_adapters)
        layer.update_layer(adapter_name, adapter, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ConfigError(_NOT_MERGEABLE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While it lasts, every row goes through the adapter and the head that adapter_names names."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names chooses adapters in evaluation; call eval(), or train one adapter at a time")
        layers = [module for module in self.modules() if isinstance(module, AdaKronLayer)]
        unknown = sorted(set(adapter_names) - {_BASE}.union(*(layer.bottlenecks for layer in layers)))
        if unknown:
            raise ConfigError(
                f"adapter_names has {', '.join(unknown)}, which are not loaded; the loaded ones are {', '.join(self.peft_config)}"
            )
        names = list(adapter_names)
        known = getattr(self.model.config, "model_type", None) in PLACEMENT
        beams = int(kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1)
        name_rows = partial(_name_rows, names, beams, known)
        hooks: list[Any] = [layer.register_forward_pre_hook(name_rows, with_kwargs=True) for layer in layers]
        for module in self.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # PEFT's own way knows only heads that are single layers, and only adapters beside an active one.
                hooks.append(module.register_forward_hook(partial(_mixed_head, names, beams), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _refuse_adapter_names(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    # A PeftModel takes adapter_names out. Without one, models accept and ignore what they do not know: every row would get
    # the active adapter.
    if kwargs.get("adapter_names") is not None:
        raise ConfigError("adapter_names needs a PeftModel; load the adapters with PeftModel.from_pretrained, or split the batch")


def _names_of_rows(names: list[str], beams: int, rows: int) -> list[str]:
    """The adapter of each row: generation repeats every row once per beam, but not for an encoder."""
    if rows not in (len(names), len(names) * beams):
        raise ConfigError(f"adapter_names has {len(names)} names, but the batch has {rows} rows; give one name per row")
    return names if rows == len(names) else [name for name in names for _ in range(beams)]


def _name_rows(
    names: list[str], beams: int, known: bool, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    x = args[0]
    if not known and x.dim() > 2 and x.shape[0] == x.shape[1]:
        # Some models (XLNet) put tokens first, and here both are equally many.
        raise ConfigError(
            f"adapter_names: rows of texts and of tokens cannot be told apart in shape {tuple(x.shape)} of an unknown architecture"
            " (docs/support.md); pad the batch to another length"
        )
    return args, {**kwargs, "adapter_names": _names_of_rows(names, beams, len(args[0]))}


def _mixed_head(
    names: list[str], beams: int, head: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    """Instead of the active head's output, that of each row's own head."""
    if head.disable_adapters:
        return None
    if not isinstance(output, Tensor) or not args or not isinstance(args[0], Tensor):
        raise ConfigError(
            f"adapter_names: this head does not map one tensor to one ({type(head.original_module).__name__}); split the batch"
        )
    of_rows = _names_of_rows(names, beams, len(args[0]))
    parts, order = [], []
    for name in sorted(set(of_rows)):
        rows = [row for row, chosen in enumerate(of_rows) if chosen == name]
        order += rows
        chosen_head = head.original_module
        if name in head.modules_to_save:
            chosen_head = head.modules_to_save[name]
        parts.append(chosen_head(args[0][rows], *args[1:], **kwargs))
    return torch.cat(parts)[torch.tensor(order, device=output.device).argsort()]

"""The layers of BERT's relatives, computed for tokens that stand in one row: what `unpadding.py` puts in the place of a layer's forward.

A layer's own linear modules are called, with whatever stands around or in them (adapters, PEFT's methods, gathering of partitions).
What lies between is computed here, by kernels (`nn/fused.py`) where they are loaded and apply, else by torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adakron.nn import DropoutMasks, Row, fused, native


@dataclass(frozen=True)
class Roles:
    """Names of a layer's modules. The dropouts behind a dense layer may be missing. heads: of the attribute that counts them."""

    query: str
    key: str
    value: str
    weights_dropout: str
    attended: str
    attended_dropout: str | None
    attended_norm: str
    inner: str
    activation: str
    outer: str
    outer_dropout: str | None
    outer_norm: str
    heads: str

    def modules(self) -> list[str]:
        """All of them."""
        return [name for role, name in vars(self).items() if role != "heads" and name is not None]


_BERT = Roles(
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.self.dropout", "attention.output.dense",
    "attention.output.dropout", "attention.output.LayerNorm", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
    "output.dropout", "output.LayerNorm", "attention.self.num_attention_heads",
)  # fmt: skip
_DISTILBERT = Roles(
    "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.dropout", "attention.out_lin", None, "sa_layer_norm", "ffn.lin1",
    "ffn.activation", "ffn.lin2", "ffn.dropout", "output_layer_norm", "attention.n_heads",
)  # fmt: skip
_ALBERT = Roles(
    "attention.query", "attention.key", "attention.value", "attention.attention_dropout", "attention.dense", "attention.output_dropout",
    "attention.LayerNorm", "ffn", "activation", "ffn_output", None, "full_layer_layer_norm", "attention.num_attention_heads",
)  # fmt: skip

ROLES = {
    "bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "camembert": _BERT, "electra": _BERT, "distilbert": _DISTILBERT,
    "albert": _ALBERT,
}  # fmt: skip


def layers_of(stack: nn.Module, model_type: str) -> list[nn.Module]:
    """The modules of a stack that have all parts of a layer of that type, in order."""
    return [module for module in stack.modules() if all(_has(module, name) for name in ROLES[model_type].modules())]


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


class EncoderLayer:
    """One layer. Call `install` once.

    now: the row that tokens stand in, None for a rectangle. narrow: told of the row that they stand in behind the attention, where it
    is another one. masks: of the model's dropout. only_firsts: the layer's output is read at the first token of every text alone, so
    that it computes no others behind the attention.
    """

    def __init__(
        self,
        layer: nn.Module,
        roles: Roles,
        *,
        now: Callable[[], Row | None],
        narrow: Callable[[Row], None],
        masks: DropoutMasks | None,
        only_firsts: bool,
    ):
        self._layer = layer
        self._now = now
        self._narrow = narrow
        self._masks = masks
        self._only_firsts = only_firsts
        self._parts = {role: attrgetter(name) for role, name in vars(roles).items() if name is not None}
        self._joined: _Joined | None = None

    def install(self) -> None:
        """Be what the layer computes."""
        self._layer.forward = self.forward

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(1, N, D) to (1, N, D); what the layer's class says where texts stand in a rectangle."""
        if self._now() is None:
            return type(self._layer).forward(self._layer, hidden, *args, **kwargs)
        if getattr(self._layer, "gradient_checkpointing", False):
            return self._layer._gradient_checkpointing_func(self._compute, hidden)  # type: ignore[operator]
        return self._compute(hidden)

    def _part(self, role: str) -> Any:
        return self._parts[role](self._layer)

    def _compute(self, hidden: Tensor) -> Tensor:
        row = self._now()
        assert row is not None
        firsts = row.firsts if self._only_firsts else None
        read = row if firsts is None else firsts
        attended, hidden = self._attend(hidden, row, read)
        if read is not row:
            self._narrow(read)
        hidden = self._add_norm("attended", self._part("attended")(attended), hidden)
        inner = self._part("activation")(self._part("inner")(hidden))
        return self._add_norm("outer", self._part("outer")(inner), hidden)

    def _attend(self, hidden: Tensor, row: Row, read: Row) -> tuple[Tensor, Tensor]:
        """What attention finds for the tokens of `read`, and these tokens' input."""
        p, heads = _rate(self._part("weights_dropout")), self._part("heads")
        asking = hidden
        if read is not row:
            assert row.texts is not None
            asking = hidden.index_select(1, row.texts[:-1].to(hidden.device))
        parts = self._queries_keys_values(asking, read, hidden, row)
        queries, keys, values = fused.side_by_side(parts)
        scaling = float((queries.shape[-1] // heads) ** -0.5)
        if row.texts is not None and self._fuses(parts, p):
            assert read.texts is not None
            noise = fused.Noise(self._masks.text_keys(), p) if p and self._masks is not None else None
            attended = fused.attention(
                tuple(part[0] for part in parts), fused.Texts(read.texts, row.texts, row.mask_BT.shape[1]), heads, scaling, noise
            )
            return attended.unsqueeze(0), asking

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        queries = by_head(row.put(queries) if read is row else queries.transpose(0, 1))
        found = F.scaled_dot_product_attention(
            queries, by_head(row.put(keys)), by_head(row.put(values)), row.attention_mask, p, scale=scaling
        )
        attended = found.transpose(1, 2).flatten(2)
        return (row.take(attended) if read is row else attended.transpose(0, 1)), asking

    def _queries_keys_values(self, asking: Tensor, read: Row, hidden: Tensor, row: Row) -> tuple[Tensor, ...]:
        """Of `asking` the queries, of `hidden` the rest: one matrix of all, or of keys and values, where one product can make it."""
        query, key, value = (self._part(role) for role in ("query", "key", "value"))
        if not all(map(_is_plain, (query, key, value))):
            self._narrow(read)  # what stands around the queries may drop
            queries = query(asking)
            self._narrow(row)
            return queries, key(hidden), value(hidden)
        if self._joined is None or not self._joined.holds(query, key, value):
            self._joined = _Joined.of(query, key, value)
        weight, bias = self._joined.weight, self._joined.bias
        if asking is hidden:
            return (F.linear(hidden, weight, bias),)
        width = query.out_features
        return F.linear(asking, weight[:width], bias[:width]), F.linear(hidden, weight[width:], bias[width:])

    def _add_norm(self, role: str, branch: Tensor, residual: Tensor) -> Tensor:
        """LayerNorm(dropout(branch) + residual)."""
        dropout = self._part(f"{role}_dropout") if f"{role}_dropout" in self._parts else None
        norm, p = self._part(f"{role}_norm"), _rate(dropout)
        if _is_plain(norm) and self._fuses((branch, residual, norm.weight), p):
            noise = fused.Noise(self._masks.token_keys(), p) if p and self._masks is not None else None
            return fused.add_norm(branch[0], residual[0], norm.weight, norm.bias, norm.eps, noise).unsqueeze(0)
        normed: Tensor = norm((dropout(branch) if dropout is not None else branch) + residual)
        return normed

    def _fuses(self, tensors: Sequence[Tensor], p: float) -> bool:
        """Whether a kernel can compute with these, and drop with probability p."""
        drops = p == 0.0 or (0.0 < p < 1.0 and self._masks is not None and self._masks.is_running)
        return drops and all(native.takes(tensor) and tensor.dtype == tensors[0].dtype for tensor in tensors)


@dataclass(frozen=True)
class _Joined:
    """Three linear layers as one; their parameters are parts of its, so that nothing is held twice."""

    weight: Tensor
    bias: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, *layers: nn.Linear) -> "_Joined":
        joined = cls(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
        for layer, weight, bias in zip(layers, joined.weight.chunk(3), joined.bias.chunk(3), strict=True):
            layer.weight.data, layer.bias.data = weight, bias
        return joined

    def holds(self, *layers: nn.Linear) -> bool:
        """Whether they still are its parts: a model that is moved or cast gets other tensors."""
        return _is_dealt_out(self.weight, [layer.weight for layer in layers]) and _is_dealt_out(self.bias, [layer.bias for layer in layers])


def _is_dealt_out(whole: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether each part is in memory what `chunk` makes of the whole."""
    size = whole.numel() // len(parts) * whole.element_size()
    return all(part.data_ptr() == whole.data_ptr() + i * size for i, part in enumerate(parts))


def _rate(dropout: nn.Dropout | None) -> float:
    return dropout.p if dropout is not None and dropout.training else 0.0


def _is_plain(module: Any) -> bool:
    """Whether a module is what its class says and nothing watches it: then its weights may be used in its place."""
    if type(module) not in (nn.Linear, nn.LayerNorm) or "forward" in vars(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    parameters = list(module._parameters.values())
    return all(one is not None and not one.requires_grad and one.numel() for one in parameters)

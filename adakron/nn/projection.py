"""An affine map, or several of one shape (the experts of a mixture) kept as stacked parameters.

Tensor-name suffixes: E experts, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ScoreInit = Literal["zeros", "random"]


class _Average(NamedTuple):
    """An average and what it was computed from: traces to compare, and memory, held so that no other tensor can get its address."""

    traces: tuple[tuple[int, torch.dtype, torch.device, int], ...]
    memory: tuple[Tensor, ...]
    weight_OI: Tensor
    bias_O: Tensor


class Projection(nn.Module):
    """y = W x + b over the last dimension; with several experts, one W and b of each.

    in_features, out_features: widths. num_experts: E.
    scores: initial expert scores, "zeros" (the average is the mean) or "random" (uniform in [0, 1)). tune_scores: they train.

    Parameters: weight (O, I) and bias (O,), or weight (E, O, I) and bias (E, O) with several experts, and then expert_scores
    (E,), a parameter where it trains and a buffer where it does not. Values are set by `reset_parameters`.
    """

    expert_scores: Tensor | nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_experts: int = 1,
        scores: ScoreInit = "zeros",
        tune_scores: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.num_experts = in_features, out_features, num_experts
        self.scores = scores
        stack = (num_experts,) if num_experts > 1 else ()
        self.weight = nn.Parameter(torch.empty(*stack, out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*stack, out_features, device=device, dtype=dtype))
        self.tunes_scores = tune_scores and num_experts > 1
        if num_experts > 1:
            values = torch.zeros(num_experts, device=device, dtype=dtype)
            if tune_scores:
                self.expert_scores = nn.Parameter(values)
            else:
                self.register_buffer("expert_scores", values)
        self._average: _Average | None = None

    @torch.no_grad()
    def reset_parameters(self, std: float, generator: torch.Generator | None = None) -> None:
        """Every weight N(0, std), every bias 0, every expert by itself; scores as `scores` says.

        Drawn in float32 on the CPU from a generator there: the same for every device, and up to rounding for every dtype.
        """
        self.weight.copy_(torch.empty(self.weight.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator))
        self.bias.zero_()
        if self.num_experts > 1:
            self.expert_scores.zero_()
            if self.scores == "random":
                self.expert_scores.copy_(torch.rand(self.num_experts, dtype=torch.float32, device="cpu", generator=generator))

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) of one expert."""
        return (self.weight, self.bias) if self.num_experts == 1 else (self.weight[index], self.bias[index])

    def average(self) -> tuple[Tensor, Tensor]:
        """Weight (O, I) and bias (O,) averaged over the experts with softmax(expert_scores); the map itself for one expert.

        Without a gradient to keep, the average is computed once and kept until a tensor is replaced or changed in place, or `train`
        or `eval` is called. What leaves no trace is not seen: a write through `weight.data` (`weight.data.copy_`), to a tensor made
        in inference mode, or, under ZeRO stage 3, to a partition; call `eval` after it, which discards the average.
        """
        if self.num_experts == 1:
            return self.weight, self.bias
        parts = (self.weight, self.bias, self.expert_scores)
        if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
            return self._averaged()
        traces = tuple(map(_trace, parts))
        if self._average is None or self._average.traces != traces:
            memory = tuple(part.detach() for part in parts if not hasattr(part, "ds_id"))
            # Ordinary tensors, also under inference_mode: a later caller may want gradients of its input.
            with torch.inference_mode(False), torch.no_grad():
                self._average = _Average(traces, memory, *self._averaged())
        return self._average.weight_OI, self._average.bias_O

    def _averaged(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        share_E = torch.softmax(self.expert_scores.to(wide), dim=0)
        weight_OI = torch.einsum("e,eoi->oi", share_E, self.weight.to(wide))
        bias_O = share_E @ self.bias.to(wide)
        return weight_OI.to(self.weight.dtype), bias_O.to(self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), by the average of the experts."""
        return F.linear(x, *self.average())

    def chosen(self, x: Tensor, experts: Tensor) -> Tensor:
        """(..., I) -> (..., O), each input by the expert that experts, int64 of x's leading shape, names. Computes all of them."""
        outputs = F.linear(x, self.weight.flatten(0, 1), self.bias.flatten()).unflatten(-1, (self.num_experts, self.out_features))
        index = experts[..., None, None].expand(*experts.shape, 1, self.out_features)
        return outputs.gather(-2, index).squeeze(-2)

    def train(self, mode: bool = True) -> "Projection":
        """Forget the average: training follows, or parameters that changed without a trace (ZeRO writes to their storage)."""
        self._average = None
        return super().train(mode)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._average = None
        super()._load_from_state_dict(*arguments, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._average = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Widths and experts, for `print(model)`."""
        experts = f", num_experts={self.num_experts}, scores={'tuned' if self.tunes_scores else self.scores}"
        return f"{self.in_features} -> {self.out_features}" + (experts if self.num_experts > 1 else "")


def _trace(part: Tensor) -> tuple[int, torch.dtype, torch.device, int]:
    """What tells a replaced or changed tensor from the one before, without its values and without waiting for a device."""
    # ZeRO stage 3 numbers its parameters, and gathers one to another place for every pass: there its address says nothing.
    zero_id: int | None = getattr(part, "ds_id", None)
    place = part.data_ptr() if zero_id is None else zero_id
    return place, part.dtype, part.device, 0 if part.is_inference() else part._version

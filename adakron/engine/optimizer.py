"""The optimizer that DeepSpeed wraps: its parameter groups, AdamW that clips at stage 0, the learning rate's schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from adakron.config import TrainingConfig
from adakron.errors import ConfigError


def schedule_factor(kind: str, step: int, warmup: int, total: int) -> float:
    """Learning rate of a step relative to its peak; step counts from 0.

    A linear rise over the first `warmup` steps (the first step's rate is then 0, as in transformers' schedules), then
    constant, linear to 0 at `total`, or half a cosine to 0 at `total`.
    """
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def warmup_steps(training: TrainingConfig, total: int) -> int:
    """Warm-up in steps: warmup_steps where positive, else warmup_ratio of all steps, rounded up as transformers does."""
    return training.warmup_steps if training.warmup_steps > 0 else math.ceil(total * training.warmup_ratio)


class ClippingAdamW(AdamW):
    """What DeepSpeed's optimizers do at the other stages and not at stage 0: report the gradient's norm, clip, and skip a step
    whose gradient is not finite.

    limit: of the global L2 norm; 0 never clips. norm: of the last step's gradient, before clipping. overflow: whether the last
    step was skipped; DeepSpeed's engine looks for this name.
    """

    limit: float = 0.0
    norm: Tensor | None = None
    overflow: bool = False

    def step(self, closure: Any = None) -> Any:
        """Gradients are reduced by now, so every rank decides alike."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.norm = nn.utils.get_total_norm(gradients)
        # The host waits for the norm, as in DeepSpeed's own stages: a poisoned update cannot be taken back.
        self.overflow = not bool(torch.isfinite(self.norm))
        if self.overflow:
            return None
        nn.utils.clip_grads_with_norm_([p for group in self.param_groups for p in group["params"]], self.limit or math.inf, self.norm)
        return super().step(closure)


def check_groups(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """ConfigError unless the groups hold exactly the parameters that require gradients, each once."""
    given = [id(p) for group in groups for p in group["params"]]
    training = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if not training:
        raise ConfigError("nothing trains: no parameter of the model requires a gradient; adapt the model before building the engine")
    if len(given) != len(set(given)) or set(given) != set(training):
        missing = [name for key, name in training.items() if key not in set(given)]
        raise ConfigError(
            f"the optimizer's groups must hold exactly the trainable parameters, each once; got {len(given)} for {len(training)}, "
            f"missing {missing[:5]}"
        )

"""The training engine: `deepspeed.initialize` around a model of which a known few parameters train.

It knows no task, no data and no adapter: it takes parameter groups, sums of losses and target counts. The gradient of a
global step is that of (sum of the losses of its valid targets) / (their global count), whatever the micro-batch, the
accumulation and the number of ranks: each backward is scaled by world_size / global_targets, because DeepSpeed averages
gradients over ranks, and DeepSpeed's own division by the accumulation steps is switched off.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from adakron import distributed, weights
from adakron.config import TrainingConfig
from adakron.engine.ds_config import DeepSpeedSettings
from adakron.engine.optimizer import ClippingAdamW, check_groups, schedule_factor, warmup_steps
from adakron.engine.partitioning import ready_for_stage_3
from adakron.engine.rehearsal import SPARE_BYTES, alone, step_bytes
from adakron.engine.state import (
    KINDS,
    EngineState,
    LossScaleState,
    check_fits,
    fragments,
    gather,
    ready_to_load,
    refresh_parameters,
    scatter,
)
from adakron.engine.upstream import quiet_initialisation, ready_deepspeed
from adakron.errors import NumericalError

MOST_SKIPS_IN_A_ROW = 40
"""fp16's dynamic loss scale starts at 2^16 or above and halves at each overflow: healthy runs skip far fewer steps in a row."""


class TrainingEngine:
    """Forward, backward and step of the trainable parameters under ZeRO.

    model: all of it on the host or device; parameters that do not require gradients stay as they are.
    groups: the optimizer's parameter groups; together exactly the parameters that require gradients (ConfigError else).
    total_steps: length of the schedule, in optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        settings: DeepSpeedSettings,
        training: TrainingConfig,
        *,
        total_steps: int,
        device: torch.device,
    ):
        check_groups(model, groups)
        self.settings = settings
        self.device = device
        self.global_step = 0
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._world_size = distributed.world_size()
        ready_deepspeed(device)
        if settings.stage == 3:
            ready_for_stage_3(model, weights.DTYPES[settings.precision], device)
        kind_of_optimizer = ClippingAdamW if settings.stage == 0 else AdamW
        optimizer = kind_of_optimizer(
            [dict(group) for group in groups],
            lr=training.learning_rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_epsilon,
            weight_decay=training.weight_decay,
        )
        if isinstance(optimizer, ClippingAdamW):
            optimizer.limit = training.max_grad_norm
        self._stage0 = optimizer if isinstance(optimizer, ClippingAdamW) else None
        warmup = warmup_steps(training, total_steps)
        kind = training.lr_scheduler_type
        scheduler = LambdaLR(optimizer, lambda step: schedule_factor(kind, step, warmup, total_steps))
        with quiet_initialisation():
            self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings.config)
        clipping = f"clip below --max_grad_norm {training.max_grad_norm:g}" if training.max_grad_norm else "clip with --max_grad_norm 1"
        self.advice = f"lower --learning_rate, or {clipping}"
        """What to do against numbers that grow without bounds."""
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._named = {name: p for name, p in self._engine.module.named_parameters() if p.requires_grad}

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return self.settings.precision

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next step."""
        return float(self._engine.get_lr()[0])

    @property
    def grad_norm(self) -> Tensor | float | None:
        """Global L2 norm of the last step's gradient before clipping; None before the first step."""
        return self._stage0.norm if self._stage0 is not None else self._engine.get_global_grad_norm()

    @property
    def loss_scale(self) -> float:
        """The fp16 scaler's factor; 1 in other precisions."""
        return float(self._engine.optimizer.loss_scale) if self.precision == "fp16" else 1.0

    def __call__(self, **inputs: Tensor) -> Any:
        """The model's output, of a pass that `backward` follows or that needs no gradient.

        For passes whose gradients must not reach the optimizer see `without_accumulating`.
        """
        return self._engine(**inputs)

    def train(self) -> None:
        """Dropout on."""
        self._engine.train()

    def eval(self) -> None:
        """Dropout off."""
        self._engine.eval()

    def backward(self, loss_sum: Tensor, global_targets: int) -> None:
        """Add one micro-batch's gradient. loss_sum: scalar, the sum over this rank's valid targets in this micro-batch.
        global_targets: valid targets of the whole step on all ranks.

        A loss that is not finite makes its gradient NaN, also where that would be finite (an infinite constant): the gradient's
        norm, which all ranks learn anyway, then tells them all, and no rank has to ask or to wait for the device.
        """
        factor = self._world_size / max(1, global_targets)
        healthy = torch.isfinite(loss_sum.detach())
        self._engine.backward(loss_sum * torch.where(healthy, factor, math.nan), scale_wrt_gas=False)

    def gradient_of(self, loss_sum: Tensor, global_targets: int) -> dict[str, Tensor]:
        """What `backward` would add, by parameter name, whole and in fp32, of this rank alone; nothing is accumulated.

        Only inside `without_accumulating`, all ranks together, or `rehearsing`. See `backward` for the arguments.
        """
        # Autograd hands these gradients out, so the hooks that give them to DeepSpeed never run.
        scale = self.loss_scale
        parts = torch.autograd.grad(
            loss_sum * (self._world_size * scale / max(1, global_targets)), list(self._named.values()), allow_unused=True
        )
        return {
            name: torch.zeros((), device=self.device) if part is None else part.float() / scale
            for name, part in zip(self._named, parts, strict=True)
        }

    @contextlib.contextmanager
    def without_accumulating(self) -> Iterator[nn.Module]:
        """What to call in the engine's place for passes whose gradients `gradient_of` hands out and the optimizer never sees.

        It is the bare module, whose own hooks gather its weights at ZeRO-3; DeepSpeed's call would expect a backward pass to follow.
        """
        try:
            yield self._engine.module
        finally:
            if self.settings.stage == 3:
                # As behind a backward pass of its own: the next forward pass starts a new walk through the partitioned modules.
                self._engine.optimizer._get_param_coordinator().reset_step()

    @contextlib.contextmanager
    def rehearsing(self) -> Iterator[nn.Module]:
        """As `without_accumulating`, for passes that this rank makes by itself and that may run out of memory. They need as much of it
        as those of a step, and what a step needs besides them is held meanwhile. At ZeRO-3 their numbers mean nothing.
        """
        trained = sum(shape.numel() for shape in self._shapes().values())
        size = SPARE_BYTES + step_bytes(trained, self.settings, self._world_size)
        held = torch.empty(size, dtype=torch.uint8, device=self.device)
        with alone(self._engine.module, self._engine.optimizer, self.settings.stage):
            yield self._engine.module
        del held

    def step(self, *, again: bool = False) -> bool:
        """Reduce, clip, update, advance the schedule. False, on all ranks, where the gradient is not finite: the step was then
        skipped, and parameters, optimizer and schedule are as before.

        again: the gradient is that of a step that was skipped and counted already.
        Raises NumericalError where steps are skipped again and again.
        """
        try:
            self._engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise self._diverged("the fp16 loss scale fell to its minimum") from error
        applied = bool(self._engine.was_step_applied())
        if applied:
            self.global_step += 1
            self._skipped_in_a_row = 0
        elif not again:
            self.skipped_steps += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row >= MOST_SKIPS_IN_A_ROW:
                raise self._diverged(f"{MOST_SKIPS_IN_A_ROW} steps in a row had gradients that are not finite")
        return applied

    def _diverged(self, what: str) -> NumericalError:
        return NumericalError(f"{what} after step {self.global_step}: training diverged; {self.advice}")

    def trainable_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What trains, by name, in the model's order; at stage 3 a parameter is whole only inside a forward or backward pass."""
        return self._named.items()

    def trainable_tensors(self) -> dict[str, Tensor]:
        """What trains, whole and in fp32 on the host, by parameter name. All ranks must call it together."""
        return self._gather(("master",))[0]["master"]

    def state(self) -> EngineState:
        """All that training needs to go on, whole and on the host; equal on all ranks, which must call it together."""
        tensors, steps = self._gather(KINDS)
        scale = None
        if self.precision == "fp16":
            scaler = self._engine.optimizer.loss_scaler
            # A static scaler has no counters.
            counters = (getattr(scaler, name, 0) for name in ("cur_iter", "last_overflow_iter", "cur_hysteresis"))
            scale = LossScaleState(float(scaler.cur_scale), *map(int, counters))
        return EngineState(tensors, steps, self.global_step, self.skipped_steps, self._skipped_in_a_row, scale)

    def _gather(self, kinds: Sequence[str]) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
        stage = self.settings.stage
        owned = fragments(self._engine.optimizer, stage, self._named)
        return gather(owned, self._optimizer, self._shapes(), self.device, replicated=stage == 0, kinds=kinds)

    def load_state(self, state: EngineState) -> None:
        """Go on from a state that any stage, precision and number of ranks saved. All ranks together, between steps.

        Raises CheckpointError where it is not a state of these parameters.
        """
        check_fits(state, self._shapes())
        zero, stage = self._engine.optimizer, self.settings.stage
        flats = ready_to_load(zero, stage, self._optimizer)
        scatter(state, fragments(zero, stage, self._named), flats, self._optimizer)
        refresh_parameters(zero, stage)
        if self.precision == "fp16" and state.loss_scale is not None and zero.loss_scaler.dynamic:
            scaler, saved = zero.loss_scaler, state.loss_scale
            scaler.cur_scale, scaler.cur_iter = saved.scale, saved.iteration
            scaler.last_overflow_iter, scaler.cur_hysteresis = saved.last_overflow, saved.hysteresis
        self.global_step, self.skipped_steps, self._skipped_in_a_row = state.global_step, state.skipped_steps, state.skipped_in_a_row
        self._engine.global_steps = state.global_step + state.skipped_steps
        self._move_schedule(state.global_step)

    def _move_schedule(self, step: int) -> None:
        scheduler = self._scheduler
        scheduler.last_epoch = step
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: torch.Size(weights.shape(parameter)) for name, parameter in self._named.items()}

    def load_for_evaluation(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the trainable parameters in the model, not in the optimizer: no training step may follow."""
        for name, parameter in self._named.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.settings.stage == 3), torch.no_grad():
                # At stage 3 the whole parameter is gathered here, and rank 0's copy is what all ranks have afterwards.
                if parameter.numel():
                    parameter.copy_(tensors[name].to(parameter.device, parameter.dtype))

"""The state of training, whole and by parameter name, whatever the ZeRO stage, the precision and the number of ranks.

ZeRO keeps fp32 masters and Adam's moments in flat tensors of which every rank owns a part: stages 1 and 2 flatten an optimizer
group and cut it, stage 3 cuts every parameter. `fragments` says which part of which parameter lies where; gathering and
loading know nothing else of the layout. DeepSpeed's own `safe_set_full_*` fail at stage 3 where a parameter's size is not
divisible by the number of ranks (0.19.8), and its checkpoints hold the layout itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from adakron import distributed
from adakron.errors import CheckpointError

KINDS = ("master", "exp_avg", "exp_avg_sq")
"""What is kept of every parameter, each of its shape in fp32: the weights that the optimizer updates, Adam's two moments."""

_BUCKET = 4_000_000
"""Elements that are gathered at once: bounds the memory that a snapshot takes on the device."""


@dataclass(frozen=True)
class LossScaleState:
    """The fp16 scaler: its factor, steps taken, the step of the last overflow, overflows it still waits for before it shrinks."""

    scale: float
    iteration: int
    last_overflow: int
    hysteresis: int


@dataclass(frozen=True)
class EngineState:
    """What a training engine needs to go on, on the host.

    tensors: by kind (`KINDS`) and parameter name, whole, fp32. steps: updates that each parameter has had.
    global_step: optimizer steps done, which is also the position in the schedule. skipped_steps: steps skipped for an overflow in
    all, skipped_in_a_row: since the last one applied. loss_scale: None unless in fp16.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    steps: Mapping[str, int]
    global_step: int
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: LossScaleState | None = None


@dataclass(frozen=True)
class Fragment:
    """Where this rank keeps a part of a parameter.

    flat: the optimizer's tensor. offset: of the part in it; start: of the part in the parameter; both in elements.
    """

    name: str
    flat: Tensor
    offset: int
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part, as a view of a tensor shaped like `flat`."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def fragments(zero: Any, stage: int, named: Mapping[str, Any]) -> list[Fragment]:
    """The parts that this rank owns of the trainable parameters, by name. zero: DeepSpeed's optimizer."""
    if stage == 0:
        return [Fragment(name, parameter, 0, 0, parameter.numel()) for name, parameter in named.items()]
    found = []
    for name, parameter in named.items():
        if stage == 3:
            group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = zero._get_param_partition_rank(parameter) * numel
            # The last ranks' partitions are padded, and where a parameter has few elements some hold nothing else.
            numel = min(numel, parameter.ds_numel - start)
            if numel > 0:
                found.append(Fragment(name, zero.fp32_partitioned_groups_flat[group], offset, start, numel))
        elif parameter._hp_mapping is not None:
            mapping = parameter._hp_mapping
            flat = zero.optimizer.param_groups[mapping.param_group_index]["params"][0]
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            found.append(Fragment(name, flat, here.start, there.start, here.numel))
    return found


def gather(
    owned: Sequence[Fragment],
    optimizer: AdamW,
    shapes: Mapping[str, torch.Size],
    device: torch.device,
    *,
    replicated: bool,
    kinds: Sequence[str] = KINDS,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, int]]:
    """(tensors, steps) as `EngineState` has them, of some kinds. All ranks together. replicated: every rank owns everything."""
    by_name = {fragment.name: fragment for fragment in owned}
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    steps: dict[str, int] = {}
    for names in _buckets(shapes):
        sizes = [shapes[name].numel() for name in names]
        whole = torch.zeros(len(kinds) * sum(sizes) + len(names), dtype=torch.float32, device=device)
        *parts, counts = whole.split([*sizes * len(kinds), len(names)])
        for (kind, name), part in zip(((kind, name) for kind in kinds for name in names), parts, strict=True):
            if name in by_name:
                fragment = by_name[name]
                source = _kept(fragment.flat, kind, optimizer)
                if source is not None:
                    part[fragment.start : fragment.start + fragment.numel].copy_(fragment.of(source))
        for index, name in enumerate(names):
            if name in by_name and by_name[name].start == 0:
                counts[index] = float(optimizer.state.get(by_name[name].flat, {}).get("step", 0.0))
        if not replicated:
            # As integers: every element has one owner and zeros elsewhere, so the sum keeps each bit, the sign of a zero too.
            distributed.all_reduce_sum(whole.view(torch.int32))
        for (kind, name), part in zip(((kind, name) for kind in kinds for name in names), parts, strict=True):
            tensors[kind][name] = part.to("cpu", copy=True).view(shapes[name])
        steps |= {name: int(count) for name, count in zip(names, counts.tolist(), strict=True)}
    return tensors, steps


def scatter(state: EngineState, owned: Sequence[Fragment], flats: Sequence[Tensor], optimizer: AdamW) -> None:
    """Put a state's values into the parts that this rank owns; padding becomes zero, as it is in a fresh optimizer.

    flats: all tensors of the optimizer. The model's own copies are not refreshed.
    """
    counts = set(state.steps.values())
    if len(counts) > 1:
        raise CheckpointError(f"the parameters had different numbers of updates ({sorted(counts)}); a state has one for all")
    step = torch.tensor(float(counts.pop()), dtype=torch.float32)
    optimizer.state.clear()
    if step:
        for flat in flats:
            moments = {kind: torch.zeros_like(flat, memory_format=torch.preserve_format) for kind in KINDS[1:]}
            optimizer.state[flat] = {"step": step.clone(), **moments}
    for fragment in owned:
        for kind in KINDS if step else KINDS[:1]:
            target = fragment.flat if kind == "master" else optimizer.state[fragment.flat][kind]
            source = state.tensors[kind][fragment.name].reshape(-1)[fragment.start : fragment.start + fragment.numel]
            fragment.of(target).copy_(source)


def ready_to_load(zero: Any, stage: int, optimizer: AdamW) -> list[Tensor]:
    """All tensors that the optimizer updates, ready for a state to be loaded into them. zero: DeepSpeed's optimizer."""
    if stage == 3:
        # Small parameters lie whole on every rank: they are taken apart, so that what is gathered later is what was loaded.
        zero._partition_all_parameters()
        return list(zero.fp32_partitioned_groups_flat)
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def refresh_parameters(zero: Any, stage: int) -> None:
    """Make the model's own parameters those that the optimizer holds. zero: DeepSpeed's optimizer."""
    if stage == 3:
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())
    elif stage:
        zero.update_lp_params()


def check_fits(state: EngineState, shapes: Mapping[str, torch.Size]) -> None:
    """Raise CheckpointError unless the state holds exactly these parameters."""
    problems = []
    for kind in KINDS:
        saved = state.tensors[kind]
        problems += [f"{kind} of {name} is missing" for name in shapes if name not in saved]
        problems += [f"{kind} of {name} belongs to no parameter that trains here" for name in saved if name not in shapes]
        problems += [
            f"{kind} of {name} is {tuple(saved[name].shape)}, the parameter {tuple(shape)}"
            for name, shape in shapes.items()
            if name in saved and saved[name].shape != shape
        ]
    if problems or state.steps.keys() != shapes.keys():
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"the saved state does not fit what trains here: {shown or 'its numbers of updates name other parameters'}")


def _kept(flat: Tensor, kind: str, optimizer: AdamW) -> Tensor | None:
    # The moments do not exist before the first step; they then are zero.
    return flat if kind == "master" else optimizer.state.get(flat, {}).get(kind)


def _buckets(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    names: list[str] = []
    elements = 0
    for name, shape in shapes.items():
        if names and elements + shape.numel() > _BUCKET:
            yield names
            names, elements = [], 0
        names.append(name)
        elements += shape.numel()
    if names:
        yield names

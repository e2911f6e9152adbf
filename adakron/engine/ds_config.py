"""The DeepSpeed JSON: read, checked, its "auto" values filled in, everything DeepSpeed would decide silently written out.

DeepSpeed 0.19.8 ignores unknown top-level keys, resolves no "auto", clips at 1.0 unless told otherwise, and accumulates and
reduces bf16 gradients in bf16. All problems of a file are reported together, before any process group exists.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adakron import untrusted
from adakron.engine.upstream import quiet_initialisation
from adakron.errors import ConfigError
from adakron.untrusted import UnreadableError

Precision = Literal["fp32", "bf16", "fp16"]

_LONGEST_FILE = 2**20  # bytes

_PASSED_ON = {
    "activation_checkpointing", "aio", "bf16", "checkpoint", "comms_logger", "communication_data_type", "data_types",
    "disable_allgather", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients", "steps_per_print", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization", "managed_gradient_accumulation",
}  # fmt: skip

_REFUSED = {
    "optimizer": "the optimizer is set by flags (--learning_rate, --weight_decay, --adam_beta1, ...); remove the section",
    "scheduler": "the schedule is set by flags (--lr_scheduler_type, --warmup_ratio, ...); remove the section",
    "tensorboard": "metrics go to <output_dir>/tensorboard (--logging_dir); remove the section",
    "csv_monitor": "metrics go to <output_dir>/metrics.jsonl; remove the section",
    "wandb": "metrics go to <output_dir>/tensorboard and metrics.jsonl; remove the section",
    "torch_autocast": 'the whole model runs in one precision; use "bf16" or "fp16" (fp16 autocast with ZeRO clips scaled gradients)',
    "amp": 'DeepSpeed removed it; use "bf16" or "fp16"',
    "elasticity": "DeepSpeed removed it; remove the section",
    "sparse_gradients": "DeepSpeed removed it; remove it",
    "compression_training": "DeepSpeed removed it; remove the section",
    "curriculum_learning": "the data order is ours; remove the section",
    "data_efficiency": "the data order is ours; remove the section",
    "gradient_allreduce_op": "the loss of a step is already divided by its global target count; remove it",
}


@dataclass(frozen=True, kw_only=True)
class RunValues:
    """What the flags and the launcher already decided; a JSON may say "auto" or the same.

    micro_batch: examples per forward pass and rank. accumulation: micro-batches per step and rank. examples: per step, where their
    number is given and not micro_batch x accumulation x world_size.
    """

    micro_batch: int
    accumulation: int
    world_size: int
    max_grad_norm: float
    bf16: bool | None = None
    fp16: bool | None = None
    examples: int | None = None

    @property
    def global_batch(self) -> int:
        """Examples per optimizer step."""
        return self.examples or self.micro_batch * self.accumulation * self.world_size


@dataclass(frozen=True)
class DeepSpeedSettings:
    """The resolved JSON: `config` goes to `deepspeed.initialize` as it is."""

    config: dict[str, Any]
    stage: int
    precision: Precision


def read_json(path: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError where there is none."""
    try:
        content = untrusted.read_json(path, _LONGEST_FILE)
    except FileNotFoundError:
        raise ConfigError(
            f"--deepspeed {path}: no such file; the project's own are ds_configs/*.json, e.g. ds_configs/zero2.json"
        ) from None
    except UnreadableError as error:
        raise ConfigError(f"--deepspeed {path}: not a JSON file ({error}); compare ds_configs/zero2.json") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--deepspeed {path}: holds a {type(content).__name__}, not an object; compare ds_configs/zero2.json")
    return content


def resolve(source: dict[str, Any], values: RunValues, *, name: str = "the DeepSpeed JSON") -> DeepSpeedSettings:
    """Fill in "auto", check everything against the run, and write out what DeepSpeed would otherwise decide.

    Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    for key in source:
        if key in _REFUSED:
            problems.append(f'"{key}": {_REFUSED[key]}')
        elif key not in _PASSED_ON:
            problems.append(f'"{key}" is not a key that DeepSpeed and this engine know; check its spelling (compare ds_configs/zero2.json)')
    config: dict[str, Any] = {key: value for key, value in source.items() if key in _PASSED_ON}
    for key in ("bf16", "fp16", "zero_optimization", "data_types", "checkpoint", "aio"):
        if not isinstance(config.get(key, {}), dict):
            problems.append(f'"{key}" is {config[key]!r}; it must be an object (compare ds_configs/zero2.json)')
            config[key] = {}

    _agree(config, "train_micro_batch_size_per_gpu", values.micro_batch, "--per_device_train_batch_size", problems)
    given = "--global_batch_size" if values.examples else None
    _agree(config, "gradient_accumulation_steps", values.accumulation, given or "--gradient_accumulation_steps", problems)
    _agree(config, "train_batch_size", values.global_batch, given or "micro-batch x accumulation x processes", problems)
    # DeepSpeed insists on the product. Only its own timers count with it: the gradient is divided by the step's own count of targets.
    config["train_batch_size"] = values.micro_batch * values.accumulation * values.world_size
    _agree(config, "gradient_clipping", float(values.max_grad_norm), "--max_grad_norm", problems)
    precision = _precision(config, values, problems)
    stage = _stage(config, problems)
    _check_combination(config, stage, precision, problems)
    _check_scalars(config, problems)
    if problems:
        raise ConfigError([f"{name}: {problem}" for problem in problems])
    _write_out(config, stage, precision)
    return DeepSpeedSettings(config=config, stage=stage, precision=precision)


def _agree(config: dict[str, Any], key: str, value: float, origin: str, problems: list[str]) -> None:
    got = config.get(key, "auto")
    if got != "auto" and (isinstance(got, bool) or got != value):
        problems.append(f'"{key}" is {got!r}, but {origin} gives {value}; set it to "auto" or make them agree')
    config[key] = value


def _precision(config: dict[str, Any], values: RunValues, problems: list[str]) -> Precision:
    enabled: dict[str, bool] = {}
    for name, asked in (("bf16", values.bf16), ("fp16", values.fp16)):
        section = dict(config.get(name, {}))
        got = section.get("enabled", False)
        if got == "auto":
            got = bool(asked)
        elif not isinstance(got, bool):
            problems.append(f'"{name}.enabled" is {got!r}; it must be true, false or "auto"')
            got = False
        elif asked is not None and got != asked:
            problems.append(
                f'"{name}.enabled" is {str(got).lower()}, but the flag --{name} says {asked}; set it to "auto" or drop the flag'
            )
        enabled[name] = got
        config[name] = section | {"enabled": got}
    if enabled["bf16"] and enabled["fp16"]:
        problems.append('"bf16" and "fp16" are both enabled; enable one')
    if enabled["bf16"]:
        return "bf16"
    return "fp16" if enabled["fp16"] else "fp32"


def _stage(config: dict[str, Any], problems: list[str]) -> int:
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f'"zero_optimization.stage" is {stage!r}; it must be 0, 1, 2 or 3')
        return 0
    return int(stage)


def _check_scalars(config: dict[str, Any], problems: list[str]) -> None:
    # DeepSpeed looks at these only when it uses them.
    for key in ("steps_per_print", "gradient_predivide_factor"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            problems.append(f'"{key}" is {value!r}; it must be a positive number')
    dtypes = ("fp32", "fp16", "bf16")
    for place, key in ((config, "communication_data_type"), (config.get("data_types", {}), "grad_accum_dtype")):
        if place.get(key) is not None and place[key] not in dtypes:
            problems.append(f'"{key}" is {place[key]!r}; it must be one of {", ".join(dtypes)}')
    for key, value in config["zero_optimization"].items():
        least = 0 if key == "stage3_prefetch_bucket_size" else 1  # 0: nothing is fetched ahead
        if key.endswith("bucket_size") and (isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 2**40):
            problems.append(f'"zero_optimization.{key}" is {value!r}; it must be a number of elements, from {least} to 2^40')


_ROUNDED = "weights or gradients are rounded to 8 bits on their way between ranks, so numbers depend on how many there are"
_REFUSED_OF_ZERO = {
    "zenflow": "its optimizer keeps states that checkpoints here cannot hold",
    "round_robin_gradients": "it changes which rank keeps what, and results and checkpoints, which go by parameter name, would be mixed up",
    "zero_quantized_weights": _ROUNDED,
    "zero_quantized_gradients": _ROUNDED,
    "zero_quantized_nontrainable_weights": _ROUNDED,
}


def _check_combination(config: dict[str, Any], stage: int, precision: Precision, problems: list[str]) -> None:
    if stage == 0 and precision != "fp32":
        problems.append(
            f"{precision} at ZeRO stage 0 trains wrongly in DeepSpeed 0.19.8 (an optimizer step at start in bf16, an unscaled loss "
            'in fp16); set "zero_optimization.stage" to 1 or 2, or use fp32'
        )
    if config.get("checkpoint", {}).get("writer"):
        problems.append('"checkpoint.writer": what such a writer saves cannot be loaded again in DeepSpeed 0.19.8; remove it')
    if config["bf16"].get("check_grad_overflow") is False:
        problems.append('"bf16.check_grad_overflow" is false: a gradient that is not finite would be applied; remove it')
    if config["zero_optimization"].get("compute_grad_norm") is False:
        problems.append('"zero_optimization.compute_grad_norm" is false: a gradient that is not finite would be applied; remove it')
    if config.get("prescale_gradients"):
        problems.append('"prescale_gradients" is set: the engine divides by the targets of the global batch already; remove it')
    for key, reason in _REFUSED_OF_ZERO.items():
        if config["zero_optimization"].get(key, False) is not False:
            problems.append(f'"zero_optimization.{key}": {reason}; remove it')
    gathered = config["zero_optimization"].get("allgather_bucket_size", 0)
    if isinstance(gathered, int) and gathered % 2:
        problems.append(f'"zero_optimization.allgather_bucket_size" is {gathered}; DeepSpeed wants an even number')
    optimizer = config["zero_optimization"].get("offload_optimizer")
    if isinstance(optimizer, dict) and optimizer.get("ratio", 1) != 1:
        problems.append(
            f'"zero_optimization.offload_optimizer.ratio" is {optimizer["ratio"]!r}: parts go with an optimizer of DeepSpeed\'s own, whose'
            " states checkpoints here cannot hold; set it to 1"
        )
    if isinstance(optimizer, dict) and optimizer.get("device") == "nvme":
        problems.append(
            '"zero_optimization.offload_optimizer.device" is "nvme": DeepSpeed 0.19.8 keeps such states out of reach of checkpoints, and'
            ' adapters have few; set it to "cpu"'
        )
    for key, devices in (("offload_optimizer", ("none", "cpu")), ("offload_param", ("none", "cpu", "nvme"))):
        section = config["zero_optimization"].get(key)
        device = section.get("device", "none") if isinstance(section, dict) else "none"
        if device not in (*devices, "nvme"):  # of optimizer states on NVMe see above
            problems.append(f'"zero_optimization.{key}.device" is {device!r}; it must be one of {", ".join(devices)}')


def _write_out(config: dict[str, Any], stage: int, precision: Precision) -> None:
    # Every rank reports one backward per micro-batch and one step per global batch: the last batch of an epoch may be short.
    config["managed_gradient_accumulation"] = False
    config["zero_allow_untested_optimizer"] = True
    # torch's AdamW also where the optimizer is offloaded: DeepSpeed's own needs a compiler and minutes at first use.
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 10**9)
    if stage == 0:
        # The engine clips by itself at stage 0, where DeepSpeed reports no gradient norm.
        config["gradient_clipping"] = 0.0
    else:
        zero = config["zero_optimization"]
        # DeepSpeed's 5e8 elements allocate gigabytes for gradients of a few hundred thousand parameters.
        zero.setdefault("reduce_bucket_size", 5_000_000)
        if stage < 3:
            zero.setdefault("allgather_bucket_size", 5_000_000)
        zero.setdefault("overlap_comm", False)
    if precision == "bf16":
        # Stage 2 alone would apply a gradient that is not finite. What follows a skipped step is the loop's decision.
        config["bf16"] = config["bf16"] | {"check_grad_overflow": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"} | config.get("data_types", {})
        config.setdefault("communication_data_type", "fp32")


def parser_problem(config: dict[str, Any]) -> str | None:
    """What DeepSpeed's own parser has against a resolved configuration, on one line; None where it accepts it."""
    from deepspeed import DeepSpeedConfig

    # Outside a process group DeepSpeed takes the world size to be 1: the product over ranks was checked by `resolve`.
    alone = {key: copy.deepcopy(value) for key, value in config.items() if key != "train_batch_size"}
    try:
        with quiet_initialisation():
            DeepSpeedConfig(alone)
    except Exception as error:  # pydantic's, assertions, type errors: whatever a section's parser raises
        return " ".join(str(error).split()) or type(error).__name__
    return None


def device_problem(precision: Precision, device_type: str) -> str | None:
    """Why this device cannot run this precision, with the remedy; None where it can."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        return f"fp16 is not supported on this {device_type} device; use bf16 (ds_configs/zero2.json) or fp32 (zero2_fp32.json)"
    if precision == "bf16" and not accelerator.is_bf16_supported():
        return f"bf16 is not supported on this {device_type} device; use fp16 (ds_configs/zero2_fp16.json) or fp32 (zero2_fp32.json)"
    return None


def offload_problem(config: dict[str, Any]) -> str | None:
    """Why what a resolved configuration offloads to NVMe cannot be put there, with the remedy; None where nothing stands against it."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    section = config["zero_optimization"].get("offload_param") or {}  # `resolve` refuses an optimizer there
    if section.get("device") != "nvme":
        return None
    place = section.get("nvme_path")
    if not place or not Path(place).is_dir() or not os.access(place, os.W_OK):
        return (
            f'"zero_optimization.offload_param.nvme_path" is {place!r}; it must be a folder on a local NVMe drive that this user may write'
            " (or offload to the host's memory: ds_configs/zero3_offload.json)"
        )
    if not AsyncIOBuilder().is_compatible():
        return (
            '"zero_optimization.offload_param.device" is nvme, and DeepSpeed\'s asynchronous I/O cannot be built here; install libaio-dev,'
            " or offload to the host's memory (ds_configs/zero3_offload.json)"
        )
    return None

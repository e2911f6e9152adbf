"""Shows what adakron works around in DeepSpeed and transformers, each defect by itself, without adakron's engine.

Started as `deepspeed --module tests.helpers.upstream_worker RESULT`, on one rank or two; rank 0 writes what it saw, by name. What
poisons the process (autocast is global) comes last.
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before adakron, whose engine silences what importing deepspeed prints.
_IMPORT_OUTPUT = io.StringIO()
with contextlib.redirect_stdout(_IMPORT_OUTPUT):
    import deepspeed

import torch  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # noqa: E402
from torch import nn  # noqa: E402

OFF = {"reduce_bucket_size": 10_000}
BF16 = {"bf16": {"enabled": True}}


class Weights(nn.Module):
    """Its output is the sum of the weights times what it is given: the gradient of every weight is that number."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, factor: float) -> torch.Tensor:
        return (self.weight * factor).sum()


def build(stage: int, config: dict[str, Any], *, model: nn.Module | None = None, optimizer: Any = None) -> Any:
    model = model or Weights()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    base = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage} | (OFF if stage else {}), "gradient_clipping": 0.0,
    }  # fmt: skip
    merged = base | config
    return deepspeed.initialize(model=model, optimizer=optimizer, config={k: v for k, v in merged.items() if v is not None})[0]


def weight(engine: Any) -> float:
    """The first weight's fp32 master."""
    parameter = engine.module.weight
    full = deepspeed.utils.safe_get_full_fp32_param(parameter)
    return float((parameter if full is None else full).flatten()[0])


def step(engine: Any, factor: float) -> None:
    engine.backward(engine(factor))
    engine.step()


def raised(function: Callable[[], Any]) -> str:
    """What it raises, by type and first words; "" where it does not."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def printed(function: Callable[[], Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        function()
    return output.getvalue()


def clipping_default() -> float:
    engine = build(2, {"gradient_clipping": None})
    step(engine, 10.0)
    return 1.0 - weight(engine)


def bf16_stage0_steps_at_start() -> list[float]:
    model = Weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    build(0, BF16, model=model, optimizer=optimizer)
    return [float(state["step"]) for state in optimizer.state.values()]


def fp16_stage0_unscaled() -> float:
    engine = build(0, {"fp16": {"enabled": True, "loss_scale": 16}})
    step(engine, 8.0)
    return 1.0 - float(engine.module.weight[0])


def two_backwards() -> float:
    engine = build(2, {})
    first, second = engine(1.0), engine(2.0)
    engine.backward(first)
    engine.backward(second)
    engine.step()
    return 1.0 - weight(engine)


def skipped_steps_count() -> list[Any]:
    engine = build(2, {"fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}})
    step(engine, 8.0)
    return [engine.global_steps, bool(engine.was_step_applied())]


def loss_scale_at_minimum() -> str:
    engine = build(2, {"fp16": {"enabled": True, "initial_scale_power": 1, "min_loss_scale": 2, "hysteresis": 1}})
    return raised(lambda: step(engine, 60000.0))


def bf16_sums_in_bf16() -> list[str]:
    engine = build(2, BF16)
    return [str(engine.get_data_types()[1]), str(engine.communication_data_type)]


def no_grad_norm_at_stage0() -> bool:
    engine = build(0, {})
    step(engine, 8.0)
    return engine.get_global_grad_norm() is None


def unknown_keys() -> str:
    return raised(lambda: build(0, {"gradient_cliping": 0.5, "zero_optimisation": {"stage": 2}}))


def offload_refuses_torch_adamw() -> str:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}} | OFF}
    model = Weights()
    return raised(lambda: build(2, offload, model=model, optimizer=torch.optim.AdamW(model.parameters())))


def checkpoint_writer() -> str:
    return raised(lambda: build(2, {"checkpoint": {"writer": {"type": "PYTHON"}}}))


def two_precisions_at_stage3() -> str:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}} | BF16
    with deepspeed.zero.Init(config_dict_or_path=config):
        model: Any = nn.Sequential(nn.Linear(4, 4, bias=False))
    model.requires_grad_(False)
    model.append(nn.Linear(4, 1, bias=False))
    model.append(nn.Linear(1, 1, bias=False).bfloat16())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return raised(lambda: build(3, BF16, model=model, optimizer=torch.optim.SGD(trained, lr=1.0)))


def collectives_deprecated() -> list[str]:
    engine = build(3, {})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(engine, 1.0)
    return sorted({str(entry.message)[:200] for entry in caught if issubclass(entry.category, FutureWarning)})


def mismatched_head_at_stage3() -> str:
    from transformers import BertConfig, BertForSequenceClassification
    from transformers.integrations import HfDeepSpeedConfig

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
        alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
        found = raised(lambda: BertForSequenceClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True))
        del alive
    return found


def unexpected_tensors_at_stage3() -> list[str]:
    """What of a checkpoint with a head a model without one reports as unexpected."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel
    from transformers.integrations import HfDeepSpeedConfig

    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(BertConfig(**sizes)).save_pretrained(folder)
        alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
        _, report = BertModel.from_pretrained(folder, output_loading_info=True)
        del alive
    return sorted(report["unexpected_keys"])


def adakron_skips() -> dict[str, Any]:
    """Our engine in fp16, whose loss scale starts too high by a factor of 2^8: steps, skips, learning rates and weights."""
    from adakron.config import TrainingConfig
    from adakron.engine.ds_config import RunValues, resolve
    from adakron.engine.engine import TrainingEngine

    source = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}
    settings = resolve(source, RunValues(micro_batch=1, accumulation=1, world_size=1, max_grad_norm=0.0))
    training = TrainingConfig(learning_rate=0.5, warmup_ratio=0.0, max_grad_norm=0.0, lr_scheduler_type="linear")
    model = Weights()
    engine = TrainingEngine(model, [{"params": list(model.parameters())}], settings, training, total_steps=4, device=torch.device("cpu"))
    record = []
    while engine.global_step < 2:
        engine.backward(engine(factor=8.0).float(), 1)
        applied = engine.step()
        weights = engine.trainable_tensors()["weight"].tolist()
        record.append([applied, engine.global_step, engine.skipped_steps, engine.learning_rate, engine.loss_scale, weights[0]])
    return {"record": record}


def shared_memory_operator() -> bool:
    """Whether DeepSpeed would build it at initialisation: it asks this table alone."""
    return bool(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"])


def config_argument_is_a_switch() -> str:
    import argparse

    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    return type(next(action for action in parser._actions if action.dest == "deepspeed")).__name__


def autocast_fp16_clips_scaled_gradients() -> float:
    engine = build(1, {"torch_autocast": {"enabled": True, "dtype": "float16"}, "gradient_clipping": 1.0})
    step(engine, 8.0)
    return 1.0 - weight(engine)


def autocast_stays_on() -> bool:
    from deepspeed.runtime import torch_autocast

    build(1, {})
    return bool(torch_autocast.TORCH_AUTOCAST_INITIALIZED)


def set_indivisible_parameter() -> str:
    """At stage 3 on two ranks, of three elements."""
    engine = build(3, {}, model=Weights(3))
    return raised(lambda: deepspeed.utils.safe_set_full_fp32_param(engine.module.weight, torch.full((3,), 2.0)))


ALONE: dict[str, Callable[[], Any]] = {
    "import_output": _IMPORT_OUTPUT.getvalue,
    "bucket_default": lambda: DeepSpeedZeroConfig().reduce_bucket_size,
    "initialisation_output": lambda: printed(lambda: build(1, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}})),
    **{
        function.__name__: function
        for function in (
            shared_memory_operator, clipping_default, bf16_stage0_steps_at_start, fp16_stage0_unscaled, two_backwards, skipped_steps_count,
            loss_scale_at_minimum, bf16_sums_in_bf16, no_grad_norm_at_stage0, unknown_keys,
            offload_refuses_torch_adamw, checkpoint_writer, two_precisions_at_stage3, collectives_deprecated, mismatched_head_at_stage3,
            unexpected_tensors_at_stage3, adakron_skips, config_argument_is_a_switch, autocast_fp16_clips_scaled_gradients,
            autocast_stays_on,
        )
    },
}  # fmt: skip


def main(arguments: list[str], world: Any) -> None:
    """Show the defects of one rank, or those that need two."""
    from adakron import distributed
    from adakron.engine.upstream import ready_deepspeed

    device = torch.device("cpu")
    distributed.form_group(world, device)
    found: dict[str, Any] = {}
    if world.world_size == 1:
        found["shared_memory_operator"] = shared_memory_operator()
        ready_deepspeed(device)
        # What fp16 does wrong is arithmetic, which every CPU can do slowly; DeepSpeed asks this before it starts.
        get_accelerator().is_fp16_supported = lambda: True
        for name, function in ALONE.items():
            if name not in found:
                try:
                    found[name] = function()
                except Exception as error:
                    found[name] = f"not shown: {type(error).__name__}: {error}"[:400]
    else:
        ready_deepspeed(device)
        every = distributed.all_gather_object(set_indivisible_parameter())
        found["set_indivisible_parameter"] = every
    if world.rank == 0:
        Path(arguments[-1]).write_text(json.dumps(found))


if __name__ == "__main__":
    from launch.program import run_program

    sys.exit(run_program(main))

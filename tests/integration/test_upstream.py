"""What adakron works around in DeepSpeed 0.19.8 and transformers 5.23, shown on the installed versions.

A test that fails here says that upstream changed: the workaround that its message names can go, or must be looked at anew.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import deepspeed

pytestmark = pytest.mark.launcher


def shown(folder: Path, ranks: int) -> dict[str, Any]:
    result = folder / f"result-{ranks}.json"
    finished = deepspeed("--module", "tests.helpers.upstream_worker", str(result), ranks=ranks)
    assert finished.returncode == 0, finished.output
    content: dict[str, Any] = json.loads(result.read_text())
    return content


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each defect did on one rank, by name."""
    return shown(tmp_path_factory.mktemp("upstream"), 1)


@pytest.mark.parametrize(
    ("name", "expected", "workaround"),
    [
        # A gradient of 10 per weight, of norm 20: clipped to 1 although no key asked for it.
        ("clipping_default", 0.5, "ds_config writes gradient_clipping out: DeepSpeed clips at 1.0 where it is left out"),
        ("bf16_stage0_steps_at_start", [1.0], "ds_config refuses bf16 at stage 0: its initialisation takes an optimizer step"),
        # A gradient of 8 and a loss scale of 16: divided by a scale that never multiplied the loss.
        ("fp16_stage0_unscaled", 0.5, "ds_config refuses fp16 at stage 0: the loss is not scaled, the gradient is unscaled"),
        # Gradients of 1 and of 2.
        ("two_backwards", 2.0, "TrainingEngine.backward is called once per micro-batch, with the sum of its losses: stages 1 and 2"
         " forget the first of two backwards"),
        ("skipped_steps_count", [1, False], "TrainingEngine counts global_step itself: DeepSpeed's global_steps counts skipped steps"),
        ("bf16_sums_in_bf16", ["torch.bfloat16"] * 2, "ds_config writes grad_accum_dtype and communication_data_type out"),
        ("no_grad_norm_at_stage0", True, "TrainingEngine clips and measures the norm itself at stage 0 (ClippingAdamW)"),
        ("unknown_keys", "", "ds_config refuses keys that DeepSpeed does not know: DeepSpeed ignores them"),
        ("bucket_default", 500_000_000, "ds_config sets bucket sizes: DeepSpeed's hold 5e8 elements"),
        ("shared_memory_operator", True, "upstream.ready_deepspeed switches the shared-memory operator off: it would be compiled"),
        ("config_argument_is_a_switch", "_StoreTrueAction", "launch.arguments declares --deepspeed itself: DeepSpeed's takes no file"),
        ("unexpected_tensors_at_stage3", [], "load_backbone reads a partitioned model's report from a load without values first"),
        ("autocast_stays_on", True, "tests launch torch_autocast in a process of its own: it is global"),
    ],
)  # fmt: skip
def test_deepspeed_still_does(seen: dict[str, Any], name: str, expected: Any, workaround: str) -> None:
    assert seen[name] == expected, f"upstream changed ({seen[name]!r} instead of {expected!r}); workaround: {workaround}"


@pytest.mark.parametrize(
    ("name", "part", "workaround"),
    [
        ("loss_scale_at_minimum", "loss scale already at minimum", "TrainingEngine.step knows this message, a bare Exception's"),
        ("offload_refuses_torch_adamw", "ZeRORuntimeException", "ds_config sets zero_force_ds_cpu_optimizer to false"),
        ("checkpoint_writer", "UniversalParallelInfo", "ds_config refuses checkpoint.writer"),
        ("two_precisions_at_stage3", "AssertionError", "partitioning.cast_partitioned gives all parameters one precision"),
        ("mismatched_head_at_stage3", "size mismatch for classifier.weight", "partitioning._misshapen_left_out"),
        ("import_output", "Setting accelerator to CPU", "the filter in adakron/engine/__init__.py"),
        ("initialisation_output", "begin bf16_optimizer", "upstream.quiet_initialisation"),
        ("collectives_deprecated", "all_gather_into_tensor", "the FutureWarning filter in launch.program.quiet_libraries"),
    ],
)
def test_deepspeed_still_says(seen: dict[str, Any], name: str, part: str, workaround: str) -> None:
    assert part in str(seen[name]), f"upstream changed ({seen[name]!r}, without {part!r}); workaround: {workaround}"


def test_autocast_in_fp16_still_clips_scaled_gradients(seen: dict[str, Any]) -> None:
    # A gradient of 8 per weight, of norm 16: clipping at 1 should leave 0.5 of each. Divided by the scale once too often it is far less.
    moved = seen["autocast_fp16_clips_scaled_gradients"]
    assert 0.0 <= moved < 0.01, f"upstream changed ({moved} instead of nearly nothing); workaround: ds_config refuses torch_autocast"


def test_deepspeed_still_cannot_set_a_parameter_that_does_not_divide(tmp_path: Path) -> None:
    errors = shown(tmp_path, 2)["set_indivisible_parameter"]
    assert any("exceeds dimension size" in error for error in errors), (
        f"upstream changed ({errors}); workaround: TrainingEngine.load_for_evaluation gathers instead of safe_set_full_fp32_param"
    )


def test_an_overflow_moves_neither_step_nor_schedule_nor_weights(seen: dict[str, Any]) -> None:
    record = seen["adakron_skips"]["record"]
    skips = [entry for entry in record if not entry[0]]
    # 8 x 2^20 has no place in fp16 until the scale is halved to 2^12: eight steps.
    assert len(skips) == 8 and [entry[2] for entry in skips] == list(range(1, 9))
    for _, step, _, rate, _, weight in skips:
        assert (step, rate, weight) == (0, 0.5, 1.0)
    assert [entry[4] for entry in skips] == [2.0**power for power in range(19, 11, -1)]
    first, second = record[8:]
    # Adam moves by the learning rate, whatever the gradient's size.
    assert first[:4] == [True, 1, 8, 0.375] and first[5] == pytest.approx(0.5, abs=1e-3)
    assert second[:4] == [True, 2, 8, 0.25] and second[5] == pytest.approx(0.125, abs=1e-3)

"""What follows a step that the engine did not apply, with an engine that only counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adakron.config import TrainingConfig
from adakron.data.sampler import GlobalBatch
from adakron.dumps import StepDump
from adakron.errors import CheckpointError, NumericalError
from adakron.nonfinite import MOST_DUMPS, MOST_IN_A_ROW, NonFiniteSteps
from adakron.passes import StepPasses
from tests.helpers.launch import ROOT
from tests.unit.test_trainer import CountingEngine, CountingTask, build, encoded, settings


class Poisoned(CountingTask):
    """One example's loss is infinite; with `heals`, only the first so many times."""

    def __init__(self, example: int, heals: int = 10**9):
        super().__init__()
        self.example, self.left = example, heals

    def collate(self, encoded, indices, pad_token_id):
        self.poison = self.example in indices
        return super().collate(encoded, indices, pad_token_id)

    def loss(self, forward, batch):
        loss, logits = super().loss(forward, batch)
        if self.poison and self.left > 0:
            self.left -= 1
            loss = loss + float("inf")
        return loss, logits


class Kept:
    """Evidence in memory."""

    def __init__(self, checkpoint: Path | None = None, full: bool = False):
        self.dumps: list[StepDump] = []
        self.checkpoint, self.full = checkpoint, full

    def keep(self, dump: StepDump) -> Path:
        if self.full:
            raise OSError(28, "No space left on device")
        self.dumps.append(dump)
        return Path(dump.name)

    def last_good(self) -> Path | None:
        return self.checkpoint


def run(task: CountingTask, evidence: Kept | None = None, precision: str = "fp32", **values: Any) -> tuple[Any, CountingEngine]:
    engine = CountingEngine()
    engine.precision = precision
    training = settings(eval_strategy="no", save_strategy="no", **values)
    return build(training, engine, task, [], evidence=evidence).run(), engine


def test_the_error_names_step_examples_checkpoint_and_file():
    kept = Kept(Path("run/checkpoint-2"))
    with pytest.raises(NumericalError) as error:
        run(Poisoned(8), kept)
    said = str(error.value)
    assert "\n" not in said
    (dump,) = kept.dumps
    (place,) = dump.places
    assert 8 in place.examples
    assert f"training examples {', '.join(map(str, place.examples))}" in said
    for part in (f"step {dump.number}: the loss is inf on rank 0", "run/checkpoint-2", dump.name, "--replay", "--on_nonfinite skip"):
        assert part in said
    assert dump.batches[0]["input_ids"].shape == (len(place.examples), 1)


def test_without_a_checkpoint_or_room_the_error_says_so():
    with pytest.raises(NumericalError, match=r"cannot be written: .*No space left.*saved no checkpoint yet"):
        run(Poisoned(8), Kept(full=True))


def test_a_skipped_step_is_counted_and_made_up_for():
    result, engine = run(Poisoned(8), on_nonfinite="skip")
    # 10 examples in steps of 4, twice: 6 steps, and one per epoch holds the example; four epochs then give them.
    assert engine.global_step == 6
    assert result.state.nonfinite_steps == engine.attempts // 2 - engine.global_step // 2 > 0
    assert all(np.isfinite(entry["loss"]) for entry in result.state.log_history)
    assert result.state.log_history[-1]["nonfinite_steps"] == result.state.nonfinite_steps


def test_skipping_ends_where_every_step_is_bad():
    kept = Kept()
    with pytest.raises(NumericalError, match=f"the {MOST_IN_A_ROW} steps before it were skipped"):
        run(CountingTask(loss_value=float("nan")), kept, on_nonfinite="skip")
    assert len(kept.dumps) == MOST_IN_A_ROW + 1
    assert MOST_IN_A_ROW < MOST_DUMPS


def test_help_and_documentation_say_the_limit_that_holds():
    assert f"at most {MOST_IN_A_ROW} in a row" in TrainingConfig.__dataclass_fields__["on_nonfinite"].metadata["help"]
    said = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("reliability", "troubleshooting")}
    assert f"{MOST_IN_A_ROW} in a row are skipped, a sixth ends the run" in said["reliability"]
    assert f"the {MOST_IN_A_ROW} steps before it were skipped, too" in said["troubleshooting"]


def test_what_went_wrong_is_said_where_the_checkpoints_cannot_be_looked_at_or_the_engine_gives_up():
    class Unreadable(Kept):
        def last_good(self) -> Path | None:
            raise CheckpointError("the folder cannot be listed")

    class GivesUp(CountingEngine):
        precision = "fp32"

        def step(self, *, again: bool = False) -> bool:
            if again:
                raise NumericalError("the loss scale fell to its minimum")
            return super().step()

    with pytest.raises(NumericalError, match=r"the loss is inf on rank 0.*saved no checkpoint yet"):
        run(Poisoned(8), Unreadable())
    training = settings(eval_strategy="no", save_strategy="no", on_nonfinite="skip")
    with pytest.raises(NumericalError, match=r"the loss is inf on rank 0.*; the loss scale fell to its minimum"):
        build(training, GivesUp(), Poisoned(8), [], evidence=Kept()).run()


def test_a_step_that_is_finite_when_computed_again_is_applied():
    result, engine = run(Poisoned(8, heals=1), on_nonfinite="skip")
    assert (engine.global_step, result.state.nonfinite_steps) == (6, 0)
    assert result.loss == 2.0
    with pytest.raises(NumericalError, match="no micro-batch's are, computed again"):
        run(Poisoned(8, heals=1))


def test_an_overflow_of_fp16_is_ordinary_and_a_loss_that_is_not_finite_is_not():
    engine = CountingEngine(overflows=(2,))
    result = build(settings(eval_strategy="no", save_strategy="no"), engine, CountingTask(), []).run()
    assert (engine.skipped_steps, result.state.nonfinite_steps) == (1, 0)
    with pytest.raises(NumericalError, match="the loss is inf"):
        run(Poisoned(8), precision="fp16")


def test_the_parameter_with_the_bad_gradient_is_named_by_name():
    layer = torch.nn.Linear(1, 1)
    engine = CountingEngine()
    engine.precision = "bf16"
    engine.trainable_parameters = lambda: dict(layer.named_parameters()).items()  # type: ignore[assignment, method-assign]
    engine.backward = lambda loss_sum, targets: loss_sum.backward()  # type: ignore[method-assign]

    class Root(CountingTask):
        def loss(self, forward, batch):
            logits = forward(**batch).logits
            # The square root of 0 is 0, its slope is infinite.
            return (layer.bias.sum() * 0.0 + (layer.weight.sum() * 0.0).abs().sqrt() + logits.sum()), logits

    passes = StepPasses(engine, Root(), encoded(), pad_token_id=0)  # type: ignore[arg-type]
    batch = GlobalBatch(examples=np.arange(4), micro_batches=(np.arange(2), np.arange(2, 4)))
    with pytest.raises(NumericalError, match=r"the loss is 0, but the gradient of weight not finite on rank 0, micro-batch 0, .*0, 1;"):
        NonFiniteSteps(engine, passes, "raise", None).examine(batch, passes.gradient(batch))  # type: ignore[arg-type]

"""The loop's decisions, with an engine and a task that only count."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from adakron.config import TrainingConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.engine.state import KINDS, EngineState
from adakron.errors import NumericalError
from adakron.evaluator import Evaluator, evaluation_prefix
from adakron.metrics import MetricRecorder
from adakron.stopping import StopRequest
from adakron.tasks.base import EncodedSplit
from adakron.train_state import Snapshot
from adakron.trainer import Trainer, greater_is_better, total_steps

EXAMPLES = 10


class CountingEngine:
    """Takes steps without a model; those in `overflows` (by attempt) are skipped, as is one with a loss that is not finite."""

    precision = "fp16"  # the one in which an overflow is ordinary
    device = torch.device("cpu")
    learning_rate = 1.0
    grad_norm = None
    loss_scale = 1.0
    advice = "lower --learning_rate"

    def __init__(self, overflows: tuple[int, ...] = ()):
        self.overflows = overflows
        self.healthy = True
        self.attempts = self.global_step = self.skipped_steps = 0
        self.training = False
        self.modes: list[bool] = []
        self.loaded: Any = None

    def __call__(self, **inputs: torch.Tensor) -> SimpleNamespace:
        self.modes.append(self.training)
        return SimpleNamespace(logits=inputs["input_ids"].float().requires_grad_(torch.is_grad_enabled()))

    def train(self) -> None:
        self.training = True

    def eval(self) -> None:
        self.training = False

    def backward(self, loss_sum: torch.Tensor, global_targets: int) -> None:
        assert global_targets > 0
        self.healthy = self.healthy and bool(torch.isfinite(loss_sum))

    def step(self, *, again: bool = False) -> bool:
        self.attempts += 1
        healthy, self.healthy = self.healthy, True
        if self.attempts in self.overflows or not healthy:
            self.skipped_steps += 1
            return False
        self.global_step += 1
        return True

    def state(self) -> EngineState:
        kinds = {kind: {"step": torch.tensor(float(self.global_step))} for kind in KINDS}
        return EngineState(kinds, {"step": self.global_step}, self.global_step, self.skipped_steps)

    def load_state(self, state: EngineState) -> None:
        self.global_step, self.skipped_steps = state.global_step, state.skipped_steps

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {}

    def trainable_tensors(self) -> dict[str, torch.Tensor]:
        return {"step": torch.tensor(self.global_step)}

    def load_for_evaluation(self, tensors: dict[str, torch.Tensor]) -> None:
        self.loaded = tensors


class CountingTask:
    """Every example's loss is `loss_value`; the scores of successive evaluations are given."""

    metric_for_best = "accuracy"
    output_kind = "values"

    def __init__(self, scores: tuple[float, ...] = (0.5,) * 99, loss_value: float = 2.0):
        self.scores = iter(scores)
        self.loss_value = loss_value

    def collate(self, encoded, indices, pad_token_id):
        return {"input_ids": torch.zeros(len(indices), 1, dtype=torch.int64)}

    def loss(self, forward, batch):
        logits = forward(**batch).logits
        return (logits + self.loss_value).sum(), logits

    def predict(self, forward, batch):
        return forward(**batch).logits

    def score(self, split, outputs):
        return {"accuracy": next(self.scores), "loss": 1.0}


def encoded(examples: int = EXAMPLES) -> EncodedSplit:
    return EncodedSplit(
        features={"input_ids": np.zeros(examples, dtype=np.int32)},
        offsets=np.arange(examples + 1),
        labels=np.zeros(examples, dtype=np.int64),
        target_counts=np.ones(examples, dtype=np.int64),
        truncated=0,
    )


def build(
    training: TrainingConfig, engine: CountingEngine, task: CountingTask, saved: list[int], *, keep: Any = None, **options: Any
) -> Trainer:
    sampler = GlobalBatchSampler(encoded().lengths, micro_batch=4, global_batch=training.examples_per_step(1))
    evaluator = Evaluator(task, batch_size=4, pad_token_id=0, device=engine.device)  # type: ignore[arg-type]
    return Trainer(
        engine, task, sampler, encoded(), {"validation": encoded(5)}, training, evaluator=evaluator, recorder=MetricRecorder(),  # type: ignore[arg-type]
        pad_token_id=0, save_checkpoint=lambda take: saved.append(take().step if keep is None else keep(take())), **options,
    )  # fmt: skip


def settings(**values: Any) -> TrainingConfig:
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2.0, "logging_steps": 1, "disable_tqdm": True}
    return TrainingConfig(**(defaults | values))


def evaluated_at(trainer_result: Any) -> list[int]:
    return [entry["step"] for entry in trainer_result.state.log_history if "eval_accuracy" in entry]


def test_epochs_end_with_evaluation_and_checkpoint():
    saved: list[int] = []
    result = build(settings(), CountingEngine(), CountingTask(), saved).run()
    assert result.state.global_step == 6  # 10 examples in batches of 4: 3 steps an epoch
    assert evaluated_at(result) == saved == [3, 6]
    assert (result.samples, result.loss) == (20, 2.0)


def test_steps_decide_where_asked_and_the_last_step_counts():
    saved: list[int] = []
    training = settings(eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=5)
    result = build(training, CountingEngine(), CountingTask(), saved).run()
    assert evaluated_at(result) == [4, 6]
    assert saved == [5, 6]


def test_max_steps_wins_and_may_end_inside_an_epoch():
    assert total_steps(settings(max_steps=5), steps_per_epoch=3) == 5
    assert total_steps(settings(num_train_epochs=0.5), steps_per_epoch=3) == 2
    result = build(settings(max_steps=5), CountingEngine(), CountingTask(), []).run()
    assert (result.state.global_step, evaluated_at(result)) == (5, [3, 5])
    assert result.state.epoch == pytest.approx(1 + 2 / 3)


def test_skipped_steps_are_made_up_for_and_do_not_swallow_an_evaluation():
    engine = CountingEngine(overflows=(1, 3))  # the third attempt is the first epoch's last batch
    result = build(settings(eval_strategy="epoch", save_strategy="no"), engine, CountingTask(), []).run()
    assert (engine.global_step, engine.skipped_steps, engine.attempts) == (6, 2, 8)
    assert evaluated_at(result) == [1, 4, 6]


def test_the_best_tensors_are_returned_with_their_scores():
    engine = CountingEngine()
    training = settings(num_train_epochs=3.0, load_best_model_at_end=True, save_strategy="no")
    result = build(training, engine, CountingTask(scores=(0.5, 0.9, 0.7)), []).run()
    assert result.state.best_step == 6
    assert int(result.tensors["step"]) == 6
    assert engine.loaded is result.tensors
    assert result.scores is not None
    assert result.scores["eval_accuracy"] == 0.9


def test_evaluation_and_what_follows_run_without_dropout():
    engine = CountingEngine()
    trainer = build(settings(eval_strategy="no", save_strategy="no"), engine, CountingTask(), [])
    assert trainer.run().scores is None
    assert all(engine.modes)
    engine.modes.clear()
    trainer.evaluate()
    assert not any(engine.modes)
    assert not engine.training


def test_every_forward_pass_is_announced():
    announced: list[tuple[int, int, int]] = []
    training = settings(max_steps=2, gradient_accumulation_steps=1, eval_strategy="no", save_strategy="no", consistency_weight=0.5)
    engine = CountingEngine(overflows=(2,))
    trainer = build(
        training, engine, CountingTask(), [], before_pass=lambda place: announced.append((place.step, place.micro_step, place.index))
    )
    trainer.run()
    # A step that overflowed is not counted, so its successor draws what it drew.
    assert announced == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert len(engine.modes) == 6


def test_a_consistency_loss_is_weighed_and_reported_beside_the_loss():
    class Noisy(CountingTask):
        def loss(self, forward, batch):
            loss, logits = super().loss(forward, batch)
            self.loss_value += 1.0
            return loss, logits + self.loss_value

    losses: list[float] = []
    engine = CountingEngine()
    engine.backward = lambda loss_sum, targets: losses.append(loss_sum.item())  # type: ignore[method-assign]
    training = settings(max_steps=1, eval_strategy="no", save_strategy="no", consistency_weight=0.25)
    result = build(training, engine, Noisy(), []).run()
    # Four examples of loss 2 each, whose two outputs lie 1 apart.
    assert losses == [4 * 2.0 + 0.25 * 4 * 1.0]
    assert (result.loss, result.state.log_history[0]["consistency"]) == (2.0, 1.0)


def stopping_at(number: int) -> Any:
    """A boundary that asks to stop when it is passed for the number-th time."""
    passed = iter(range(1, 10_000))

    def boundary() -> None:
        if next(passed) == number:
            raise StopRequest("SIGTERM")

    return boundary


@pytest.mark.parametrize("at", range(2, 10))
def test_wherever_a_run_stops_it_goes_on_as_if_it_had_not(at):
    training = settings(eval_strategy="steps", eval_steps=2, save_strategy="no", load_best_model_at_end=True, logging_steps=4)
    scores = (0.5, 0.9, 0.7)
    undisturbed = build(training, CountingEngine(), CountingTask(scores), []).run()
    snapshots: list[Snapshot] = []
    boundary = stopping_at(at)
    stopped = build(training, CountingEngine(), CountingTask(scores), [], keep=snapshots.append, boundary=boundary)
    # The evaluator passes boundaries too: six steps and three evaluations of two batches are twelve.
    stopped._evaluator._boundary = boundary
    with pytest.raises(StopRequest):
        stopped.run()
    stopped.save()
    stopped.save()
    assert len(snapshots) == 1
    left = scores[len([entry for entry in snapshots[0].train.log_history if "eval_accuracy" in entry]) :]
    engine = CountingEngine()
    resumed = build(training, engine, CountingTask(left), [])
    resumed.resume(snapshots[0])
    result = resumed.run()
    assert engine.attempts == 6 - snapshots[0].step
    assert int(result.tensors["step"]) == int(undisturbed.tensors["step"]) == 4
    assert (result.loss, result.samples, result.tokens) == (undisturbed.loss, undisturbed.samples, undisturbed.tokens)
    timeless = ("step", "epoch", "loss", "eval_accuracy")
    kept = [[{key: entry[key] for key in timeless if key in entry} for entry in r.state.log_history] for r in (result, undisturbed)]
    assert kept[0] == kept[1]
    assert (result.state.best_step, result.state.best_metric) == (4, 0.9)


def test_a_checkpoint_that_owed_an_evaluation_is_written_anew_once_that_is_made():
    training = settings(eval_strategy="steps", eval_steps=2, save_strategy="no")
    owing: list[Snapshot] = []
    boundary = stopping_at(2)
    stopped = build(training, CountingEngine(), CountingTask(), [], keep=owing.append)
    stopped._evaluator._boundary = boundary
    with pytest.raises(StopRequest):
        stopped.run()
    stopped.save()
    assert (owing[0].step, owing[0].due.evaluation) == (2, True)
    anew: list[Snapshot] = []
    resumed = build(training, CountingEngine(), CountingTask(), [], keep=anew.append)
    resumed.resume(owing[0])
    resumed.run()
    assert [(snapshot.step, snapshot.due.evaluation, "eval_accuracy" in snapshot.train.log_history[-1]) for snapshot in anew] == [
        (2, False, True)
    ]


def saved_by_a_stop(training: TrainingConfig) -> Snapshot:
    saved: list[Snapshot] = []
    stopped = build(training, CountingEngine(), CountingTask(), [], keep=saved.append, boundary=stopping_at(3))
    with pytest.raises(StopRequest):
        stopped.run()
    stopped.save()
    return saved[0]


@pytest.mark.parametrize(("saved", "kept"), [(True, []), (False, [2])])
def test_a_run_that_goes_on_elsewhere_saves_there_before_its_first_step(saved, kept):
    training = settings(eval_strategy="no", save_strategy="no")
    first = saved_by_a_stop(training)
    there: list[int] = []
    resumed = build(training, CountingEngine(), CountingTask(), there)
    resumed.resume(first, saved=saved)
    resumed.run()
    assert there == kept


@pytest.mark.parametrize(("saved", "kept"), [(True, 0), (False, 1)])
def test_a_stop_before_the_next_step_saves_where_the_checkpoint_is_not(saved, kept):
    training = settings(eval_strategy="no", save_strategy="no")
    first = saved_by_a_stop(training)
    again: list[Snapshot] = []
    resumed = build(training, CountingEngine(), CountingTask(), [], keep=again.append, boundary=stopping_at(1))
    resumed.resume(first, saved=saved)
    with pytest.raises(StopRequest):
        resumed.run()
    resumed.save()
    assert [snapshot.step for snapshot in again] == [2] * kept


def test_a_stop_after_the_best_is_loaded_saves_the_last_step():
    training = settings(eval_strategy="steps", eval_steps=2, save_strategy="no", load_best_model_at_end=True)
    kept: list[Snapshot] = []
    engine = CountingEngine()
    trainer = build(training, engine, CountingTask((0.5, 0.9, 0.7)), [], keep=kept.append)
    result = trainer.run()
    assert int(result.tensors["step"]) == 4
    engine.state = lambda: None  # type: ignore[method-assign]  # at stage 0 it would now hold the best parameters
    trainer.save()
    assert [int(snapshot.engine.tensors["master"]["step"]) for snapshot in kept] == [6]


def test_before_the_first_step_there_is_nothing_to_save():
    saved: list[int] = []
    trainer = build(settings(), CountingEngine(), CountingTask(), saved, boundary=stopping_at(1))
    with pytest.raises(StopRequest):
        trainer.run()
    trainer.save()
    assert saved == []


def test_a_loss_that_is_no_number_ends_the_run():
    with pytest.raises(NumericalError, match=r"step 1: the loss is nan on rank 0, .*examples 0, 2, 9, 1;.*--learning_rate"):
        build(settings(), CountingEngine(), CountingTask(loss_value=float("nan")), []).run()


@pytest.mark.parametrize(("metric", "better"), [("accuracy", True), ("loss", False), ("mse", False)])
def test_direction_of_a_metric(metric, better):
    assert greater_is_better(settings(), metric) is better
    assert greater_is_better(settings(greater_is_better=not better), metric) is not better


def test_prefixes_keep_mnli_splits_apart():
    assert evaluation_prefix("validation") == "eval_"
    assert evaluation_prefix("validation_mismatched") == "eval_mismatched_"

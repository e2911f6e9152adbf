"""Turns and phases of a contender, and the backbones made for it."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from launch.contenders import pace as turns
from launch.contenders import phases as measured
from launch.contenders import sizes
from launch.contenders.pace import Pace, Round
from launch.contenders.phases import Phases
from launch.contenders.workload import Workload

WORKLOAD = Workload("sst2", None, None, "fp32", batch=4, examples=8, rounds=1, evaluation_examples=3)


class Clock:
    """Stands where `time` does in the modules under test; goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter

    def sleep(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "time", CLOCK)
    monkeypatch.setattr(measured, "time", CLOCK)


class Work:
    """Something with calls to be wrapped."""

    def nap(self, seconds: float) -> float:
        CLOCK.sleep(seconds)
        return seconds


def run(workload: Workload) -> tuple[list[Round], list[str], Work]:
    """A contender of two phases; its reports, and what happened in which order."""
    reports: list[Round] = []
    happened: list[str] = []

    def report(one: Round) -> None:
        reports.append(one)
        happened.append("reported")

    pace, work = Pace(workload, lambda: happened.append("waited"), report, CLOCK.monotonic() - 100), Work()

    def instrument(phases: Phases) -> None:
        happened.append("instrumented")
        phases.wrap(work, "nap", "forward")

    def prepare() -> "object":
        happened.append("prepared")
        return lambda: happened.append("scored")

    pace.instrument = instrument
    for _ in range(workload.total_steps):
        pace.before_step()
        happened.append("step")
        with pace.phases.of("backward"):
            CLOCK.sleep(0.002)
        assert work.nap(0.001) == 0.001
        CLOCK.sleep(0.004)
    pace.end_round()
    pace.evaluation(prepare)  # type: ignore[arg-type]
    return reports, happened, work


def test_a_contender_waits_for_every_turn_and_prepares_inside_its_own() -> None:
    _, happened, _ = run(WORKLOAD)
    training = ["waited", "step", "step", "reported"] * 2
    traced = ["waited", "instrumented", "step", "step", "reported"]
    scoring = ["waited", "prepared", "scored", "reported", "waited", "scored", "reported"]
    assert happened == training + traced + scoring


def test_only_the_traced_round_has_phases() -> None:
    reports, *_ = run(WORKLOAD)
    assert [bool(one.phases) for one in reports] == [False, False, True, False, False]
    phases = reports[2].phases
    assert phases.keys() == {"step", "forward", "backward", "rest"}  # nothing was said of data and log
    assert phases == pytest.approx({"step": 7.0, "forward": 1.0, "backward": 2.0, "rest": 4.0})
    assert [one.seconds for one in reports] == pytest.approx([0.014] * 3 + [0.0] * 2)


def test_the_start_ends_with_the_first_step() -> None:
    reports, *_ = run(WORKLOAD)
    # `started` lies 100 s back; what is reported is the same after every round.
    assert {one.start_seconds for one in reports} == {reports[0].start_seconds}
    assert reports[0].start_seconds == pytest.approx(100.007)


def test_rounds_of_one_step_and_no_scoring() -> None:
    reports, happened, _ = run(Workload("sst2", None, None, "fp32", batch=4, examples=4, rounds=2))
    assert len(reports) == 4 and "prepared" not in happened
    assert reports[1].start_seconds == pytest.approx(100.007)


def test_a_repeated_phase_of_a_step_adds_up() -> None:
    phases = Phases()
    phases.on = True
    for _ in range(3):
        phases.step()
        for _ in range(2):
            with phases.of("data"):
                CLOCK.sleep(0.002)
    phases.end()
    assert phases.medians()["data"] == pytest.approx(4.0)


def test_ranks_share_a_step() -> None:
    config = Workload("quickstart", None, None, "bf16", batch=5).config(ranks=2)
    assert config.training.per_device_train_batch_size == 3
    assert config.training.examples_per_step(2) == 5


@pytest.mark.parametrize(("size", "width"), [("roberta-base", 768), ("minilm", 384)])
def test_a_backbone_of_a_known_size(size: str, width: int, tmp_path: Path) -> None:
    sizes.save_backbone(size, tmp_path)
    config, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (config.hidden_size, config.vocab_size) == (width, len(tokenizer))
    assert config.pad_token_id == tokenizer.pad_token_id
    # The second text of a pair has a type of its own, which RoBERTa's embedding must have, too.
    assert max(tokenizer("one", "two")["token_type_ids"]) < config.type_vocab_size

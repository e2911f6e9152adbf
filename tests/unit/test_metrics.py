import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from adakron.metrics import JsonLinesSink, MetricRecorder, TensorBoardSink, peak_memory_mib


def test_an_interval_is_the_mean_over_its_steps_and_the_maximum_where_asked():
    recorder = MetricRecorder()
    for value in (1.0, 2.0, 6.0):
        recorder.record("train/loss", torch.tensor(value, requires_grad=True), "sum")
        recorder.record("train/peak", -value, "max")
        recorder.record("train/rate", value, "last")
    assert recorder.flush() == {"train/loss": 3.0, "train/peak": -1.0, "train/rate": 6.0}
    assert recorder.flush() == {}


def test_values_reach_the_host_together_and_exactly(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor, move=torch.Tensor.cpu: (moved.append(tensor.numel()), move(tensor))[1])
    recorder, values = MetricRecorder(), [0.1, 0.7, 1e-30]
    for value in values:
        recorder.record("train/loss", torch.tensor(value), "sum")
        recorder.record("train/rate", value)
    single = [float(torch.tensor(value)) for value in values]
    assert recorder.unlogged() == {"train/loss": ("sum", single), "train/rate": ("same", values)}
    recorder.flush()
    assert moved == [6, 6]
    assert recorder.unlogged() == {}


def test_sinks_hold_what_was_written(tmp_path):
    recorder = MetricRecorder([TensorBoardSink(tmp_path / "tb"), JsonLinesSink(tmp_path / "metrics.jsonl")])
    recorder.write(10, {"train/loss": 0.5})
    recorder.write(20, {"train/loss": 0.25, "eval/accuracy": 0.9})
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 0.5), (20, 0.25)]
    assert events.Scalars("eval/accuracy")[0].step == 20
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 10, "train/loss": 0.5}, {"step": 20, "train/loss": 0.25, "eval/accuracy": 0.9}]


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(64, 2**20)  # 256 MiB
    assert peak_memory_mib(torch.device("cpu")) >= before
    assert peak_memory_mib(torch.device("cpu")) == pytest.approx(before + 256, rel=1.0)
    del held


def test_an_evaluation_that_is_made_again_is_written_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    sink = JsonLinesSink(file)
    for step, name in ((1, "train/loss"), (1, "eval/loss"), (2, "train/loss"), (2, "eval/loss"), (3, "train/loss")):
        sink.write(step, {name: 0.5})
    sink.close()
    for again, kept in ((False, 4), (True, 3)):
        JsonLinesSink(file, 2, evaluates_again=again).close()
        assert len(file.read_text().splitlines()) == kept
    assert file.read_text().splitlines()[-1] == '{"step": 2, "train/loss": 0.5}'

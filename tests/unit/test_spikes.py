import pytest
import torch

from adakron.spikes import FEWEST, WINDOW, LossSpikes, modified_z_score


def feed(spikes: LossSpikes, losses: list[float]) -> float:
    for loss in losses:
        spikes.record(torch.tensor(loss))
    return spikes.flush()


def calm(count: int) -> list[float]:
    return [1.0 + 0.01 * (index % 5) for index in range(count)]


def test_the_score_by_hand():
    # Median 3, deviations 2 1 0 1 2, MAD 1.
    assert modified_z_score(7.0, [5.0, 1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.6745 * 4)


def test_a_spike_is_seen_whatever_else_the_interval_holds():
    spikes = LossSpikes()
    assert feed(spikes, calm(40)) < 3.5
    assert feed(spikes, [*calm(4), 3.0, *calm(4)]) > 50
    assert feed(spikes, calm(10)) < 3.5  # the spike in the window does not hide, or make, the next


def test_nothing_is_scored_before_there_is_something_to_compare_with():
    assert feed(LossSpikes(), [*calm(FEWEST - 1), 100.0]) == 0.0
    assert feed(LossSpikes(), []) == 0.0
    assert feed(LossSpikes(), [*calm(FEWEST), 100.0]) > 50


def test_a_loss_that_stood_still_is_no_reason_for_alarm():
    assert feed(LossSpikes(), [*[2.0] * 30, 2.0001]) < 3.5


def test_a_resumed_detector_goes_on_as_if_nothing_had_happened():
    whole, first, second = LossSpikes(), LossSpikes(), LossSpikes()
    losses = [*calm(WINDOW + 7), 1.5, *calm(5)]
    feed(whole, losses[:60])
    feed(first, losses[:60])
    for spikes in (whole, first):
        for loss in losses[60:65]:
            spikes.record(torch.tensor(loss))
    second.load_state(first.state())
    assert feed(second, losses[65:]) == feed(whole, losses[65:]) > 3.5
    assert second.state() == whole.state()

"""Launchers without a scheduler: what they start ends like one process, and ends at all when a launcher is killed or a host is lost."""

import re
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import PATIENCE, Measured, Reference, thorough
from tests.cluster.hosts import wait_until
from tests.cluster.inputs import flags, newest_step, went_on_at
from tests.cluster.launching import kill, named, pdsh, torchrun
from tests.cluster.virtual import Cluster

HOSTS = ("n1", "n2")
LEAVING = 120.0
"""Seconds in which ranks must be gone that have nobody any more: they look every second, finish a step, save."""


def test_pdsh_and_its_death(with_ssh: Cluster, reference: Reference, measured: Measured, tmp_path: Path):
    given, run = flags(reference.inputs, ranks=2), tmp_path / "run"
    with pdsh(with_ssh, tmp_path, HOSTS, given, run) as launched:
        launched.wait_for_steps(20, PATIENCE)
        for name in ("deepspeed", "pdsh", "ssh"):  # what is left of them would hold the ranks' sessions open
            kill(named(with_ssh.login, name))
        began = time.monotonic()
        wait_until(lambda: not launched.processes(), LEAVING, "all processes of the run are gone")
        measured.say(f"pdsh killed: everything gone after {time.monotonic() - began:.1f} s, saved at step {newest_step(launched.run)}")
    assert newest_step(run) >= 20, launched.output()
    with pdsh(with_ssh, tmp_path, HOSTS, given, run) as launched:
        assert launched.codes(PATIENCE) == [0], launched.output()
    assert len(went_on_at(run)) == 1
    measured.same_end("deepspeed --launcher pdsh, 2 hosts, killed and started again", run, reference.folder)


@pytest.mark.parametrize(
    ("killed", "reason"),
    [
        ("n2", "the end of its launcher"),
        # With the store that all met in; the other agent notices that and ends its rank, which may be asked first.
        pytest.param("n1", "(the end of its launcher|SIGTERM)", marks=thorough),
    ],
)
def test_torchrun_and_the_death_of_an_agent(cluster: Cluster, reference, measured: Measured, tmp_path: Path, killed: str, reason: str):
    given, run = flags(reference.inputs, ranks=2), tmp_path / "run"
    with torchrun(cluster, tmp_path, HOSTS, given, run) as launched:
        launched.wait_for_steps(20, PATIENCE)
        kill(named(cluster[killed], "torchrun"))
        began = time.monotonic()
        wait_until(lambda: not launched.ranks(), LEAVING, "all ranks are gone")
        measured.say(f"the torchrun agent of {killed} killed: ranks gone after {time.monotonic() - began:.1f} s")
        assert launched.codes(LEAVING)[1 - HOSTS.index(killed)] == 1
    assert newest_step(run) >= 20, launched.output()
    assert re.search(f"stopped by {reason} at step", launched.output())
    with torchrun(cluster, tmp_path, HOSTS, given, run) as launched:
        assert launched.codes(PATIENCE) == [0, 0], launched.output()
    assert len(went_on_at(run)) == 1
    measured.same_end("torchrun, 2 hosts, an agent killed, started again", run, reference.folder)


@thorough
@pytest.mark.parametrize("launch", [pdsh, torchrun])
def test_a_host_that_is_switched_off_ends_the_run(with_ssh: Cluster, reference: Reference, measured: Measured, tmp_path: Path, launch):
    minutes = 0.25
    given, run = [*flags(reference.inputs, ranks=2), "--timeout_minutes", str(minutes)], tmp_path / "run"
    with launch(with_ssh, tmp_path, HOSTS, given, run) as launched:
        launched.wait_for_steps(5, PATIENCE)
        with_ssh.power_off("n2")
        began = time.monotonic()
        try:
            codes = launched.codes(minutes * 60 + 30)
            seconds = time.monotonic() - began
            measured.say(f"{launch.__name__}, host switched off, timeout {minutes * 60:g} s: over after {seconds:.1f} s, codes {codes}")
            assert not launched.processes()
        finally:
            with_ssh.boot("n2")
    assert "rank 0 lost another rank (rank 1 gives no sign of life" in launched.output()

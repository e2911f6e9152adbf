"""One cluster and one undisturbed run for all tests of this folder."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import jobs, parts
from tests.cluster.inputs import Inputs, flags, largest_difference, make_inputs
from tests.cluster.jobs import Job
from tests.cluster.virtual import Cluster
from tests.helpers.launch import python

NEAR = 1e-6
"""Largest difference from the undisturbed run: fp32 sums in another order. Measured: docs/testing-on-a-cluster.md."""

PATIENCE = 600.0
"""Seconds that a run may take on a busy machine before it counts as hanging."""

thorough = pytest.mark.skipif(
    os.environ.get("ADAKRON_CLUSTER_TESTS") != "all", reason="takes minutes more: ADAKRON_CLUSTER_TESTS=all runs it"
)

_tier = pytest.StashKey[str]()
_lines = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(3 * PATIENCE))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _tier in config.stash:
        terminalreporter.section("cluster")
        for line in (config.stash[_tier], *config.stash.get(_lines, [])):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A login host and n1, n2, n3, with what can run here; tests ask `needs` for the rest."""
    reason = parts.obstacle()
    if reason is not None:
        request.config.stash[_tier] = f"SKIPPED, {reason}"
        pytest.skip(reason)
    possible = tuple(part for part in (parts.SSH, parts.SLURM) if parts.obstacle(part) is None)
    without = [part.name for part in (parts.SSH, parts.SLURM) if part not in possible]
    request.config.stash[_tier] = " + ".join(["4 hosts as namespaces", *(part.name for part in possible)]) + (
        f"; SKIPPED what needs {' or '.join(without)}" if without else ""
    )
    with Cluster(tmp_path_factory.mktemp("cluster"), 3, possible) as made:
        yield made


@pytest.fixture(scope="session")
def with_slurm(cluster: Cluster) -> Cluster:
    return _with(cluster, parts.SLURM)


@pytest.fixture(scope="session")
def with_ssh(cluster: Cluster) -> Cluster:
    return _with(cluster, parts.SSH)


def _with(cluster: Cluster, part: parts.Part) -> Cluster:
    if part not in cluster.parts:
        pytest.skip(parts.obstacle(part))
    return cluster


@dataclass(frozen=True)
class Reference:
    """The run that nobody disturbed, in one process, and what it was made from."""

    inputs: Inputs
    folder: Path


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    home = tmp_path_factory.mktemp("reference")
    inputs = make_inputs(home)
    finished = python("launch/train.py", *flags(inputs, ranks=1), "--output_dir", str(home / "run"), timeout=PATIENCE)
    assert finished.returncode == 0, finished.output
    return Reference(inputs, home / "run")


@dataclass(frozen=True)
class Measured:
    """Says at the end of the session what the test found."""

    lines: list[str]
    started: float

    def same_end(self, what: str, folder: Path, reference: Path) -> None:
        """The run ended with the adapter of the reference; how near, and how long the test took until here."""
        assert (folder / "all_results.json").exists(), what
        difference = largest_difference(folder, reference)
        self.say(f"{what}: largest difference {difference:.1e}")
        assert difference <= NEAR, what

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.started:6.1f} s  {text}")


@pytest.fixture
def measured(request: pytest.FixtureRequest, reference: Reference) -> Measured:
    return Measured(request.config.stash.setdefault(_lines, []), time.monotonic())


Submit = Callable[..., Job]
SECONDS_OF_WARNING = 60


@pytest.fixture
def submit(with_slurm: Cluster, reference: Reference, tmp_path: Path) -> Iterator[Submit]:
    """Submits a run into tmp_path/NAME; what is left of the jobs is ended behind the test."""
    submitted: list[Job] = []

    def start(name: str, nodes: int, *training: str, options: tuple[str, ...] = ()) -> Job:
        request = ["--nodes", str(nodes), "--tasks_per_node", "1", "--signal_seconds", str(SECONDS_OF_WARNING)]
        given = [*flags(reference.inputs, ranks=nodes), *training]
        submitted.append(jobs.submit(with_slurm.login, request, given, tmp_path / name, options))
        return submitted[-1]

    yield start
    for job in submitted:
        job.cancel()
    for host in with_slurm.compute:
        for rank in host.ranks():
            rank.kill()

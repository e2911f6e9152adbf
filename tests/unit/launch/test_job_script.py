"""A job script run by bash as it stands, on a cluster of stand-ins: srun, squeue and scontrol that do as they are told."""

import getpass
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from adakron.launcher import World
from adakron.signals import EXIT_STOPPED
from launch import slurm

SRUN = """#!/bin/bash
# As srun: passes USR1 on to all processes of its task, and leaves with the task's code, or with one of its own.
setsid bash "$JOB/task" "$@" & task=$!
trap 'kill -USR1 -- "-$task"' USR1
while :; do wait "$task"; code=$?; kill -0 "$task" 2>/dev/null || break; done
exit "${SRUN_CODE:-$code}"
"""
SQUEUE = """#!/bin/bash
echo "$@" >> "$JOB/asked"
left=$(cat "$JOB/deaf" 2>/dev/null || echo 0)
[ "$left" = 0 ] || { echo $((left - 1)) > "$JOB/deaf"; echo "squeue: Unable to contact slurm controller" >&2; exit 1; }
cat "$JOB/state"
"""
TASK = 'shift; exec "$@"'  # what the script gives to srun, behind srun's own flag
SAVES_STEP = 'echo checkpoint-{0} > "$RUN/latest"'
STOPS = 'echo checkpoint-{0} > "$RUN/latest"; echo {{}} > "$RUN/stopped.json"; exit 75'


class Job:
    """A submitted script. task: what the ranks do, in bash, with the run's folder in $RUN and the training's words in "$@"."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str):
        self.folder = folder
        self.run = folder / "run"
        self.run.mkdir()
        monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
        self.script = folder / "job.sbatch"
        slurm.main(["--tasks_per_node", "2", *flags, "--script", str(self.script), "--", "--output_dir", str(self.run)], World())
        self.state("RUNNING")
        self._tool("srun", SRUN)
        self._tool("squeue", SQUEUE)
        # A real one ends the script soon after.
        self._tool("scontrol", f'#!/bin/bash\necho "$@" >> "{folder}/requeued"\nkill -TERM $PPID\n')
        self._tool("sleep", "#!/bin/bash\nexec /bin/sleep 0.1\n")
        (folder / "launch").mkdir()
        (folder / "launch" / "train.py").touch()

    def _tool(self, name: str, text: str) -> None:
        file = self.folder / name
        file.write_text(text)
        file.chmod(0o755)

    def state(self, state: str) -> None:
        """What squeue says of the job."""
        (self.folder / "state").write_text(f"{state}\n")

    def deaf(self, times: int) -> None:
        """So often squeue gets no answer."""
        (self.folder / "deaf").write_text(f"{times}\n")

    def python(self, text: str) -> None:
        """What a rank does, in bash."""
        self._tool("python", f"#!/bin/bash\n{text}\n")

    def start(self, task: str, *words: str, restarts: int = 0, **environ: str) -> "subprocess.Popen[str]":
        (self.folder / "task").write_text(f"{task}\n")
        environment = os.environ | {
            "PATH": f"{self.folder}:{os.environ['PATH']}", "JOB": str(self.folder), "RUN": str(self.run), "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(restarts), **environ,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.script), *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, task: str, *words: str, **options) -> tuple[int, str]:
        """Start, and wait: exit code and output."""
        process = self.start(task, *words, **options)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    @property
    def requeued(self) -> Sequence[str]:
        file = self.folder / "requeued"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def job(tmp_path, monkeypatch):
    return Job(tmp_path, monkeypatch)


@pytest.mark.parametrize("code", [0, 1, 2, 143])
def test_a_run_that_did_not_stop_ends_the_job_with_its_code(job, code):
    assert job.end(f"{SAVES_STEP.format(5)}; exit {code}")[0] == code
    assert not job.requeued


@pytest.mark.parametrize("srun_code", ["", "75", "143", "0"])
def test_a_run_that_saved_is_queued_again_whatever_srun_makes_of_its_code(job, srun_code):
    code, output = job.end(STOPS.format(5), SRUN_CODE=srun_code)
    assert job.requeued == ["requeue 7"], output
    assert "queued again with checkpoint-5" in output
    assert code == EXIT_STOPPED


def test_a_job_of_an_array_asks_for_itself_alone(job):
    # The last one to start has the array's own number, by which Slurm would mean all of them.
    job.end(STOPS.format(5), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2")
    assert job.requeued == ["requeue 7_2"]
    assert "--jobs 7_2" in (job.folder / "asked").read_text()


def test_a_run_that_could_not_say_that_it_stopped_is_queued_again_where_it_had_come_further(job):
    code, output = job.end(f"exit {EXIT_STOPPED}")
    assert (code, job.requeued) == (EXIT_STOPPED, [])
    assert "this start made no new checkpoint: there is none" in output
    assert job.end(f"{SAVES_STEP.format(5)}; exit {EXIT_STOPPED}")[0] == EXIT_STOPPED
    assert job.requeued == ["requeue 7"]


@pytest.mark.parametrize("lost", [76, 137])
def test_a_run_that_lost_a_rank_may_come_no_further_once_but_not_twice_in_a_row(job, lost):
    assert job.end(f"exit {lost}")[0] == lost
    assert len(job.requeued) == 1  # it may have been the first epoch
    assert job.end(f"{SAVES_STEP.format(5)}; exit {lost}", restarts=1)[0] == lost
    assert job.end(f"exit {lost}", restarts=2)[0] == lost
    assert len(job.requeued) == 3
    code, output = job.end(f"exit {lost}", restarts=3)
    assert (code, len(job.requeued)) == (lost, 3)
    assert "not queued again: this start made no new checkpoint: checkpoint-5" in output
    assert list(job.folder.glob(".slurm-*")) == []


def test_a_failure_is_named_last_and_where_to_look(job):
    code, output = job.end("exit 2", "--learning_rate", "1")
    assert code == 2
    assert output.splitlines()[-1] == f"ended with 2: the rank that failed first says why, above and in {job.run}/logs"


def test_how_to_go_on_names_the_flags_that_were_given_behind_the_script(job):
    (job.run / "latest").write_text("checkpoint-5\n")
    _, output = job.end(STOPS.format(5), "--global_batch_size", "64")
    assert output.splitlines()[-1].endswith("To go on: sbatch the same script --global_batch_size 64")


def test_a_start_that_made_no_step_is_the_last_one(job):
    (job.run / "latest").write_text("checkpoint-5\n")
    code, output = job.end(STOPS.format(5), restarts=1)
    assert (code, job.requeued) == (EXIT_STOPPED, [])
    assert "not queued again: this start made no new checkpoint: checkpoint-5" in output


def test_restarts_are_bounded(tmp_path, monkeypatch):
    job = Job(tmp_path, monkeypatch, "--max_restarts", "2")
    job.end(STOPS.format(5), restarts=1)
    assert job.requeued == ["requeue 7"]
    code, output = job.end(STOPS.format(6), restarts=2)
    assert (code, len(job.requeued)) == (EXIT_STOPPED, 1)
    assert "it was queued again 2 times" in output


def test_an_old_mark_of_a_stop_does_not_count(job):
    (job.run / "stopped.json").write_text("{}")
    assert job.end(f"{SAVES_STEP.format(5)}; exit 2")[0] == 2
    assert not job.requeued
    assert (job.run / "stopped.json").exists()  # perhaps of another job, which waits with it


def test_a_mark_that_was_written_again_counts(job):
    (job.run / "stopped.json").write_text("{}\n")
    again = f'{SAVES_STEP.format(5)}; echo {{}} > "$RUN/new"; mv "$RUN/new" "$RUN/stopped.json"; exit 75'
    assert job.end(again, SRUN_CODE="143")[0] == EXIT_STOPPED
    assert job.requeued == ["requeue 7"]


@pytest.mark.parametrize("times", [1, 2, 99])
def test_a_controller_that_does_not_answer_does_not_end_the_job(job, times):
    job.deaf(times)
    output = job.end(STOPS.format(5))[1]
    assert job.requeued == ["requeue 7"], output
    assert len((job.folder / "asked").read_text().splitlines()) == min(times + 1, 3)


def test_a_controller_that_answers_late_is_heard(job):
    job.deaf(2)
    job.state("COMPLETING")
    assert "Slurm ends the job" in job.end(STOPS.format(5))[1]
    assert not job.requeued


@pytest.mark.parametrize(
    ("codes", "ends", "again"),
    [
        ([1, 76], 1, 0),  # the one that failed, then one that lost it
        ([0, 2, 137], 2, 0),  # or was killed for it
        ([76, 1], 76, 1),
        ([137, 76, 1], 137, 1),
        ([75, 1], 75, 1),
    ],
)
def test_the_first_rank_that_ended_is_why_the_run_did(job, codes, ends, again):
    job.python(f'{SAVES_STEP.format(5)}; exit "$CODE"')
    ranks = "; ".join(f'CODE={code} "$@"' for code in codes)
    code, output = job.end(f"shift; {ranks}", SRUN_CODE=str(max(codes)))
    assert (code, len(job.requeued)) == (ends, again), output
    assert "cannot overwrite" not in output
    assert not list(job.folder.glob(".slurm-*"))


def test_a_rank_gets_its_signals_and_is_waited_for(job):
    job.python(f"trap 'sleep 1; {STOPS.format(9)}' USR1; touch $JOB/up; while :; do sleep 1; done")
    process = job.start(TASK)
    wait_for(job.folder / "up")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert job.requeued == ["requeue 7"], output
    assert process.returncode == EXIT_STOPPED


def test_a_lock_is_left_to_whoever_may_still_build(job, tmp_path):
    job.python("exit 0")
    ages = {"building": 55 * 60, "dead": 65 * 60}
    for name, age in ages.items():
        lock = tmp_path / f"adakron-{getpass.getuser()}" / "torch_extensions" / name / "lock"
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, (time.time() - age,) * 2)
    code, output = job.end(TASK, TMPDIR=str(tmp_path), SLURM_TMPDIR="")
    assert code == 0, output
    assert [path.parent.name for path in tmp_path.glob("adakron-*/torch_extensions/*/lock")] == ["building"]


@pytest.mark.parametrize(
    ("given", "before"),
    [({}, ""), ({"APPTAINER_BIND": "/data:/d,/more"}, "/data:/d,/more,"), ({"SINGULARITY_BIND": "/data"}, "/data,")],
)
def test_a_container_sees_the_cache_of_its_host(job, tmp_path, given, before):
    job.python('echo "$APPTAINER_BIND" > "$JOB/bind"')
    code, output = job.end(TASK, TMPDIR=str(tmp_path), SLURM_TMPDIR="", **given)
    assert code == 0, output
    assert (job.folder / "bind").read_text() == f"{before}{tmp_path}/adakron-{getpass.getuser()}\n"


def test_a_job_that_slurm_ends_is_not_brought_back(job):
    job.state("COMPLETING")  # cancelled: the ranks got their SIGTERM and saved
    assert job.end(STOPS.format(5))[0] == EXIT_STOPPED
    job.state("RUNNING")
    process = job.start(f"touch $JOB/up; while [ ! -e $JOB/go ]; do sleep 1; done; {STOPS.format(6)}")
    wait_for(job.folder / "up")
    process.send_signal(signal.SIGTERM)
    (job.folder / "go").touch()
    assert "Slurm ends the job" in process.communicate(timeout=60)[0]
    assert not job.requeued


def test_the_warning_reaches_the_ranks_and_their_save_is_waited_for(job):
    process = job.start(f"trap 'sleep 1; {STOPS.format(9)}' USR1; touch $JOB/up; while :; do sleep 1; done")
    wait_for(job.folder / "up")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert job.requeued == ["requeue 7"], output
    assert process.returncode == EXIT_STOPPED


def test_a_signal_that_asks_where_the_ranks_stand_ends_nothing(job):
    job.python("trap 'touch $JOB/stood; exit 0' USR2; touch $JOB/up; for _ in {1..300}; do /bin/sleep 0.1; done; exit 9")
    process = job.start(TASK)
    wait_for(job.folder / "up")
    # As `scancel --signal=USR2`: all processes of the step.
    (step,) = {os.getpgid(one.pid) for one in psutil.Process(process.pid).children(recursive=True)} - {os.getpgid(process.pid)}
    os.killpg(step, signal.SIGUSR2)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, (job.folder / "stood").exists()) == (0, True), output


@pytest.mark.parametrize(
    ("home", "hub"),
    [
        ({"HF_HOME": "/shared/hf"}, "/shared/hf/hub"),
        ({"HF_HOME": "", "XDG_CACHE_HOME": "/quota"}, "/quota/huggingface/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
    ],
)
def test_the_training_gets_more_flags_and_caches_of_its_host(job, tmp_path, home, hub):
    task = 'printf "%s\\n" "$@" > "$JOB/words"; shift; "$@"'  # srun's own flag first
    (job.folder / "python").write_text('#!/bin/bash\necho "$@" > "$JOB/train"; env > "$JOB/env"\n')
    (job.folder / "python").chmod(0o755)
    code, output = job.end(task, "--learning_rate", "1e-4", HF_HUB_CACHE="", **home, TMPDIR=str(tmp_path), SLURM_TMPDIR="")
    assert code == 0, output
    assert (job.folder / "words").read_text().startswith("--kill-on-bad-exit=1\nbash\n-c\n")
    expected = f"-u launch/train.py --learning_rate 1e-4 --output_dir {job.run} --resume_from_checkpoint auto\n"
    assert (job.folder / "train").read_text() == expected
    environ = dict(line.split("=", 1) for line in (job.folder / "env").read_text().splitlines() if "=" in line)
    assert environ["HF_HUB_CACHE"] == hub
    assert environ["HF_HOME"].startswith(f"{tmp_path}/adakron-") and environ["TORCH_EXTENSIONS_DIR"].startswith(f"{tmp_path}/adakron-")
    assert Path(environ["HF_HOME"]).parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("flag", ["--output_dir", "--output_dir=x", "--resume_from_checkpoint=auto", "--overwrite_output_dir"])
def test_flags_that_the_script_needs_for_itself_are_refused(job, flag):
    code, output = job.end("exit 0", flag)
    assert (code, "write another one" in output) == (2, True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)

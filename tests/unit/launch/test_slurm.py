"""launch/slurm.py: what it refuses, and that the scripts in launch/slurm/ are what it writes."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from adakron.errors import ConfigError
from adakron.launcher import World
from launch import job_checks, slurm
from tests.helpers.launch import ROOT

SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
TRAINING = ["--", "--output_dir", "runs/one"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """A machine where packages of Slurm may be installed, but no cluster answers."""
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)


def written(capsys, *arguments: str) -> str:
    slurm.main(arguments, World())
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_scripts_in_the_repository_are_what_their_flags_write(script: Path, capsys):
    text = script.read_text(encoding="utf-8")
    python, program, *arguments = shlex.split(re.findall(r"^#     (python launch/slurm\.py .*)$", text, re.MULTILINE)[0])
    assert (python, program) == ("python", "launch/slurm.py")
    assert written(capsys, *arguments) == text


def test_there_are_scripts_for_one_host_for_several_and_for_an_array():
    assert [script.stem for script in SCRIPTS] == ["array", "many_nodes", "one_node"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_bash_reads_the_scripts(script: Path):
    checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_shellcheck_finds_nothing(script: Path):
    checked = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_every_request_is_a_line_of_sbatch(capsys):
    text = written(
        capsys, "--nodes", "3", "--tasks_per_node", "2", "--cpus_per_task", "8", "--time", "1-02:00:00", "--partition", "long", "--account",
        "me", "--qos", "low", "--constraint", "a100&ib", "--sbatch=--mem=64G", "--max_restarts", "4", "--container", "my image.sif",
        *TRAINING,
    )  # fmt: skip
    requests = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert requests == [
        "--job-name=adakron", "--nodes=3", "--ntasks-per-node=2", "--cpus-per-task=8", "--partition=long", "--account=me", "--qos=low",
        "--constraint=a100&ib", "--time=1-02:00:00", "--output=slurm-%x-%j.out", "--open-mode=append", "--requeue", "--signal=B:USR1@180",
        "--mem=64G",
    ]  # fmt: skip
    assert "    apptainer exec --nv 'my image.sif'\n    python -u launch/train.py\n" in text
    assert '[ "$restarts" -ge 4 ]' in text
    assert "HF_HUB_OFFLINE=1" in text
    assert "HF_HUB_OFFLINE=1" not in written(capsys, "--tasks_per_node", "2", "--online", *TRAINING)


def test_words_reach_the_training_as_they_were_given(capsys):
    odd = "a 'b' \"c\" $HOME `d` {task} @sbatch@"
    text = written(capsys, "--gpus_per_node", "1", "--", "--text_column", odd, "--output_dir", "my runs/one")
    command = re.search(r"^run_dir=.*?^\)$", text, re.MULTILINE | re.DOTALL)
    assert command
    shown = subprocess.run(["bash", "-c", f"set -- ; {command[0]}\nprintf '%s\\n' \"${{train[@]}}\""], capture_output=True, text=True)
    assert shown.stdout.splitlines() == [
        "python", "-u", "launch/train.py", "--text_column", odd, "--output_dir", "my runs/one", "--resume_from_checkpoint", "auto",
    ]  # fmt: skip


def test_an_array_has_a_job_for_every_task_and_seed(capsys):
    text = written(
        capsys, "--gpus_per_node", "1", "--array_tasks", "mrpc", "rte", "--array_seeds", "1", "2", "3", "--array_limit", "2",
        "--", "--task_name", "{task}", "--seed", "{seed}", "--output_dir", "runs/{task}-{seed}",
    )  # fmt: skip
    assert "#SBATCH --array=0-5%2\n" in text
    block = re.search(r"^tasks=.*?^\)$", text, re.MULTILINE | re.DOTALL)
    assert block
    seen = []
    for index in range(6):
        script = f'SLURM_ARRAY_TASK_ID={index}\n{block[0]}\necho "$run_dir" "${{train[*]}}"'
        seen.append(subprocess.run(["bash", "-uc", script], capture_output=True, text=True).stdout.split()[:8])
    assert [words[0] for words in seen] == ["runs/mrpc-1", "runs/mrpc-2", "runs/mrpc-3", "runs/rte-1", "runs/rte-2", "runs/rte-3"]
    assert seen[4][4:] == ["--task_name", "rte", "--seed", "2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "2", *TRAINING], "how many ranks a node has is not given"),
        (["--gpus_per_node", "2", "--tasks_per_node", "2", *TRAINING], "are both given"),
        (["--gpus_per_node", "0", *TRAINING], "--gpus_per_node is 0"),
        (["--gpus_per_node", "1"], "there is no -- among the arguments"),
        (["--gpus_per_node", "1", "--"], "no --output_dir"),
        (["--gpus_per_node", "1", "--mem", "64G", *TRAINING], "unknown flag --mem.*, or give sbatch's own as --sbatch=--mem=VALUE"),
        (["--gpus_per_node", "1", "--sbatch=--signal=B:USR2@10", *TRAINING], "the script decides; give --signal_seconds"),
        (["--gpus_per_node", "1", "--sbatch=--requeue", *TRAINING], "the script decides; drop it"),
        (["--gpus_per_node", "1", *TRAINING, "--deepspeed", "no.json"], "--deepspeed no.json: no such file"),
        (["--gpus_per_node", "1", "--script", "no/folder/job.sbatch", *TRAINING], "there is no folder no/folder; make it"),
        (["--gpus_per_node", "1", "--array_seeds", "1", "2", "--", "--output_dir", "runs/{seed}"], "no flag of the training has {seed}"),
        (["--gpus_per_node", "1", "--setup", "module load\ncuda", *TRAINING], "--setup is 'module load.ncuda'"),
        (["--gpus_per_node", "1", *TRAINING, "--resume_from_checkpoint", "auto"], "the job script's to give"),
        (["--gpus_per_node", "1", *TRAINING, "--overwrite_output_dir"], "the job script's to give"),
        (["--gpus_per_node", "1", *TRAINING, "--learning_rat", "1"], "unknown flag --learning_rat"),
        (["--gpus_per_node", "1", *TRAINING, "--data_dir", "a\nb"], "control characters"),
        (["--gpus_per_node", "1", "--", "launch/generate.py", "--output_dir", "x"], "no training"),
        (["--gpus_per_node", "1", "--time", "soon", *TRAINING], "--time is 'soon'"),
        (["--gpus_per_node", "1", "--time", "04:00:00\n#SBATCH --x", *TRAINING], "--time is '04:00:00.n"),
        (["--gpus_per_node", "1", "--time", "\N{ARABIC-INDIC DIGIT FOUR}", *TRAINING], "--time is"),
        (["--gpus_per_node", "1", "--venv", "v\nexit", *TRAINING], "--venv is 'v.nexit'; give it without control characters"),
        (["--gpus_per_node", "1", "--container", "c\r", *TRAINING], "--container is 'c.r'"),
        (["--gpus_per_node", "1", "--array_tasks", "rte", "a\x1b", *TRAINING], "--array_tasks is 'a.x1b'"),
        (["--gpus_per_node", "1", "--array_seeds", "\N{ARABIC-INDIC DIGIT FOUR}", *TRAINING], "no whole number"),
        (["--gpus_per_node", "1", "--time", "2", *TRAINING], "leaves nothing of a time limit of 120 s"),
        (["--gpus_per_node", "1", "--partition", "a b", *TRAINING], "without spaces"),
        (["--gpus_per_node", "1", "--sbatch=--mem=1\n#SBATCH --x", *TRAINING], "one word"),
        (["--gpus_per_node", "1", "--venv", "v", "--container", "c", *TRAINING], "exclude each other"),
        (["--gpus_per_node", "1", "--array_limit", "2", *TRAINING], "--array_limit does nothing"),
        (["--gpus_per_node", "1", "--array_seeds", "x", *TRAINING], "no whole number"),
        (["--gpus_per_node", "1", "--array_seeds", "1", "2", *TRAINING], "same for several jobs"),
    ],
)
def test_what_cannot_work_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        slurm.main(arguments, World())


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-3", 183600), ("2-3:30", 185400), ("1-00:00:01", 86401), ("1:2:3:4", None)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time, seconds):
    assert job_checks.seconds(time) == seconds


def test_the_cluster_is_asked_and_its_refusal_passed_on(tmp_path, monkeypatch, capsys):
    script = tmp_path / "job.sbatch"
    arguments = ["--gpus_per_node", "1", "--script", str(script), *TRAINING]
    assert "there is no sbatch here" in written(capsys, *arguments)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/bash\n[ "$1" = --test-only ] && [ -x "$2" ] && echo "sbatch: Job 7 to start" >&2\nexit "$CODE"\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: str(sbatch))
    monkeypatch.setenv("CODE", "0")
    assert "Job 7 to start" in written(capsys, *arguments)
    monkeypatch.setenv("CODE", "1")
    with pytest.raises(ConfigError, match="--test-only fails"):
        slurm.main(arguments, World())


def test_the_documentation_names_every_flag():
    said = (ROOT / "docs" / "multinode.md").read_text(encoding="utf-8")
    flags = {option for action in slurm.parser()._actions for option in action.option_strings} - {"-h", "--help"}
    assert {flag for flag in flags if flag not in said} == set()


def test_what_the_job_needs_and_is_not_here_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    script = tmp_path / "job.sbatch"
    said = written(capsys, "--gpus_per_node", "1", "--venv", "no/venv", "--script", str(script), *TRAINING, "--train_file", "no.csv")
    assert "--venv: there is no no/venv/bin/activate here; the job needs it on its hosts" in said
    assert "--train_file: there is no no.csv here" in said
    assert "submit with: sbatch" in said


def test_only_a_script_of_ours_is_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    script = tmp_path / "README.md"
    for _ in range(2):
        written(capsys, "--gpus_per_node", "1", "--script", str(script), *TRAINING)
    script.write_text("# Mine\n")
    with pytest.raises(ConfigError, match="did not write; name another one"):
        slurm.main(["--gpus_per_node", "1", "--script", str(script), *TRAINING], World())
    assert script.read_text() == "# Mine\n"


def test_a_machine_with_slurm_and_without_a_cluster_checks_nothing(tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: str(sbatch))
    assert "sbatch finds no cluster from here, so it is not checked" in written(
        capsys, "--gpus_per_node", "1", "--script", str(tmp_path / "job.sbatch"), *TRAINING
    )

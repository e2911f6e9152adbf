"""Stops one run again and again, in every way that ranks are asked to stop, until it is done: `python -m tests.benchmarks.stops`.

Signals reach two ranks together, 0.2 s or 1 s apart, or one rank only. Each time the run must end by itself with exit code 75 and
a checkpoint of the step where it stopped; it then goes on from there. The adapter at the end must be that of a run which nobody
disturbed, bit for bit.
"""

import itertools
import signal
import tempfile
import time
from pathlib import Path

from adakron.signals import EXIT_STOPPED
from tests.helpers import tiny
from tests.helpers.interrupted import running, send
from tests.helpers.launch import deepspeed

STEPS = 700
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WAYS = {
    "together": ((0, 1), 0.0),
    "0.2 s apart": ((1, 0), 0.2),
    "1 s apart": ((0, 1), 1.0),
    "rank 0 only": ((0,), 0.0),
    "rank 1 only": ((1,), 0.0),
}


def main() -> None:
    """Print a line per stop, and whether the end is the same."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        model, data = tiny.save_tiny_bert(home / "model", dropout=0.1), tiny.write_classification(home / "data")
        arguments = [
            "--deepspeed", "ds_configs/zero2.json", "--model_name_or_path", str(model), "--task_name", "sst2", "--data_dir", str(data),
            "--per_device_train_batch_size", "8", "--max_steps", str(STEPS), "--logging_steps", "1", "--bottleneck_dim", "8",
            "--eval_strategy", "no", "--save_strategy", "no",
        ]  # fmt: skip
        undisturbed = deepspeed("launch/train.py", *arguments, "--output_dir", str(home / "undisturbed"), ranks=2)
        assert undisturbed.returncode == 0, undisturbed.output
        print("| signal | to | at step | seconds from the first signal to the exit | exit code |\n|---|---|---|---|---|")
        for number, (way, (to, skew)) in itertools.product(SIGNALS, WAYS.items()):
            with running(home / "stopped", [*arguments, "--resume_from_checkpoint", "auto"], ranks=2) as run:
                run.wait_for_lines(20)
                began = time.monotonic()
                send(run, number, to=to, skew=skew)
                finished = run.finish()
                seconds = time.monotonic() - began
            assert finished.returncode == EXIT_STOPPED, finished.output
            step = max(int(path.name.split("-")[1]) for path in (home / "stopped").glob("checkpoint-*"))
            print(f"| {number.name} | {way} | {step} | {seconds:.1f} | {finished.returncode} |", flush=True)
        last = deepspeed("launch/train.py", *arguments, "--output_dir", str(home / "stopped"), "--resume_from_checkpoint", "auto", ranks=2)
        assert last.returncode == 0, last.output
        adapters = [(home / name / "adapter_model.safetensors").read_bytes() for name in ("undisturbed", "stopped")]
        print(f"\nadapter at the end: {'the same, bit for bit' if adapters[0] == adapters[1] else 'DIFFERENT'}")


if __name__ == "__main__":
    main()

"""How far runs drift apart when the same global batch is cut otherwise: this trainer's beside transformers' Trainer.

`python -m tests.benchmarks.invariance` trains every loss, with dropout off and on, in several layouts of micro-batch, accumulation
and ranks, three steps of 32 examples of which the last is short, and prints a Markdown table: the largest relative difference from
the layout of one micro-batch. Both train the same tiny adapted models on the same data in fp32. transformers' runs are started by
torchrun with this module as `--peer`. Needs accelerate, which comes with the extra `peft`.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from adakron import distributed
from tests.helpers.engine_worker import Case
from tests.helpers.exactness import Outcome, deviation, launched
from tests.helpers.launch import BIN, free_port, run
from tests.helpers.problems import MATRIX, PAD, SEED, LanguageTask, prepare, write_inputs

LAYOUTS = [(1, 32, 1), (1, 8, 4), (2, 16, 1), (2, 4, 4), (4, 8, 1)]
"""(ranks, micro-batch, accumulation); the first is the one compared with."""
SHOWN = ("loss", "grad_norm", "adapter")


class _Kept(TrainerCallback):
    """Keeps what a step logs."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        if logs and "grad_norm" in logs:
            self.logs.append(logs)


def peer_run(folder: Path, problem_name: str, layout: Sequence[int], output: Path) -> dict[str, Any]:
    """What transformers' Trainer makes of a problem; like a record of `engine_worker`."""
    ranks, micro, steps = layout
    problem = MATRIX[problem_name]
    task, encoded, model = prepare(folder, problem_name)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.config.use_cache = False

    def collate(rows: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        batch = task.collate(encoded, [row["row"] for row in rows], PAD)
        if "labels" not in batch:
            # A language model shifts its labels itself.
            inputs = batch["input_ids"], batch["attention_mask"]
            batch["labels"] = (
                inputs[0].masked_fill(inputs[1] == 0, -100) if task.__class__ is LanguageTask else problem.task.targets(*inputs)  # type: ignore[attr-defined]
            )
        return batch

    ours = problem.training(micro, steps)
    arguments = TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=micro, gradient_accumulation_steps=steps, num_train_epochs=1,
        learning_rate=ours.learning_rate, weight_decay=ours.weight_decay, adam_beta1=ours.adam_beta1, adam_beta2=ours.adam_beta2,
        adam_epsilon=ours.adam_epsilon, lr_scheduler_type="constant", max_grad_norm=ours.max_grad_norm, seed=SEED, logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, optim="adamw_torch",
    )  # fmt: skip
    kept = _Kept()
    rows: Any = [{"row": row} for row in range(problem.examples)]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[kept])
    trainer.train()
    assert trainer.args.world_size == ranks
    return {
        "losses": [float(log["loss"]) for log in kept.logs],
        "grad_norms": [float(log["grad_norm"]) for log in kept.logs],
        "learning_rates": [],
        "tensors": {name: p.tolist() for name, p in model.named_parameters() if name in start},
        "start": {name: tensor.tolist() for name, tensor in start.items()},
    }


def peer_runs(folder: Path, layout: Sequence[int]) -> dict[str, Outcome]:
    """transformers' outcome of every problem in a layout, in one launch."""
    result = folder / f"peer-{'-'.join(map(str, layout))}.json"
    command = [str(BIN / "torchrun"), "--nproc_per_node", str(layout[0]), "--master_port", str(free_port())]
    command += ["-m", "tests.benchmarks.invariance", "--peer", str(folder), str(result), *map(str, layout)]
    finished = run(command, timeout=900)
    assert finished.returncode == 0, finished.output
    return {name: _outcome(record) for name, record in json.loads(result.read_text()).items()}


def _outcome(record: dict[str, Any]) -> Outcome:
    tensors = {part: {name: torch.tensor(value) for name, value in record[part].items()} for part in ("tensors", "start")}
    return Outcome(**record | tensors)


def largest(outcomes: Sequence[dict[str, Outcome]], problem: str) -> dict[str, float]:
    """Over all layouts, the deviation from the first."""
    found = [deviation(outcome[problem], outcomes[0][problem]) for outcome in outcomes[1:]]
    return {name: max(each[name] for each in found) for name in SHOWN}


def ours_runs(folder: Path) -> list[dict[str, Outcome]]:
    """This trainer's outcome of every problem, by layout."""
    cases = {
        layout: [
            Case(problem=name, deepspeed="zero2_fp32", ranks=layout[0], micro_batch=layout[1], accumulation=layout[2]) for name in MATRIX
        ]
        for layout in LAYOUTS
    }
    found: dict[str, Outcome] = {}
    for ranks in sorted({layout[0] for layout in LAYOUTS}):
        found |= launched(folder, ranks, [case for layout, chosen in cases.items() if layout[0] == ranks for case in chosen])
    return [{case.problem: _with_start(found[case.name], prepare(folder, case.problem)[2]) for case in chosen} for chosen in cases.values()]


def _with_start(outcome: Outcome, model: torch.nn.Module) -> Outcome:
    outcome.start.update({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    return outcome


def main() -> None:
    """Measure and print the table, or be one of transformers' processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        folder, result = Path(given.peer[0]), Path(given.peer[1])
        layout = [int(value) for value in given.peer[2:]]
        records = {name: peer_run(folder, name, layout, folder / "output") for name in MATRIX}
        if distributed.rank() == 0:
            result.write_text(json.dumps(records))
        distributed.barrier()
        sys.stdout.flush()
        os._exit(0)  # a thread of gloo's may abort a process that ends in the interpreter's own way
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_inputs(folder, MATRIX)
        ours = ours_runs(folder)
        theirs = [peer_runs(folder, layout) for layout in LAYOUTS]
    print(f"ranks x micro-batch x accumulation: {', '.join('x'.join(map(str, layout)) for layout in LAYOUTS)}")
    print("| loss | AdaKron: loss | gradient norm | adapter and head | Trainer: loss | gradient norm | adapter and head |")
    print("|---|---|---|---|---|---|---|")
    for name in MATRIX:
        cells = [*largest(ours, name).values(), *largest(theirs, name).values()]
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in cells)} |")


if __name__ == "__main__":
    main()

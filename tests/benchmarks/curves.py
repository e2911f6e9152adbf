"""How time and memory of a training step grow: `python -m tests.benchmarks.curves --json FILE --plot FILE.svg`.

From one point (a BERT of MiniLM's size with random weights, 64 tokens, one rank, ZeRO-2, fp32) one number at a time is changed, and
`launch/train.py` trains some steps with each. All texts of a point have one length, so that there is no padding. Printed are the
milliseconds of a step and the largest peak of a rank's memory, as metrics.jsonl has them. docs/performance.md shows the curves.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from adakron.packaged import packaged_minilm
from tests.helpers.launch import deepspeed, logged

STEPS, WARM_UP = 16, 6


@dataclass(frozen=True)
class Point:
    """What is trained. tokens: of every text, special ones included. stage: of ZeRO."""

    layers: int = 6
    hidden: int = 384
    bottleneck: int = 48
    tokens: int = 64
    experts: int = 1
    ranks: int = 1
    stage: int = 2


CURVES: dict[str, tuple[int, ...]] = {
    "layers": (2, 6, 12, 24),
    "hidden": (192, 384, 768, 1152),
    "bottleneck": (16, 48, 192, 768),
    "tokens": (16, 64, 256, 512),
    "experts": (1, 2, 4, 8),
    "stage": (0, 1, 2, 3),
    "ranks": (1, 2),
}
LABELS = {"hidden": "hidden size", "bottleneck": "bottleneck K", "tokens": "tokens of a text", "stage": "ZeRO stage"}
BATCH = 16


def measure(point: Point, threads: int) -> dict[str, float]:
    """Milliseconds per step (median) and peak memory of a rank in MiB; the batch is that of all ranks together."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = AutoTokenizer.from_pretrained(packaged_minilm())
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=point.hidden, num_hidden_layers=point.layers, num_attention_heads=12,
            intermediate_size=4 * point.hidden,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        rows = [{"text": "good " * (point.tokens - 2), "label": str(i % 2)} for i in range(BATCH * 4)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {
            "deepspeed": f"ds_configs/zero{point.stage}_fp32.json", "model_name_or_path": folder / "model", "task_name": "text",
            "train_file": folder / "train.jsonl", "max_seq_length": point.tokens, "max_steps": STEPS, "logging_steps": 1,
            "bottleneck_dim": point.bottleneck, "per_device_train_batch_size": BATCH // point.ranks, "eval_strategy": "no",
            "save_strategy": "no", "output_dir": folder / "run",
            **({"method": "madakron", "num_experts": point.experts} if point.experts > 1 else {}),
        }  # fmt: skip
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        finished = deepspeed(
            "launch/train.py", *words, "--do_train", ranks=point.ranks, env={"OMP_NUM_THREADS": str(max(1, threads // point.ranks))}
        )
        assert finished.returncode == 0, finished.output
        speeds = logged(folder / "run", "train/samples_per_second")[WARM_UP:]
        return {"ms": 1e3 * BATCH / statistics.median(speeds), "mib": max(logged(folder / "run", "train/peak_memory_mib"))}


def draw(curves: dict[str, dict[str, dict[str, float]]], file: Path) -> None:
    """A panel for each curve: time on the left, memory on the right."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 6.0), layout="constrained")
    panels = list(figure.subplots(2, 4).flat)
    for panel, (name, points) in zip(panels, curves.items(), strict=False):
        x = [int(value) for value in points]
        if max(x) >= 16 * min(x) > 0:
            panel.set_xscale("log", base=2)
        time = panel.plot(x, [one["ms"] for one in points.values()], "o-", color="tab:blue", label="ms per step")
        panel.set(xlabel=LABELS.get(name, name), ylim=(0, 1.15 * max(one["ms"] for one in points.values())))
        right = panel.twinx()
        memory = right.plot(x, [one["mib"] for one in points.values()], "s--", color="tab:orange", label="peak MiB of a rank")
        right.set(ylim=(0, 1.15 * max(one["mib"] for one in points.values())))
        panel.set_xticks(x, x, minor=False)
        panel.minorticks_off()
        lines = [*time, *memory]
    for panel in panels[len(curves) :]:
        panel.axis("off")
    panels[-1].legend(handles=lines, loc="center")
    with rc_context({"svg.hashsalt": "curves"}):  # the same bytes for the same numbers
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def main() -> None:
    """Measure, print, keep, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="Needs matplotlib.")
    options = parser.parse_args()
    curves: dict[str, Any] = {}
    known: dict[Point, dict[str, float]] = {}  # the common point is measured once
    for name in options.curves:
        print(f"\n| {name} | ms per step | peak MiB of a rank |\n|---|---|---|")
        curves[name] = {}
        for value in CURVES[name]:
            point = dataclasses.replace(Point(), **{name: value})
            known[point] = known.get(point) or measure(point, options.threads)
            curves[name][str(value)] = known[point]
            print(f"| {value} | {known[point]['ms']:.0f} | {known[point]['mib']:,.0f} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(curves, indent=1) + "\n")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()

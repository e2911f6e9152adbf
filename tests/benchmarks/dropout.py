"""Masks of examples beside torch's dropout: time of a forward and a backward pass, in turns.

`python -m tests.benchmarks.dropout` prints a Markdown table: the median of each, and the ratio. --device cuda times a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adakron.nn import DropoutMasks

SHAPES = {
    "MiniLM, hidden": (32, 64, 384),
    "BERT-base, hidden": (32, 128, 768),
    "BERT-base, attention": (32, 12, 128, 128),
    "BERT-base, pooled": (32, 768),
    "RoBERTa-large, hidden": (16, 128, 1024),
    "RoBERTa-large, attention": (16, 16, 128, 128),
}


def milliseconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Of one forward and backward pass."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = torch.device(given.device)
    print(f"{device}, threads {torch.get_num_threads()}, {given.dtype}, p = 0.1, median of {given.repeats}, forward and backward")
    print("| tensor | shape | torch, ms | per example, ms | torch / per example |\n|---|---|---|---|---|")
    masks = DropoutMasks(0)
    for name, shape in SHAPES.items():
        x = torch.randn(shape, dtype=getattr(torch, given.dtype), device=device, requires_grad=True)

        def masked(x: Tensor = x) -> Tensor:
            masks.training_pass(0, 0, np.arange(x.shape[0]))
            with masks.running(x.shape[0], x.shape[1]):
                return F.dropout(x, 0.1)

        pairs = [(milliseconds(lambda x=x: F.dropout(x, 0.1), device), milliseconds(masked, device)) for _ in range(given.repeats + 3)][3:]
        torchs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {name} | {' x '.join(map(str, shape))} | {torchs:.2f} | {ours:.2f} | {torchs / ours:.1f} |")


if __name__ == "__main__":
    main()

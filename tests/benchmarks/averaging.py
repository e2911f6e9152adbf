"""How much averaging the experts once per evaluation saves over averaging them in every forward pass.

`python -m tests.benchmarks.averaging` prints, for several sizes, the median time of a forward pass of all layers' adapters each
way, in turns. Two shapes of input: an evaluation batch, and the one new token per beam of a decoder.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from adakron.nn import BottleneckAdapter

SIZES = {"MiniLM": (6, 384, 48), "BERT-base": (12, 768, 48), "RoBERTa-large": (24, 1024, 16), "GPT-2 medium": (24, 1024, 8)}
"""Layers, D, K."""
INPUTS = {"batch 32 x 64 tokens": (32, 64), "10 beams x 1 token": (10, 1)}


def forward_all(layers: nn.ModuleList, x: torch.Tensor, *, every_time: bool) -> float:
    """Milliseconds of one forward pass; every_time: with the averages forgotten first."""
    if every_time:
        layers.eval()
    started = time.perf_counter()
    for layer in layers:
        x = layer(x)
    return 1e3 * (time.perf_counter() - started)


@torch.inference_mode()
def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    given = parser.parse_args()
    print(f"threads {torch.get_num_threads()}, {given.dtype}, MAdaKron with 4 experts in both down projections, median of {given.repeats}")
    print("| model | input | every pass, ms | once, ms | ratio |\n|---|---|---|---|---|")
    for model, (count, hidden, width) in SIZES.items():
        layers = nn.ModuleList(
            BottleneckAdapter(hidden, width, num_experts=4, experts_in=("down_a", "down_b"), dtype=getattr(torch, given.dtype))
            for _ in range(count)
        ).eval()
        for name, shape in INPUTS.items():
            x = torch.randn(*shape, hidden).to(getattr(torch, given.dtype))
            pairs = [[forward_all(layers, x, every_time=each) for each in (True, False)] for _ in range(given.repeats + 3)][3:]
            each, once = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"| {model} | {name} | {each:.2f} | {once:.2f} | {each / once:.2f} |")


if __name__ == "__main__":
    main()

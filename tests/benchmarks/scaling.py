"""How far training scales, on paper: `python -m tests.benchmarks.scaling`. Nothing is measured here but the parameters, which are counted.

RoBERTa-large, fed as by its recipes (K = 16; 64 examples of up to 128 tokens per GPU, half of them padding), on hosts of 8 GPUs. A ring
moves 2 (n - 1) / n of the bytes over each host's link, in 2 (n - 1) turns (Patarasu and Yuan, 2009, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", section 3); ZeRO-2 splits it into a reduction in fp32 and a gather in bf16 of half the turns each.
Nothing is hidden behind the computation, which makes it the worst case: DeepSpeed starts the reduction inside the backward pass.
"""

from dataclasses import dataclass

import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

from adakron import models
from adakron.config import AdapterConfig
from adakron.trainable import ParameterReport, parameter_report

GPUS_PER_HOST = 8
GPUS = (1, 8, 16, 32, 64)

FLOPS_PER_SECOND = 312e12 * 0.4
"""bf16 on tensor cores of an A100 by its data sheet, of which 40 % is a common share to reach."""

TOKENS = 64 * 64
"""Per GPU and step, padding left out."""


@dataclass(frozen=True)
class Link:
    """What connects two hosts. bandwidth: bytes per second. latency: seconds per turn, the software's part included."""

    name: str
    bandwidth: float
    latency: float


LINKS = (Link("200 Gbit/s InfiniBand", 25e9, 20e-6), Link("10 Gbit/s Ethernet", 1.25e9, 100e-6))


def counted() -> ParameterReport:
    """RoBERTa-large with adapters and a head of two labels, built without memory."""
    config = RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1, num_labels=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = RobertaForSequenceClassification(config)
    info = models.adapt(model, AdapterConfig(bottleneck_dim=16, kron_factor=4), seed=0)
    return parameter_report(model, info)


def computing(blocks: int, flops_per_parameter: int) -> float:
    """Seconds of a step's passes. blocks: parameters of the layers; embeddings are looked up."""
    return TOKENS * blocks * flops_per_parameter / FLOPS_PER_SECOND


def communicating(trained: int, gpus: int, link: Link) -> float:
    """Seconds of a step's collectives at ZeRO-2: 4 bytes of each gradient go round, then 2 of each new value."""
    if gpus <= GPUS_PER_HOST:
        return 0.0  # inside a host the link is one to two orders of magnitude faster
    return (gpus - 1) / gpus * trained * (4 + 2) / link.bandwidth + 2 * (gpus - 1) * link.latency


def main() -> None:
    """Print the table of docs/multinode.md."""
    report = counted()
    embeddings = (50265 + 514 + 1) * 1024
    blocks = report.backbone - embeddings
    # A frozen layer needs two products per token, forward and back; one that trains a third, for its own gradient.
    kinds = (("AdaKron", report.trainable, 4), ("all parameters", report.backbone + report.head, 6))
    print(f"adapters {report.adapter:,}, head {report.head:,}, backbone {report.backbone:,}, {blocks:,} of it in layers")
    for name, trained, flops in kinds:
        print(f"{name}: {trained * 6 / 2**20:,.1f} MiB per step, passes {computing(blocks, flops) * 1e3:.1f} ms")
    print("| GPUs |" + "".join(f" {name}, {link.name} |" for name, _, _ in kinds for link in LINKS))
    for gpus in GPUS:
        cells = []
        for _, trained, flops in kinds:
            for link in LINKS:
                passes, network = computing(blocks, flops), communicating(trained, gpus, link)
                cells.append(f"{network * 1e3:,.1f} ms, {100 * passes / (passes + network):.0f} %")
        print(f"| {gpus} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

"""Memory of one training step on E2E: logits at targets only, beside logits of every padded token.

    python -m tests.benchmarks.target_logits DATA_FOLDER        # holds e2e_nlg/ and tokenizers/gpt2/

A GPT-2 of the small model's shape (124 million random parameters, frozen) with AdaKron adapters, 8 examples of E2E's training split,
fp32 on the CPU. Each form is measured in a process of its own: what the peak of resident memory grows by in forward and backward.
"""

import resource
import subprocess
import sys
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from adakron.causal import accept_targets
from adakron.config import AdapterConfig, DataConfig, TrainingConfig
from adakron.data.sampler import GlobalBatchSampler
from adakron.models import adapt
from adakron.tasks import create_task
from adakron.tasks.base import Batch
from adakron.tasks.causal import CausalTask

FORMS = ("targets", "packed", "padded", "padded to 512")
_MIB = 2**20


def main() -> None:
    """One line per form; with a form's name behind the folder that form alone, in this process."""
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), sys.argv[2])
        return
    print("| logits | rows x tokens | logits kept, MiB | peak of the step, MiB | loss |\n|---|---|---|---|---|", flush=True)
    for form in FORMS:
        subprocess.run([sys.executable, "-m", "tests.benchmarks.target_logits", sys.argv[1], form], check=True)


def measure(data: Path, form: str) -> None:
    """Print the form's line."""
    datasets.disable_progress_bars()
    settings = DataConfig(task_name="e2e_nlg", data_dir=str(data / "e2e_nlg"), max_seq_length=512, pack=form == "packed")
    task = create_task(settings, TrainingConfig(label_smoothing=0.1))
    assert isinstance(task, CausalTask)
    tokenizer = GPT2Tokenizer.from_pretrained(data / "tokenizers" / "gpt2")
    encoded = task.encode("train", tokenizer)
    sampler = GlobalBatchSampler(encoded.lengths, micro_batch=8, global_batch=8, seed=110)
    batch = task.collate(encoded, next(sampler.epoch(0)).micro_batches[0], tokenizer.eos_token_id)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager"))
    adapt(model, AdapterConfig(bottleneck_dim=8), seed=0)
    accept_targets(model)
    step = (lambda: targets_only(model, task, batch)) if form in FORMS[:2] else (lambda: every_token(model, batch, form == FORMS[3]))
    before = _peak()
    loss, kept = step()
    loss.backward()
    shape = f"{batch['input_ids'].shape[0]} x {512 if form == FORMS[3] else batch['input_ids'].shape[1]}"
    print(f"| {form} | {shape} | {kept / _MIB:,.0f} | {_peak() - before:,.0f} | {float(loss.detach()):.3f} |", flush=True)


def targets_only(model: nn.Module, task: CausalTask, batch: Batch) -> tuple[Tensor, int]:
    """Ours. The loss, and the bytes of the logits."""
    loss, logits = task.loss(model, batch)
    return loss, logits.numel() * logits.element_size()


def every_token(model: nn.Module, batch: Batch, to_512: bool) -> tuple[Tensor, int]:
    """Logits of the whole padded batch, a loss that ignores what is no target."""
    width = batch["input_ids"].shape[1]
    labels = torch.full(batch["input_ids"].shape, -100).flatten()
    labels[batch["target_positions"]] = batch["targets"]
    more = (0, 512 - width if to_512 else 0)
    ids, mask = F.pad(batch["input_ids"], more), F.pad(batch["attention_mask"], more)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    wanted = F.pad(labels.view(-1, width), more, value=-100).flatten()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted, ignore_index=-100, reduction="sum", label_smoothing=0.1)
    return loss, logits.numel() * logits.element_size()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()

"""Loops of plain PyTorch: ours without an engine, and the arithmetic of the published procedure."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import get_linear_schedule_with_warmup

from adakron import models
from adakron.config import AdapterConfig
from adakron.data.sampler import epoch_order
from adakron.weights import DTYPES
from launch.contenders.pace import Pace
from launch.contenders.workload import Loaded, Workload, load


def plain(workload: Workload, pace: Pace) -> None:
    """Our adapters, the whole model in the run's precision, batches padded to their longest example; no engine, no metrics."""
    _loop(workload, pace, pad_to=None, autocast=False)


def published(workload: Workload, pace: Pace) -> None:
    """What the published scripts compute per step: every batch padded to max_seq_length, the model in fp32, under autocast where a
    precision is asked for. (AdaKron's repository, Run_RoBERTa/*.sh: --pad_to_max_length by default, transformers' Trainer.)
    """
    _loop(workload, pace, pad_to=workload.max_seq_length, autocast=True)


def _loop(workload: Workload, pace: Pace, *, pad_to: int | None, autocast: bool) -> None:
    loaded = load(workload)
    model = loaded.model
    torch.manual_seed(workload.seed)
    models.adapt(model, AdapterConfig(bottleneck_dim=workload.bottleneck_dim), seed=workload.seed, new_parameters=loaded.new_parameters)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[workload.precision]
    if not autocast:
        models.cast_parameters(model, dtype)
    nn.Module.to(model, device)  # transformers wraps its own, which has no types
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=workload.learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * workload.total_steps), workload.total_steps)
    for batch in _batches(workload, loaded, pad_to):
        pace.before_step()
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = inputs.pop("labels")
        with torch.autocast(device.type, dtype, enabled=autocast and workload.precision != "fp32"):
            logits = model(**inputs).logits
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    pace.end_round()


def _batches(workload: Workload, loaded: Loaded, pad_to: int | None) -> Iterator[dict[str, Tensor]]:
    rows = loaded.rows
    pad: Any = loaded.tokenizer
    for epoch in range(workload.rounds + 1):
        order = epoch_order(len(rows), workload.seed, epoch)
        for places in np.array_split(order, workload.steps_per_round):
            chosen = [rows[place] for place in places]
            padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
            yield dict(pad.pad(chosen, return_tensors="pt", **padding))

"""Trains PEFT's methods under DeepSpeed, many in one launch, and saves each.

Started as `deepspeed --module tests.helpers.peft_worker REQUEST RESULT`, REQUEST holding {"folder": ..., "cases": [...]}. As a
module and not as a script: a script's folder comes first on the path, and `launch.py` in this one would hide the package.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from adakron import distributed, trainable
from adakron.config import AdapterConfig, TrainingConfig
from adakron.engine import ds_config
from adakron.engine.engine import TrainingEngine
from adakron.launcher import World
from adakron.peft import folders
from adakron.peft.methods import Attached, attach
from launch.program import execute
from tests.helpers.architectures import tiny_model
from tests.helpers.launch import ROOT

SETTINGS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 16},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "frod": {"progressbar": False},
    "ln_tuning": {"target_modules": ["LayerNorm"]},
    "miss": {"r": 8},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [1, 2, 3, 4, 5]},
    "vblora": {"vector_length": 16, "num_vectors": 20},
    "waveft": {"n_frequency": 50},
}
"""Where PEFT's defaults do not suit a model of width 32."""

STEPS = 3
ROWS = {"input_ids": torch.arange(2, 30).reshape(4, 7), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
LABELS = torch.tensor([0, 1, 2, 1])
TRAINING = TrainingConfig(
    learning_rate=2e-2, weight_decay=0.1, max_grad_norm=0.5, lr_scheduler_type="constant", warmup_ratio=0.0, max_steps=STEPS,
    per_device_train_batch_size=2, adam_epsilon=1e-6,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A method under a shipped JSON, whose precision `bf16` decides anew."""

    method: str
    deepspeed: str
    bf16: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-{self.deepspeed}" + ("-bf16" if self.bf16 else "")


def backbone() -> PreTrainedModel:
    """A tiny BERT without dropout, whose weights are large enough for every method to matter."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 5.0
    return model


def attached(method: str, dtype: torch.dtype = torch.float32) -> Attached:
    """The backbone with the method's adapters; the same at every call."""
    model = backbone()
    settings = SETTINGS.get(method)
    return attach(model, AdapterConfig(method=method, method_config=json.dumps(settings) if settings else None), seed=3, dtype=dtype)


def plain_loop(method: str) -> tuple[list[float], Tensor]:
    """Losses of the steps and final logits of an ordinary PyTorch loop over the whole batch in float32."""
    found = attached(method)
    model = found.model.train()
    optimizer = torch.optim.AdamW(
        trainable.trainable_groups(model, TRAINING.weight_decay, found.vectors), lr=TRAINING.learning_rate, eps=TRAINING.adam_epsilon
    )
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(**ROWS).logits, LABELS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return losses, model.eval()(**ROWS).logits


def train_case(folder: Path, case: Case, world: World, device: torch.device) -> dict[str, Any]:
    """Losses of the steps and final logits; the trained adapter goes to a folder of the case's name."""
    found = attached(case.method, torch.bfloat16 if case.bf16 else torch.float32)
    source = ds_config.read_json(str(ROOT / "ds_configs" / f"{case.deepspeed}.json")) | {"bf16": {"enabled": case.bf16}}
    values = ds_config.RunValues(micro_batch=2, accumulation=1, world_size=world.world_size, max_grad_norm=TRAINING.max_grad_norm)
    engine = TrainingEngine(
        found.model, trainable.trainable_groups(found.model, TRAINING.weight_decay, found.vectors), ds_config.resolve(source, values),
        TRAINING, total_steps=STEPS, device=device,
    )  # fmt: skip
    mine = slice(2 * world.rank, 2 * world.rank + 2)
    losses = []
    engine.train()
    for _ in range(STEPS):
        logits = engine(**{name: rows[mine] for name, rows in ROWS.items()}).logits.float()
        loss = F.cross_entropy(logits, LABELS[mine], reduction="sum")
        engine.backward(loss, len(LABELS))
        engine.step()
        losses.append(sum(distributed.all_gather_object(loss.item())) / len(LABELS))
    tensors = engine.trainable_tensors()
    engine.eval()
    with torch.no_grad():
        logits = engine(**ROWS).logits.float()
    if world.rank == 0:
        head = {"base_model": "some/model", "auto_class": "AutoModelForSequenceClassification", "model_options": {}}
        folders.save(folder / case.name, found, tensors=tensors, **head)
    return {"losses": losses, "logits": logits.tolist()}


def main(arguments: Sequence[str], world: World) -> None:
    """Train every case of the request, in order; what one raises is its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("request", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--local_rank", type=int)  # the launcher adds it
    given = parser.parse_args(arguments)
    request = json.loads(given.request.read_text())
    device = distributed.select_device(world, os.environ)
    distributed.form_group(world, device)
    results: list[dict[str, Any]] = []
    for values in request["cases"]:
        try:
            results.append(train_case(Path(request["folder"]), Case(**values), world, device))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    if world.rank == 0:
        given.result.write_text(json.dumps(results))


def write_request(folder: Path, cases: Sequence[Case]) -> Path:
    """The request for these cases, whose adapters go into the folder."""
    request = folder / "request.json"
    request.write_text(json.dumps({"folder": str(folder), "cases": [dataclasses.asdict(case) for case in cases]}))
    return request


if __name__ == "__main__":
    execute(main)

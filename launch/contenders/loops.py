"""Loops of plain PyTorch: ours without an engine, and the arithmetic of the published procedure."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from adakron import models, trainable
from adakron.config import AdapterConfig
from adakron.data.sampler import epoch_order, evaluation_batches
from adakron.launcher import World
from adakron.passes import ForwardPass
from adakron.tasks.base import to_device
from adakron.weights import DTYPES
from launch.contenders.pace import Pace
from launch.contenders.workload import EVALUATION_BATCH, Loaded, Workload, load, rows, validation_split
from launch.preparing import Prepared, prepare


def plain(workload: Workload, pace: Pace) -> None:
    """Our adapters, the whole model in the run's precision, batches padded to their longest example; no engine, no metrics."""
    _loop(workload, pace, pad_to=None, autocast=False)


def published(workload: Workload, pace: Pace) -> None:
    """What the published scripts compute per step: every batch padded to max_seq_length, the model in fp32, under autocast where a
    precision is asked for. (AdaKron's repository, Run_RoBERTa/*.sh: --pad_to_max_length by default, transformers' Trainer.)
    """
    _loop(workload, pace, pad_to=workload.max_seq_length, autocast=True)


def plain_fast(workload: Workload, pace: Pace) -> None:
    """The model, kernels, dropout and batches of a run of this engine, as launch/train.py prepares them, with nothing around them: no
    DeepSpeed and no metrics, torch's AdamW on parameters in the run's precision.
    """
    run = prepare(workload.config(), World())
    training, task, model = run.config.training, run.task, run.attached.model
    torch.manual_seed(training.seed)
    models.cast_parameters(model, DTYPES[workload.precision])
    model.to(run.device)
    model.train()
    groups = trainable.trainable_groups(model, training.weight_decay, run.attached.vectors)
    trained = [parameter for group in groups for parameter in group["params"]]
    optimizer, schedule = _optimizer(groups, workload)
    pace.instrument = lambda phases: phases.wrap(run.sampler, "_share", "data")
    phase, step = pace.phases.of, 0
    for epoch in range(workload.passes):
        for batch in run.sampler.epoch(epoch):
            pace.before_step()
            for micro_step, examples in enumerate(batch.micro_batches):
                with phase("data"):
                    inputs = to_device(task.collate(run.encoded["train"], examples, run.pad_token_id), run.device)
                with phase("forward"):
                    if run.before_pass is not None:
                        run.before_pass(ForwardPass(step, micro_step, 0, examples))
                    loss, _ = task.loss(model, inputs)
                with phase("backward"):
                    (loss / len(batch.examples)).backward()
            with phase("optimizer"):
                _update(trained, optimizer, schedule)
            step += 1
    pace.end_round()
    pace.evaluation(partial(_sorted_scoring, run))


def _sorted_scoring(run: Prepared) -> Callable[[], object]:
    model, split = run.attached.model.eval(), run.task.encode(validation_split(run.task), run.tokenizer)

    @torch.no_grad()
    def score() -> None:
        for indices in evaluation_batches(split.lengths, EVALUATION_BATCH, 1, 0):
            batch = run.task.collate(split, indices, run.pad_token_id)
            run.task.predict(model, to_device(batch, run.device)).cpu()

    return score


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
    optimizer, schedule = _optimizer([{"params": trained}], workload)
    context = partial(torch.autocast, device.type, dtype, enabled=autocast and workload.precision != "fp32")
    phase, pad = pace.phases.of, partial(_padded, loaded, pad_to, device)
    examples = rows(loaded.train)
    for places in _order(workload, len(examples)):
        pace.before_step()
        with phase("data"):
            inputs = pad(examples[place] for place in places)
            labels = inputs.pop("labels")
        with phase("forward"):
            with context():
                logits = model(**inputs).logits
            loss = F.cross_entropy(logits.float(), labels)
        with phase("backward"):
            loss.backward()
        with phase("optimizer"):
            _update(trained, optimizer, schedule)
    pace.end_round()
    pace.evaluation(lambda: _scoring(loaded, pad, context))


def _scoring(loaded: Loaded, pad: Callable[..., dict[str, Tensor]], context: Callable[[], Any]) -> Callable[[], object]:
    assert loaded.validation is not None
    model, examples = loaded.model.eval(), rows(loaded.validation)

    @torch.no_grad()
    def score() -> None:
        for start in range(0, len(examples), EVALUATION_BATCH):
            inputs = pad(examples[start : start + EVALUATION_BATCH])
            del inputs["labels"]
            with context():
                model(**inputs).logits.float().cpu()

    return score


def _optimizer(groups: list[dict[str, Any]], workload: Workload) -> tuple[AdamW, LambdaLR]:
    optimizer = AdamW(groups, lr=workload.learning_rate)
    return optimizer, get_linear_schedule_with_warmup(optimizer, workload.warmup_steps, workload.total_steps)


def _update(trained: list[nn.Parameter], optimizer: AdamW, schedule: LambdaLR) -> None:
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def _order(workload: Workload, examples: int) -> Iterator[np.ndarray]:
    for epoch in range(workload.passes):
        yield from np.array_split(epoch_order(examples, workload.seed, epoch), workload.steps_per_round)


def _padded(loaded: Loaded, pad_to: int | None, device: torch.device, chosen: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    pad: Any = loaded.tokenizer
    padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
    return {name: tensor.to(device) for name, tensor in pad.pad(list(chosen), return_tensors="pt", **padding).items()}

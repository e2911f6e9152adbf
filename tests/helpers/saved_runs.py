"""Run folders as launch/train.py leaves them, without the training: adapters and head hold random values."""

from pathlib import Path
from typing import Any

import torch

from adakron import backbone, run_folder
from adakron.adapter_io import save_adapter
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.fingerprint import take_fingerprint
from adakron.models import adapt
from adakron.tasks import create_task


def write_run(
    folder: Path, model: Path, *, seed: int, options: dict[str, Any] | None = None, precision: str = "fp32", **settings: Any
) -> Path:
    """A finished run on the backbone in `model`.

    options: what a task of own data knows of its classes. settings: those of the data and the adapter, by name.
    """
    data = DataConfig(**{name: value for name, value in settings.items() if name in DataConfig.__dataclass_fields__})
    own = {name: value for name, value in settings.items() if name in AdapterConfig.__dataclass_fields__}
    adapter = AdapterConfig(**({"bottleneck_dim": 8, "init_std": 0.3} | own)).resolved()
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(model)), adapter=adapter, data=data, training=TrainingConfig(seed=seed),
        deepspeed="ds_configs/zero2.json",
    )  # fmt: skip
    task = create_task(data, config.training, model_options=options)
    base = backbone.load_backbone(config.model, auto_class=task.auto_class, options=task.model_options(), seed=seed)
    fingerprint = take_fingerprint(base.model, base.tokenizer)
    info = adapt(base.model, adapter, seed=seed, new_parameters=base.new_parameters)
    tensors = {name: value for name, value in base.model.named_parameters() if value.requires_grad}
    tensors |= {name: value for name, value in base.model.named_buffers() if name.endswith("expert_scores")}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in tensors.values():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    save_adapter(
        folder, tensors=tensors, adapter=adapter, info=info, base_model=base.name, auto_class=task.auto_class,
        model_options=task.model_options(), backbone=fingerprint,
    )  # fmt: skip
    run_folder.write_json(folder / run_folder.RUN_FILE, {"config": config.to_dict(), "precision": precision})
    return folder

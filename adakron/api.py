"""Adapters from Python, without the programs: `adakron.load_adapter`."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adakron import adapter_io
from adakron.adapter_folder import AdapterFolder, read_adapter_config
from adakron.errors import CheckpointError
from adakron.placement import some_of


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_other_backbone: bool = False,
) -> PreTrainedModel:
    """The model with a saved adapter and head in it, in evaluation mode; the same object, changed.

    model: the backbone, from the Auto class that the folder was saved for, with as many labels as the saved head. Its
    configuration takes the names of the labels.
    folder: an output folder of a run, a checkpoint-<step> folder, or what `launch/convert.py` wrote.
    tokenizer: compared with the one of the training where it is given. allow_other_backbone: warn, and load all the same, where
    the adapter was trained on another backbone.
    Raises CheckpointError where the folder is damaged or does not fit the model; the model's values are then unchanged.
    """
    saved = read_adapter_config(folder)
    _check_model(model, saved, folder)
    adapter_io.load_into(model, folder, tokenizer=tokenizer, allow_other_backbone=allow_other_backbone)
    if "id2label" in saved.model_options:
        names: dict[int, str] = saved.model_options["id2label"]
        model.config.id2label = dict(names)
        model.config.label2id = {name: index for index, name in names.items()}
    return model.eval()


def _check_model(model: PreTrainedModel, saved: AdapterFolder, folder: str | Path) -> None:
    modules = {name for name, _ in model.named_modules()}
    labels = saved.model_options.get("num_labels")
    remedy = f"load the backbone with {saved.auto_class}.from_pretrained({saved.base_model!r}"
    remedy += f", num_labels={labels})" if labels is not None else ")"
    kinds = {"a head": saved.head_modules, "adapters": saved.sites}
    absent = {what: [name for name in names if name not in modules] for what, names in kinds.items()}
    lost = [f"{what} for {some_of(names, 4)}" for what, names in absent.items() if names]
    if lost:
        raise CheckpointError(f"{folder} holds {' and '.join(lost)}, which this {type(model).__name__} does not have; {remedy}")
    if labels is not None and model.config.num_labels != labels:
        names = ", ".join(map(str, saved.model_options.get("id2label", {}).values()))
        raise CheckpointError(
            f"the head in {folder} has {labels} labels{f' ({names})' if names else ''}, and this {type(model).__name__} has"
            f" {model.config.num_labels}; {remedy}"
        )

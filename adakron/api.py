"""Adapters from Python, without the programs: `adakron.load_adapter`."""

from pathlib import Path

from transformers import PreTrainedModel

from adakron import adapter_io
from adakron.adapter_io import AdapterFolder, read_adapter_config
from adakron.errors import CheckpointError


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The model with a saved adapter and head in it, in evaluation mode; the same object, changed.

    model: the backbone, from the Auto class that the folder was saved for, with as many labels as the saved head. Its
    configuration takes the names of the labels.
    folder: an output folder of a run, a checkpoint-<step> folder, or what `launch/convert.py` wrote.
    Raises CheckpointError where the folder is damaged or does not fit the model; the model's values are then unchanged.
    """
    saved = read_adapter_config(folder)
    _check_head(model, saved, folder)
    adapter_io.load_adapter(model, folder)
    if "id2label" in saved.model_options:
        model.config.id2label = dict(saved.model_options["id2label"])
        model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    return model.eval()


def _check_head(model: PreTrainedModel, saved: AdapterFolder, folder: str | Path) -> None:
    modules = {name for name, _ in model.named_modules()}
    labels = saved.model_options.get("num_labels")
    remedy = f"load the backbone with {saved.auto_class}.from_pretrained({saved.base_model!r}"
    remedy += f", num_labels={labels})" if labels is not None else ")"
    absent = [name for name in saved.head_modules if name not in modules]
    if absent:
        raise CheckpointError(
            f"{folder} holds a head ({', '.join(absent)}), and this {type(model).__name__} has none of that name; {remedy}"
        )
    if labels is not None and model.config.num_labels != labels:
        names = ", ".join(map(str, saved.model_options.get("id2label", {}).values()))
        raise CheckpointError(
            f"the head in {folder} has {labels} labels{f' ({names})' if names else ''}, and this {type(model).__name__} has"
            f" {model.config.num_labels}; {remedy}"
        )

"""Exchange adapters with the published implementations, merge the experts of a mixture, write a fully trained model as one.

    python launch/convert.py import FILE --model_name_or_path BASE --output_dir OUT
    python launch/convert.py export FOLDER --output_file FILE
    python launch/convert.py merge FOLDER --output_dir OUT
    python launch/convert.py model FOLDER --output_dir OUT

What is read, written and refused: docs/migration.md. Nothing that exists is overwritten.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import dataclasses
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from adakron import adapter_folder, adapter_io, backbone, models, reference, run_folder
from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.fingerprint import take_fingerprint
from adakron.launcher import World
from adakron.redaction import redact_arguments, redact_values
from adakron.store import CHECKPOINT_PREFIX
from adakron.tasks import create_task
from adakron.tasks.glue import GLUE_TASKS
from adakron.trainable import AdaptedModelInfo
from launch.arguments import Parser
from launch.program import execute, refuse_launcher
from launch.saved_run import read_record


def main(arguments: Sequence[str], world: World) -> None:
    """Run one of the four commands."""
    refuse_launcher(world)
    command = arguments[0] if arguments else ""
    if command in ("-h", "--help"):
        print((__doc__ or "").strip() + "\n\nEach command has its own --help.")
    elif command in COMMANDS:
        COMMANDS[command](arguments[1:])
    else:
        raise ConfigError(f"the first argument is {command!r}; it must be {', '.join(COMMANDS)} (see --help)")


def import_(arguments: Sequence[str]) -> None:
    """A published checkpoint becomes an adapter folder."""
    parser = _parser("import", "Read a checkpoint of AdaKron's or AdaMix's code into an adapter folder.")
    parser.add_argument("file", help="pytorch_model_expert_soup.bin (GLUE), model.final.pt or model.<step>.pt (text generation).")
    parser.add_argument("--model_name_or_path", required=True, help="The backbone it was trained on: a local folder or a hub id.")
    parser.add_argument("--output_dir", required=True, help="The adapter folder to write; it must not exist, or be empty.")
    parser.add_argument("--task_name", choices=(*GLUE_TASKS, "text"), help="What it was trained for; evaluate.py then takes the folder.")
    parser.add_argument(
        "--label_names", help="Comma-separated names of the classes, in order. Default: the task's, or the backbone's, or 0,1,..."
    )
    options = parser.parse(arguments)
    folder = run_folder.free_folder(options.output_dir)
    names = None if options.label_names is None else [name.strip() for name in options.label_names.split(",")]
    if names is not None and options.task_name in GLUE_TASKS:
        raise ConfigError(f"task {options.task_name} names its classes itself; drop --label_names")
    imported = reference.import_checkpoint(options.file, options.model_name_or_path, names)
    model_options = _task_options(options.task_name, imported)
    tokenizer = reference.find_tokenizer(options.model_name_or_path)
    trained = {name: parameter for name, parameter in imported.model.named_parameters() if parameter.requires_grad}
    adapter_io.save_adapter(
        folder,
        tensors={**trained, **models.adapter_buffers(imported.model, imported.info)},
        adapter=imported.adapter,
        info=imported.info,
        base_model=reference.base_name(options.model_name_or_path),
        auto_class=imported.auto_class,
        model_options=model_options,
        backbone=take_fingerprint(imported.model, tokenizer),
        extra=imported.extra,
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if options.task_name is not None:
        _write_run(folder, options.task_name, imported.adapter, reference.base_name(options.model_name_or_path))
    print(f"{options.file} was written by {imported.layout.code}: {_described(imported.adapter)} in {len(imported.info.sites)} layers")
    print(f"adapter folder: {folder}" + ("" if tokenizer is not None else " (the backbone has no tokenizer, so none is in it)"))


def _task_options(task_name: str | None, imported: reference.Imported) -> dict[str, Any]:
    """The file's labels, with the names that a GLUE task gives them."""
    if task_name is None:
        return imported.model_options
    if imported.layout.format == "nlg":
        raise ConfigError(f"--task_name is {task_name}, and the file is a language model's; drop --task_name")
    if task_name == "text":
        return imported.model_options
    expected = create_task(DataConfig(task_name=task_name), TrainingConfig()).model_options()
    labels = imported.model_options["num_labels"]
    if labels != expected["num_labels"]:
        raise ConfigError(
            f"--task_name is {task_name}, whose head has {expected['num_labels']} outputs, and the file's has {labels}; name another task"
        )
    return expected


def _write_run(folder: Path, task_name: str, adapter: AdapterConfig, base: str) -> None:
    """The configuration that evaluate.py and predict.py read; the published codes compute in float32."""
    config = RunConfig(
        model=ModelConfig(model_name_or_path=base), adapter=adapter, data=DataConfig(task_name=task_name), training=TrainingConfig(),
        deepspeed="",
    )  # fmt: skip
    record = {"config": config.to_dict(), "precision": "fp32", "command": redact_arguments(sys.argv), **run_folder.environment()}
    run_folder.write_json(folder / run_folder.RUN_FILE, redact_values(record))


def export(arguments: Sequence[str]) -> None:
    """An adapter folder becomes a published checkpoint."""
    parser = _parser("export", "Write an adapter folder in the form that AdaKron's or AdaMix's code reads.")
    parser.add_argument("folder", help="Output folder of a run, or another adapter folder.")
    parser.add_argument("--output_file", required=True, help="The file to write; it must not exist.")
    parser.add_argument("--model_name_or_path", help="Where the adapter's backbone is now, if it moved.")
    parser.add_argument(
        "--format", choices=reference.EXPORT_FORMATS, help="glue: adapters and head. nlg: with all of GPT-2. Default: by the model."
    )
    options = parser.parse(arguments)
    file = Path(options.output_file)
    if file.exists():
        raise ConfigError(f"--output_file {file} exists; name another file, or delete it")
    run_folder.check_writable(file.parent)
    exported = reference.export_checkpoint(options.folder, base=options.model_name_or_path, form=options.format)
    reference.write_checkpoint(exported.content, file)
    print(f"{file}: for {exported.layout.code}")


def merge(arguments: Sequence[str]) -> None:
    """A mixture becomes an adapter with one expert, their average."""
    parser = _parser("merge", "Average the experts of an adapter folder into one; evaluation gives what inference_level 3 gave.")
    parser.add_argument("folder", help="Output folder of a run, one of its checkpoint-<step> folders, or another adapter folder.")
    parser.add_argument("--output_dir", required=True, help="The folder to write; it must not exist, or be empty.")
    options = parser.parse(arguments)
    source, folder = Path(options.folder), run_folder.free_folder(options.output_dir)
    saved = adapter_folder.read_adapter_config(source)
    tensors, single = adapter_io.merge_experts(adapter_io.read_adapter_tensors(source), saved.adapter, saved.sites)
    record = _merged_run(source, single)
    adapter_io.save_adapter(
        folder,
        tensors=tensors,
        adapter=single,
        info=AdaptedModelInfo(saved.sites, saved.head_modules, (), saved.tuned_parameters),
        base_model=saved.base_model,
        auto_class=saved.auto_class,
        model_options=saved.model_options,
        backbone=saved.backbone,
        extra=saved.extra,
    )
    for name in sorted(run_folder.TOKENIZER_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if record is not None:
        run_folder.write_json(folder / run_folder.RUN_FILE, record)
    print(f"{_described(saved.adapter)} averaged into one expert: {folder}")
    if record is not None:
        print(f"evaluate: {sys.executable} launch/evaluate.py {folder}")


def model_(arguments: Sequence[str]) -> None:
    """What a run without adapters trained becomes a model folder of transformers, to be the backbone of other runs."""
    parser = _parser("model", "Write what --method full, bitfit or head trained as a plain model folder (--model_name_or_path).")
    parser.add_argument("folder", help="Output folder of a run, or one of its checkpoint-<step> folders.")
    parser.add_argument("--output_dir", required=True, help="The folder to write; it must not exist, or be empty.")
    parser.add_argument("--model_name_or_path", help="Where the run's backbone is now, if it moved.")
    options = parser.parse(arguments)
    source, folder = Path(options.folder), run_folder.free_folder(options.output_dir)
    saved = adapter_folder.read_adapter_config(source)
    if saved.sites:
        raise ConfigError(
            f"{source} holds adapters ({saved.adapter.method}), which no model of transformers has; load them beside their backbone"
        )
    base = backbone.load_backbone(
        ModelConfig(model_name_or_path=options.model_name_or_path or saved.base_model, tokenizer_name=str(source)),
        auto_class=saved.auto_class,
        options=saved.model_options,
        seed=0,
    )
    adapter_io.load_into(base.model, source, tokenizer=base.tokenizer)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    print(f"{type(base.model).__name__}, {saved.adapter.method}: {folder} (use it with --model_name_or_path {folder})")


def _merged_run(source: Path, adapter: AdapterConfig) -> dict[str, Any] | None:
    """The run's configuration for the merged folder, which evaluate.py and predict.py read; None where there is no run."""
    # A checkpoint's is that of the run around it.
    home = source.parent if source.name.startswith(CHECKPOINT_PREFIX) else source
    if not (home / run_folder.RUN_FILE).is_file():
        return None
    record, saved, _ = read_record(home)
    # There is nothing left to merge.
    merged = dataclasses.replace(saved, adapter=adapter, training=dataclasses.replace(saved.training, merge_experts=False))
    return {**record, "config": merged.to_dict(), "merged_from": str(source.absolute())}


def _parser(command: str, description: str) -> Parser:
    parser = Parser((), description)
    parser.prog = f"convert.py {command}"
    return parser


def _described(adapter: AdapterConfig) -> str:
    experts = f", {adapter.num_experts} experts in {adapter.experts_in}" if (adapter.num_experts or 1) > 1 else ""
    return f"{adapter.method} with bottleneck_dim {adapter.bottleneck_dim}{experts}"


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"import": import_, "export": export, "merge": merge, "model": model_}

if __name__ == "__main__":
    execute(main)

"""Command line and YAML recipe to configuration: default < recipe < command line. Unknown keys and flags are errors."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from adakron.config import AdapterConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from adakron.errors import ConfigError
from adakron.untrusted import YAML_BYTES, UnreadableError, parse_json, parse_yaml, read_text, read_yaml
from launch.messages import did_you_mean
from launch.published import ELSEWHERE, add_published_flags, translate

GROUPS = (ModelConfig, AdapterConfig, DataConfig, TrainingConfig)
DEFAULT_DEEPSPEED = Path(__file__).resolve().parent.parent / "ds_configs" / "zero2.json"


class Parser(HfArgumentParser):
    """argparse over the configuration classes, with one ConfigError instead of a page of usage and an exit."""

    def __init__(self, groups: Sequence[Any], description: str):
        super().__init__(list(groups), description=description, allow_abbrev=False)
        optional = {name for group in groups for name, hint in get_type_hints(group).items() if hint == bool | None}
        for action in self._actions:
            if action.dest in optional:  # transformers makes `--do_train` without a value an error where the default is None
                action.nargs, action.const = "?", True

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with argparse's message."""
        raise ConfigError(f"{message}; --help lists every flag")

    def parse(self, arguments: Sequence[str], origin: str = "") -> argparse.Namespace:
        """All arguments, or a ConfigError that names the unknown ones and what they may have meant, or one that is no text."""
        # Python stands for bytes that it cannot decode by halves of surrogate pairs, which nothing behind this can encode.
        undecoded = next((given for given in arguments if any("\ud800" <= letter <= "\udfff" for letter in given)), None)
        if undecoded is not None:
            raise ConfigError(f"{origin}the argument {undecoded[:80]!a} holds bytes that are no UTF-8; give text in UTF-8")
        try:
            namespace, unknown = self.parse_known_args(list(arguments))
        except ConfigError as error:
            raise ConfigError(f"{origin}{error}") from None
        if unknown:
            raise ConfigError([f"{origin}{self.unknown(token)}" for token in unknown if token.startswith("-")] or [
                f"{origin}unexpected argument {unknown[0]!r}; values follow a flag, --help lists every flag"
            ])  # fmt: skip
        return namespace

    def unknown(self, token: str) -> str:
        """The problem with a flag that there is not."""
        flag = token.split("=")[0]
        if flag in ELSEWHERE:
            return f"{flag} is a flag of the published scripts; {ELSEWHERE[flag]} (docs/migration.md)"
        known = [option for action in self._actions for option in action.option_strings]
        return f"unknown flag {flag}{did_you_mean(flag, known)}"


def read_recipe(path: str) -> dict[str, Any]:
    """The flat mapping of a YAML recipe. Raises ConfigError where the file is none."""
    try:
        content = read_yaml(path)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror}); the project's own are launch/recipes/**/*.yaml") from error
    except UnreadableError as error:
        raise ConfigError(f"--config {path}: not valid YAML ({error}); compare launch/recipes/minilm/sst2.yaml") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: must hold `key: value` lines, the keys being flags without the dashes")
    return content


def recipe_arguments(path: str, parser: Parser) -> list[str]:
    """A recipe as command-line arguments, so that its values are checked exactly as typed ones are."""
    fields = {action.dest for action in parser._actions if action.dest not in ("config", "help", "local_rank", "replay")}
    known = fields | {option.lstrip("-") for action in parser._actions if action.dest in fields for option in action.option_strings}
    off = {option.lstrip("-") for action in parser._actions if "no" in (action.choices or ()) for option in action.option_strings}
    problems, arguments = [], []
    for key, value in read_recipe(path).items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(
                f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "; keys are flags without the dashes")
            )
        elif isinstance(value, dict | list):
            problems.append(f"--config {path}: {key} is a {type(value).__name__}; it must be a single value")
        elif value is False and key in off:
            arguments.append(f"--{key}=no")  # YAML reads a bare `no` as false
        elif value is not None:
            arguments.append(f"--{key}={value}")
    if problems:
        raise ConfigError(problems)
    parser.parse(arguments, origin=f"--config {path}: ")
    return arguments


def read_method_config(given: str) -> str:
    """The JSON text of --method_config, a JSON object or the name of a JSON or YAML file, so that a run records its content."""
    if not given.strip():
        raise ConfigError("--method_config is empty; name a JSON or YAML file, give a JSON object in quotes, or drop it")
    try:
        text = given if given.lstrip().startswith("{") else read_text(given, YAML_BYTES)
        try:
            content = parse_json(text)
        except UnreadableError:
            # JSON first: YAML reads 1e-4 as a word.
            content = parse_yaml(text)
        encoded = json.dumps(content)
    except OSError as error:
        raise ConfigError(
            f"--method_config {given}: cannot be read ({error.strerror}); name a JSON or YAML file, or give a JSON object in quotes"
        ) from error
    except (UnreadableError, TypeError) as error:
        raise ConfigError(f"--method_config {given}: neither JSON nor YAML ({error}); compare docs/peft.md") from error
    if not isinstance(content, dict):
        raise ConfigError(f'--method_config {given}: must hold settings by name, such as {{"r": 8}}')
    return encoded


def add_launcher_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that launchers append; ranks are read from the environment."""
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)


def train_parser() -> Parser:
    """The flags of launch/train.py."""
    parser = Parser(GROUPS, "Fine-tune a frozen transformer with Kronecker adapters.")
    parser.add_argument("--config", help="YAML recipe with flags as keys; flags on the command line win.")
    parser.add_argument(
        "--deepspeed", default=str(DEFAULT_DEEPSPEED), help="DeepSpeed JSON: ZeRO stage, precision, offload. See ds_configs/."
    )
    parser.add_argument(
        "--replay",
        help="Compute a step again that was not finite, from the file a run wrote. Goes with --model_name_or_path, --trust_remote_code.",
    )
    add_published_flags(parser)
    add_launcher_flags(parser)
    return parser


def parse_train(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a training run. Raises ConfigError with all problems of all groups."""
    parser = train_parser()
    recipe = _recipe_path(arguments)
    full = [*(recipe_arguments(recipe, parser) if recipe else []), *arguments]
    namespace = parser.parse(full)
    problems: list[str] = []
    try:
        for name, value in translate(namespace).items():
            setattr(namespace, name, value)
    except ConfigError as error:
        problems += error.problems
    built: dict[type, Any] = {}
    for group in GROUPS:
        try:
            built[group] = group(**{key: getattr(namespace, key) for key in group.__dataclass_fields__})
        except ConfigError as error:
            problems += error.problems
    if AdapterConfig in built:
        problems += _idle_problems(built[AdapterConfig], parser, arguments)
    if namespace.method_config is not None and AdapterConfig in built:
        try:
            built[AdapterConfig] = dataclasses.replace(built[AdapterConfig], method_config=read_method_config(namespace.method_config))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return RunConfig(
        model=built[ModelConfig],
        adapter=built[AdapterConfig].resolved(),
        data=built[DataConfig],
        training=built[TrainingConfig],
        deepspeed=namespace.deepspeed,
    )


def _idle_problems(adapter: AdapterConfig, parser: Parser, arguments: Sequence[str]) -> list[str]:
    """Flags of the command line that the method has no use for, such as LoRA with a bottleneck_dim that somebody takes for its rank."""
    dests = {option: action.dest for action in parser._actions for option in action.option_strings}
    typed = {argument.partition("=")[0] for argument in arguments}
    remedy = "give PEFT's own settings in --method_config" if adapter.preset is None else "choose another --method"
    return [
        f"{option} does nothing with method {adapter.method}; drop it, or {remedy}"
        for option in sorted(typed)
        if dests.get(option) in adapter.idle
    ]


def _recipe_path(arguments: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", nargs="?")  # a missing value is reported by the full parser
    return finder.parse_known_args(list(arguments))[0].config

"""Flags of the published scripts that have another name here, translated into ours. The whole table: docs/migration.md."""

import argparse
from typing import Any

from adakron.errors import ConfigError
from adakron.methods import METHODS

ELSEWHERE = {
    "--apply_adapter": "use --method houlsby or pfeiffer",
    "--adapter_type": "use --method houlsby or pfeiffer",
    "--apply_lora": "use --method lora",
    "--lora_r": """use --method lora --method_config '{"r": ...}'""",
    "--lora_dim": """use --method lora --method_config '{"r": ...}'""",
    "--lora_alpha": """use --method lora --method_config '{"lora_alpha": ...}'""",
    "--lora_dropout": """use --method lora --method_config '{"lora_dropout": ...}'""",
    "--apply_bitfit": "use --method bitfit",
    "--apply_adalora": "use --method lora, for AdaLoRA moves ranks between layers while it trains, which this trainer does not do",
    "--expert_soup_path": "import the file with launch/convert.py",
    "--adapter_path": "open the saved folder with launch/evaluate.py or launch/predict.py",
    "--lora_path": "open the saved folder with launch/evaluate.py or launch/predict.py",
    "--init_checkpoint": "import the file with launch/convert.py",
    "--n_experts": "use --num_experts",
    "--expert_weight_tune": "use --tune_expert_scores",
    "--pad_to_max_length": "drop it: a batch is padded to its own longest input",
    "--cls_dropout": "use --dropout",
    "--train_data": "use --train_file",
    "--valid_data": "use --validation_file",
    "--grad_acc": "use --gradient_accumulation_steps",
    "--clip": "use --max_grad_norm",
    "--lr": "use --learning_rate",
    "--max_epoch": "use --num_train_epochs",
    "--max_step": "use --max_steps",
    "--warmup_step": "use --warmup_steps",
    "--label_smooth": "use --label_smoothing",
    "--random_seed": "use --seed",
    "--seq_len": "use --max_seq_length",
    "--report_to": "drop it: TensorBoard and metrics.jsonl are always written",
    "--reg_loss_wgt": "drop it: it concerned one experiment of AdaMix",
}
"""Published flags that are unknown here -> what to do instead."""


def add_published_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that the published scripts know; `translate` turns them into settings."""
    parser.add_argument(
        "--apply_expert_soup", nargs="?", const=True, type=_boolean, default=None,
        help="Published name of what is the default here: a method with adapters.",
    )  # fmt: skip
    parser.add_argument(
        "--sharing_up", type=_boolean, default=None,
        help="Where experts are. adakron: true = --experts_in down_a,down_b, false = down_a. adamix: true = one up, false = one each.",
    )  # fmt: skip
    parser.add_argument(
        "--sharing_down", type=int, default=None,
        help="adakron: width of the projection with experts, which is kron_factor (or 0). adamix: 1 = one shared down, 0 = one each.",
    )  # fmt: skip
    parser.add_argument(
        "--use_consistency_loss", type=int, choices=(0, 1), default=None, help="Published name: 1 is --consistency_weight 1, 0 is 0."
    )


def translate(given: argparse.Namespace) -> dict[str, Any]:
    """Settings that the published flags stand for, by name; those that were not given change nothing.

    Raises ConfigError where they contradict each other or our own flags, or would do nothing.
    """
    preset = METHODS.get(given.method)
    problems = []
    if given.apply_expert_soup is False:
        problems.append("--apply_expert_soup false asks for no adapters; drop it, and choose --method full, head or bitfit")
    elif given.apply_expert_soup and (preset is None or preset.trains != "adapters"):
        problems.append(f"--apply_expert_soup means a method with adapters, but --method is {given.method}; drop one")
    settings: dict[str, Any] = {}
    if given.use_consistency_loss is not None:
        if given.consistency_weight not in (0.0, float(given.use_consistency_loss)):
            problems.append(
                f"--use_consistency_loss {given.use_consistency_loss} contradicts --consistency_weight {given.consistency_weight}; drop one"
            )
        settings["consistency_weight"] = float(given.use_consistency_loss)
    if given.sharing_up is not None or given.sharing_down is not None:
        if given.method == "adakron":
            problems += _kronecker(given, settings)
        elif given.method == "adamix":
            problems += _adamix(given, settings)
        else:
            problems.append(
                f"--sharing_up and --sharing_down place the experts of adakron and adamix, but --method is {given.method}; drop them"
            )
        if "experts_in" in settings and given.experts_in is not None:
            problems.append("--experts_in and --sharing_up or --sharing_down both place the experts; drop the latter")
    if problems:
        raise ConfigError(problems)
    return settings


def _kronecker(given: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    problems = []
    if given.sharing_down not in (None, 0, given.kron_factor):
        problems.append(
            f"--sharing_down is {given.sharing_down}; the published README means the width of the projection with experts by it, here"
            f" kron_factor, which is {given.kron_factor}; set --kron_factor, or drop --sharing_down"
        )
    named = [name for name in ("sharing_up", "sharing_down") if getattr(given, name) is not None]
    if (given.num_experts or 1) == 1:
        problems += [f"--{name} places experts, but there is one; set --num_experts above 1, or drop --{name}" for name in named]
    if given.sharing_up is not None:
        settings["experts_in"] = "down_a,down_b" if given.sharing_up else "down_a"
    return problems


def _adamix(given: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    if given.sharing_down not in (None, 0, 1):
        return [f"--sharing_down is {given.sharing_down}; for adamix it must be 1 (one shared down) or 0 (one for each expert)"]
    if given.sharing_down and given.sharing_up:
        return ["--sharing_down 1 and --sharing_up 1 leave no projection with experts; set one of them to 0, or --num_experts 1"]
    # AdaMix's own default of the flag that is not given: one projection for each expert.
    shared = {"down": bool(given.sharing_down), "up": bool(given.sharing_up)}
    settings["experts_in"] = ",".join(name for name, one in shared.items() if not one)
    return []


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")

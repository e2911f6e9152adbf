"""Make a GPT-2 with random weights, to be trained whole from nothing: `--method full --task_name lm --model_name_or_path FOLDER`.

    python launch/new_decoder.py TOKENIZER_FOLDER --output_dir FOLDER --n_layer 4 --n_embd 256 --n_head 4 --seed 0
    python launch/new_decoder.py TOKENIZER_FOLDER --output_dir FOLDER --vocabulary_from TEXTS e2e_nlg=DATA_DIR

The tokenizer is GPT-2's or another byte-level BPE. With --vocabulary_from its vocabulary is cut down to what these texts need:
they are tokenised as before, token by token, and any other text still can be, for every single byte stays a token.
"""

import sys
from pathlib import Path

if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # a script's folder comes first on the path: evaluate.py there would hide the package evaluate


import json
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adakron import run_folder
from adakron.config import DataConfig, ModelConfig, TrainingConfig
from adakron.errors import ConfigError, DataError
from adakron.launcher import World
from adakron.tasks import create_task
from adakron.tasks.causal import PAIR_TASKS, CausalTask
from adakron.tokenizer import load_tokenizer
from launch.arguments import Parser
from launch.program import execute, refuse_launcher

_SEEDS = 2**63


def main(arguments: Sequence[str], world: World) -> None:
    """Write the folder: configuration, random weights, tokenizer."""
    parser = Parser((), "Make a GPT-2 with random weights and a tokenizer that is there.")
    parser.add_argument("tokenizer", help="Folder with a byte-level BPE tokenizer (tokenizer.json, or vocab.json and merges.txt).")
    parser.add_argument("--output_dir", required=True, help="The model folder to write; it must not exist, or be empty.")
    parser.add_argument(
        "--vocabulary_from",
        nargs="+",
        help="Keep only tokens that occur here: .txt files, folders of them, and TASK=DATA_DIR for a generation task's training split."
        " Default: all tokens.",
    )
    parser.add_argument("--n_layer", type=int, default=4, help="Layers.")
    parser.add_argument("--n_embd", type=int, default=256, help="Hidden width.")
    parser.add_argument("--n_head", type=int, default=4, help="Attention heads; they divide the width.")
    parser.add_argument("--n_positions", type=int, default=256, help="Longest input, in tokens.")
    parser.add_argument("--dropout", type=float, default=0.0, help="Probability of every dropout.")
    parser.add_argument("--seed", type=int, default=0, help="Of the weights.")
    options = parser.parse(arguments)
    refuse_launcher(world)
    sizes = {name: getattr(options, name) for name in ("n_layer", "n_embd", "n_head", "n_positions")}
    problems = [f"{name} is {value}; it must be at least 1 (set --{name})" for name, value in sizes.items() if value < 1]
    if not problems and options.n_embd % options.n_head:
        problems.append(f"n_embd ({options.n_embd}) must be divisible by n_head ({options.n_head}) (set --n_embd or --n_head)")
    if not -_SEEDS <= options.seed < _SEEDS:
        problems.append(f"seed is {options.seed}; it must be a whole number from -2^63 to 2^63 - 1 (set --seed)")
    if not 0.0 <= options.dropout < 1.0:
        problems.append(f"dropout is {options.dropout}; it is a probability in [0, 1) (set --dropout)")
    if problems:
        raise ConfigError(problems)
    folder = run_folder.free_folder(options.output_dir)
    tokenizer = load_tokenizer(ModelConfig(), options.tokenizer, GPT2Config())
    whole = len(tokenizer)
    if options.vocabulary_from:
        tokenizer = trimmed(tokenizer, _texts(options.vocabulary_from))
    model = new_gpt2(tokenizer, dropout=options.dropout, seed=options.seed, **sizes)
    tokenizer.model_max_length = options.n_positions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: GPT-2 with {model.num_parameters():,} random parameters, {len(tokenizer):,} of the tokenizer's {whole:,} tokens")


def new_gpt2(
    tokenizer: PreTrainedTokenizerBase, *, n_layer: int, n_embd: int, n_head: int, n_positions: int, dropout: float = 0.0, seed: int = 0
) -> GPT2LMHeadModel:
    """The model, with GPT-2's own initialisation (N(0, 0.02), residual projections smaller by sqrt(2 n_layer)); float32.

    The global random state is neither used nor moved.
    """
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_positions=n_positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return GPT2LMHeadModel(config)


def trimmed(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer with those tokens alone that the texts have, single bytes, special tokens, and what merges need on their way.

    Tokens keep their order and get new numbers. A merge that these texts never make can be dropped without changing one that they
    make: merges are chosen by rank among the pairs that are there. ConfigError where it is no byte-level BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    if state.get("model", {}).get("type") != "BPE" or "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        raise ConfigError(f"{tokenizer.name_or_path} is no byte-level BPE tokenizer, which alone can be trimmed; drop --vocabulary_from")
    model = state["model"]
    used: set[int] = set()
    for text in texts:
        used.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    special = {token["content"] for token in state["added_tokens"]}
    needed = {token for token, number in model["vocab"].items() if number in used or len(token) == 1 or token in special}
    # From the longest down: what a needed token is merged from is needed, too.
    for left, right in sorted(pairs, key=lambda pair: -len(pair[0] + pair[1])):
        if left + right in needed:
            needed |= {left, right}
    kept = sorted((token for token in model["vocab"] if token in needed), key=model["vocab"].__getitem__)
    model["vocab"] = {token: number for number, token in enumerate(kept)}
    model["merges"] = [list(pair) for pair in pairs if pair[0] + pair[1] in needed]
    extra = [token for token in state["added_tokens"] if token["content"] not in model["vocab"]]
    for number, token in enumerate(extra, start=len(kept)):
        token["id"] = number
    for token in state["added_tokens"]:
        token["id"] = model["vocab"].get(token["content"], token["id"])
    state["truncation"] = state["padding"] = None
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **{name: str(token) for name, token in names.items() if token is not None}
    )


def _texts(names: Sequence[str]) -> Iterable[str]:
    """The texts as the tasks tokenise them: files whole, sources and targets of a generation task apart."""
    for name in names:
        task_name, _, data_dir = name.partition("=")
        is_pairs = task_name in PAIR_TASKS
        if is_pairs and not data_dir:
            raise ConfigError(f"--vocabulary_from {name}: no folder is named; give {task_name}=DATA_DIR")
        data = DataConfig(task_name=task_name, data_dir=data_dir) if is_pairs else DataConfig(task_name="lm", train_file=name)
        task = create_task(data, TrainingConfig())
        assert isinstance(task, CausalTask)
        try:
            yield from task.texts("train")
        except DataError as error:
            raise DataError(f"--vocabulary_from {name}: {error}") from error


if __name__ == "__main__":
    execute(main)

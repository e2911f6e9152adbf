"""Load a backbone's tokenizer, and make the two agree on padding and ends."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from adakron.config import ModelConfig
from adakron.errors import ConfigError
from adakron.pretrained import hub_arguments, quiet_transformers, reading, reason_of
from adakron.untrusted import read_json

POSITIONS_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")
"""Model types that number positions from the configuration's padding index on, so that it is part of what was trained."""


def load_tokenizer(config: ModelConfig, path: str, architecture: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the settings or of the backbone at path; ConfigError on one that is damaged or has no vocabulary."""
    source = config.tokenizer_name or path
    remedy = "--tokenizer_name" if config.tokenizer_name else "--tokenizer_name or --model_name_or_path"
    with reading("tokenizer", source, remedy), quiet_transformers():
        try:
            # The architecture tells the kind of tokenizer, for folders that hold nothing but vocabulary files.
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, config=architecture, **hub_arguments(config, source))
        except Exception as error:
            damaged = _damaged_tokenizer_files(Path(source))
            if damaged:
                raise ConfigError([f"{problem} (restore it, or set {remedy})" for problem in damaged]) from error
            raise
    try:
        tokenizer("Ünïcödé 日本 🙂 qzx 1,2")
        tokenizer("a", "b")
    # The tokenizers library panics, past all `except Exception`, where parts of tokenizer.json do not fit together.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(
            f"the tokenizer in {source} fails on a text ({str(error) or type(error).__name__}): its files do not fit (set {remedy})"
        ) from error
    # Without a vocabulary file transformers 5 makes a tokenizer that knows its special tokens only, and says nothing.
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ConfigError(f"no tokenizer vocabulary (tokenizer.json, vocab.txt, ...) in {source} (set {remedy})")
    return tokenizer


def agree_on_padding(tokenizer: PreTrainedTokenizerBase, architecture: PreTrainedConfig) -> None:
    """One padding token for both: a decoder's classifier looks for the last token that is not the configuration's."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path} has neither a padding nor an end-of-sequence token, so texts of several lengths make"
            " no batch (name its pad_token in tokenizer_config.json, or set --tokenizer_name)"
        )
    declared = getattr(architecture, "pad_token_id", None)
    # A padding index outside the embedding is an error of its own, and a clearer one where the tokenizer is compared with it.
    if declared is None or (architecture.model_type not in POSITIONS_FROM_PADDING and tokenizer.pad_token_id < architecture.vocab_size):
        architecture.pad_token_id = tokenizer.pad_token_id


def check_end_token(tokenizer: PreTrainedTokenizerBase, architecture: PreTrainedConfig) -> None:
    """ConfigError where an encoder-decoder's classifier would not find the end-of-sequence token that it reads at."""
    end = architecture.eos_token_id
    wrong = ""
    if end not in tokenizer("")["input_ids"]:
        wrong = "the tokenizer adds none"
    elif tokenizer.pad_token_id == end:
        wrong = "the tokenizer pads with it"
    if wrong:
        raise ConfigError(
            f"the classifier of model type {architecture.model_type!r} reads the decoder at the text's end-of-sequence token ({end}), but"
            f" {wrong} (set --tokenizer_name to the tokenizer that belongs to the model)"
        )


def _damaged_tokenizer_files(folder: Path) -> list[str]:
    # What the library says about a damaged file names neither the file nor what is wrong with it ("'added_tokens'").
    needed = {"tokenizer.json": {"model", "added_tokens"}, "tokenizer_config.json": set(), "special_tokens_map.json": set()}
    problems = []
    for name, keys in needed.items():
        if (folder / name).is_file():
            try:
                content = read_json(folder / name)
                absent = sorted(keys - {*content}) if isinstance(content, dict) else ["the JSON object"]
                wrong = f"{', '.join(absent)} missing" if absent else ""
            except (OSError, ValueError) as error:
                wrong = reason_of(error)
            problems += [f"the tokenizer file {folder / name} is damaged: {wrong}"] if wrong else []
    return problems

"""Plain text: perplexity of a causal language model, per token and per word."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from adakron.config import DataConfig, TrainingConfig
from adakron.data.encoding import encode_pieces, usable_length
from adakron.errors import ConfigError, DataError
from adakron.tasks.base import EncodedSplit
from adakron.tasks.causal.base import CausalTask, exponential
from adakron.tasks.causal.sequences import cut_windows, first_examples, marks_of
from adakron.tasks.sources import FILE_FLAGS
from adakron.tasks.text_files import check_file


class PlainTextTask(CausalTask):
    """Language modelling of text files; a file is a document, and examples are windows of its tokens.

    A document is preceded by the beginning-of-sequence token (the end-of-sequence token where there is none), so that its first token
    is predicted, too. Training cuts it into windows of max_seq_length tokens of which each begins with the last token of the one
    before; evaluation moves windows by `stride` (`sequences.cut_windows`). Either way every token is a target once.
    """

    metric_names = ("perplexity", "word_perplexity", "bits_per_byte")

    def __init__(self, data: DataConfig, training: TrainingConfig):
        super().__init__(data, training)
        self._loaded: dict[str, datasets.Dataset] | None = None

    def splits(self) -> Mapping[str, datasets.Dataset]:
        """One row per document, column text. Raises DataError with all that is missing or unreadable."""
        if self._loaded is None:
            self._loaded = _load(self._data)
        return self._loaded

    def texts(self, split: str) -> Iterator[str]:
        """The documents."""
        yield from self.split(split)["text"]

    def encode(self, split: str, tokenizer: PreTrainedTokenizerBase) -> EncodedSplit:
        """The tokenised windows: labels (windows,) int64, where a window's targets begin."""
        length = usable_length(self._data.max_seq_length, tokenizer)
        stride = length - 1 if split == "train" else self._data.stride or length // 2
        if length < 2 or stride >= length:
            raise ConfigError(
                f"stride is {stride} and windows have {length} tokens; a window needs a token of context besides those it predicts"
                " (set --stride below --max_seq_length)"
            )
        marks = marks_of(tokenizer)
        start = marks.end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        windows = cut_windows(encode_pieces(self.split(split), "text", tokenizer), start, length, stride)
        return first_examples(windows, self._data.max_train_samples) if split == "train" else windows

    def score(self, split: str, outputs: np.ndarray) -> dict[str, float]:
        """loss and perplexity per token; word_perplexity: e^(sum of the losses / whitespace-separated words of the raw text);
        bits_per_byte: sum of the losses / (ln 2 x UTF-8 bytes of the raw text).
        """
        total = float(outputs.astype(np.float64)[:, 0].sum())
        texts = self.split(split)["text"]
        words = sum(len(text.split()) for text in texts)
        bytes_ = sum(len(text.encode()) for text in texts)
        return {
            **super().score(split, outputs),
            "word_perplexity": exponential(total / max(1, words)),
            "bits_per_byte": total / (math.log(2.0) * bytes_),
        }


def _load(data: DataConfig) -> dict[str, datasets.Dataset]:
    sources = {split: Path(value).expanduser() for split, flag in FILE_FLAGS.items() if (value := getattr(data, flag))}
    problems = []
    if data.data_dir is not None:
        folder = Path(data.data_dir).expanduser()
        found = {split: path for split in FILE_FLAGS for path in (folder / split, folder / f"{split}.txt") if path.exists()}
        if not found and not sources:
            problems.append(f"data_dir is {folder}; it must hold train.txt and validation.txt, or folders of these names (set --data_dir)")
        sources = found | sources
    elif not sources:
        problems.append("task lm has no data; give --train_file and --validation_file, text files or folders of them, or --data_dir")
    loaded = {}
    for split, path in sources.items():
        try:
            loaded[split] = datasets.Dataset.from_dict({"text": _documents(path, FILE_FLAGS[split])})
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return {split: loaded[split] for split in FILE_FLAGS if split in loaded}


def _documents(path: Path, flag: str) -> list[str]:
    """The text of a file, or of every *.txt below a folder, in the order of their names."""
    if not path.is_file() and not path.is_dir():
        raise DataError(f"{flag} is {path}, which is no file and no folder (set --{flag})")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*.txt") if file.is_file())
    if not files:
        raise DataError(f"{flag} is {path}, a folder without any .txt file (set --{flag})")
    texts = []
    for file in files:
        check_file(file, text=True)
        # Not read_text: line ends are part of the text.
        texts.append(file.read_bytes().decode("utf-8-sig"))
        if not texts[-1].strip():
            raise DataError(f"{file} holds only white space; it must hold text")
    return texts

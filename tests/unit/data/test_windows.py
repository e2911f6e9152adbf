"""Windows of long contexts, and where their tokens stand, for tokenizers that see white space in different ways."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adakron.data import windows
from adakron.data.encoding import TokenTable
from adakron.data.offsets import check_offsets, trimmed, with_marks
from adakron.data.windows import CONTEXT, NULL, encode_windows
from adakron.errors import ConfigError
from tests.helpers.letters import letter_tokenizer
from tests.helpers.tiny import byte_tokenizer


def roberta_like(*, trim: bool) -> PreTrainedTokenizerFast:
    """Bytes between <s>, </s></s> and </s>. trim: whether its offsets leave out the space before a word."""
    tokenizer = byte_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    ends = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ends["</s>"]), ("<s>", ends["<s>"]), trim_offsets=trim, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", pad_token="<|end|>")


def deberta_like() -> PreTrainedTokenizerFast:
    """Words with the mark of the space before them, as SentencePiece makes them: offsets include the space."""
    words = ["[CLS]", "[SEP]", "[UNK]", "▁who", "▁ann", "▁saw", "▁bob", "▁in", "▁rome", "▁"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", pad_token="[UNK]")


def rows(*pairs: tuple[str, str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"question": [one for one, _ in pairs], "context": [two for _, two in pairs]})


def encode(data: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, length: int, stride: int, cache: Path) -> TokenTable:
    return encode_windows(data, "question", "context", tokenizer, length, stride, cache)


def window(table: TokenTable, number: int, name: str = "input_ids") -> list[int]:
    values: list[int] = table.features[name][table.offsets[number] : table.offsets[number + 1]].tolist()
    return values


def test_windows_overlap_by_the_stride_and_cover_the_context(tmp_path: Path) -> None:
    # [CLS] a [SEP] . . . . [SEP]: four tokens of context in each window, two of them the window's before.
    table = encode(rows(("a", "b c d e f g h"), ("a", "b")), letter_tokenizer(), 8, 2, tmp_path)
    assert table.rows is not None
    assert table.rows.tolist() == [0, 0, 0, 1]
    assert [window(table, 0), window(table, 1), window(table, 2)] == [
        [2, 4, 3, 5, 6, 7, 8, 3],
        [2, 4, 3, 7, 8, 9, 10, 3],
        [2, 4, 3, 9, 10, 11, 3],
    ]
    assert window(table, 2, "roles") == [NULL, 0, 0, CONTEXT, CONTEXT, CONTEXT, 0]
    assert window(table, 2, "char_starts") == [-1, -1, -1, 8, 10, 12, -1]
    assert window(table, 2, "char_ends") == [-1, -1, -1, 9, 11, 13, -1]
    assert table.truncated == 0


def test_white_space_around_words_belongs_to_no_token() -> None:
    text = "ab  cd\u2003e "
    starts, ends = trimmed(text, np.array([0, 2, 3, 2, 6, 8]), np.array([2, 6, 7, 4, 8, 9]))
    assert [text[a:b] for a, b in zip(starts, ends, strict=True)] == ["ab", "cd", "cd", "", "e", ""]


@pytest.mark.parametrize("tokenizer", [deberta_like(), roberta_like(trim=True), roberta_like(trim=False)], ids=["space", "bytes", "gpt2"])
def test_the_characters_of_tokens_hold_no_space_whatever_the_tokenizer_says(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    context = "ann saw  bob in rome"
    table = encode(rows(("who saw bob", context)), tokenizer, 60, 4, tmp_path)
    spans = [
        context[a:b]
        for a, b, role in zip(window(table, 0, "char_starts"), window(table, 0, "char_ends"), window(table, 0, "roles"), strict=True)
        if role == CONTEXT
    ]
    assert all(span == span.strip() for span in spans)
    assert "".join(spans) == context.replace(" ", ""), "and leave out nothing else"
    assert window(table, 0, "roles").count(NULL) == 1


def test_the_question_loses_the_space_before_it_and_what_leaves_no_room(tmp_path: Path) -> None:
    table = encode(rows(("  a", "b c"), ("a b c d e f", "g h")), letter_tokenizer(), 8, 2, tmp_path)
    assert window(table, 0) == [2, 4, 3, 5, 6, 3]
    # 8 - 3 special tokens - 2 of stride - 1: two tokens of question.
    assert window(table, 1) == [2, 4, 5, 3, 10, 11, 3]
    assert table.truncated == 1


def test_no_room_beside_the_stride_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"doc_stride is 5 and inputs have 8 tokens; .* need 2 more"):
        encode(rows(("a", "b")), letter_tokenizer(), 8, 5, tmp_path)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow(BertTokenizer):
        is_fast = False

    with pytest.raises(ConfigError, match=r"the tokenizer Slow is a slow one, .* needs a fast one"):
        check_offsets(Slow(vocab={"[UNK]": 0, "[PAD]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}))


def test_windows_are_tokenised_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = rows(("a", "b c d e f g h"), ("a", "b"))
    first = encode(data, letter_tokenizer(), 8, 2, tmp_path)

    def no_more(*_: Any) -> TokenTable:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(windows, "_tokenise", no_more)
        again = encode(data, letter_tokenizer(), 8, 2, tmp_path)
        with pytest.raises(AssertionError, match="tokenised again"):
            encode(data, letter_tokenizer(), 8, 1, tmp_path)
    assert first.rows is not None
    assert again.rows is not None
    assert np.array_equal(first.rows, again.rows)
    assert first.features.keys() == again.features.keys()
    assert all(np.array_equal(first.features[name], again.features[name]) for name in first.features)


def test_an_accent_that_no_token_holds_goes_with_the_letter_before_it(tmp_path: Path) -> None:
    text = "cafe\u0301 e\u0301te\u0301"
    starts, ends = np.array([0, 6, 9, 6]), np.array([4, 7, 10, 6])
    assert with_marks(text, starts[:3], ends[:3]).tolist() == [5, 8, 11]
    assert with_marks(text, starts[3:], ends[3:]).tolist() == [6], "a token without characters stays one"
    # Bytes: the accent has tokens of its own.
    assert with_marks(text, np.array([3, 4, 4]), np.array([4, 5, 5])).tolist() == [4, 5, 5]
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "cafe": 5, "noir": 6}
    tokenizer = BertTokenizer(vocab=words, do_lower_case=True)
    context = "Cafe\u0301 noir, cafe\u0301"
    table = encode(rows(("noir", context)), tokenizer, 20, 2, tmp_path)
    spans = zip(window(table, 0, "char_starts"), window(table, 0, "char_ends"), strict=True)
    assert [context[a:b] for a, b in spans if a >= 0] == ["Cafe\u0301", "noir", ",", "cafe\u0301"]

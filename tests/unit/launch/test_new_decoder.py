import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Tokenizer

from adakron.errors import ConfigError, DataError
from adakron.launcher import World
from launch import new_decoder
from tests.helpers.shared import shared_data
from tests.helpers.tiny import byte_tokenizer, word_tokenizer, write_jsonl

ALONE = World(rank=0, local_rank=0, world_size=1)
SIZES = ("--n_layer", "1", "--n_embd", "16", "--n_head", "2", "--n_positions", "32")


def test_a_folder_that_transformers_reads_and_that_depends_on_the_seed_alone(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    models = []
    for name, seed in (("one", "1"), ("again", "1"), ("two", "2")):
        torch.manual_seed(len(models))
        new_decoder.main([str(tmp_path / "tokenizer"), "--output_dir", str(tmp_path / name), "--seed", seed, *SIZES], ALONE)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    one, again, two = (model.transformer.h[0].mlp.c_fc.weight for model in models)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    config = models[0].config
    assert (config.vocab_size, config.n_layer, config.n_embd, config.n_positions, config.resid_pdrop) == (257, 1, 16, 32, 0.0)
    assert AutoTokenizer.from_pretrained(tmp_path / "one").model_max_length == 32
    with pytest.raises(ConfigError, match="is not empty"):
        new_decoder.main([str(tmp_path / "tokenizer"), "--output_dir", str(tmp_path / "one")], ALONE)


def test_a_trimmed_vocabulary_cuts_its_texts_as_before_and_loses_no_text(tmp_path: Path) -> None:
    whole = GPT2Tokenizer.from_pretrained(shared_data("tokenizers") / "gpt2")
    rows = json.loads("[" + ",".join((shared_data("e2e_nlg") / "train.jsonl").read_text().splitlines()[:200]) + "]")
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    (tmp_path / "more.txt").write_text("Unquestionably näive antidisestablishmentarianism.\n\nOnce upon a time")
    new_decoder.main(
        [
            str(shared_data("tokenizers") / "gpt2"), "--output_dir", str(tmp_path / "model"), *SIZES,
            "--vocabulary_from", f"e2e_nlg={tmp_path / 'data'}", str(tmp_path / "more.txt"),
        ],
        ALONE,
    )  # fmt: skip
    trimmed = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert 256 < len(trimmed) < 2000
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.eos_token_id == trimmed.eos_token_id

    def pieces(tokenizer: GPT2Tokenizer, text: str) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))

    texts = [(tmp_path / "more.txt").read_text(), *(" " + " ".join(row["human_reference"].split()) for row in rows)]
    for text in texts:
        assert pieces(trimmed, text) == pieces(whole, text)
    unseen = "Zanzibar: 龍 quixotic\t½"
    assert trimmed.decode(trimmed(unseen)["input_ids"]) == unseen
    assert trimmed.convert_tokens_to_ids("<|endoftext|>") == trimmed.eos_token_id == len(trimmed) - 1


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("the film")
    given = [str(tmp_path / "words"), "--output_dir", str(tmp_path / "model")]
    with pytest.raises(ConfigError, match="no byte-level BPE tokenizer"):
        new_decoder.main([*given, "--vocabulary_from", str(tmp_path / "text.txt")], ALONE)
    with pytest.raises(ConfigError, match=r"n_embd \(30\) must be divisible by n_head \(4\)"):
        new_decoder.main([*given, "--n_embd", "30"], ALONE)
    with pytest.raises(ConfigError, match="seed is 9223372036854775808; it must be a whole number from"):
        new_decoder.main([*given, "--seed", str(2**63)], ALONE)
    byte_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ConfigError, match="--vocabulary_from pairs: no folder is named; give pairs=DATA_DIR"):
        new_decoder.main([*given, "--vocabulary_from", "pairs"], ALONE)
    with pytest.raises(DataError, match=r"--vocabulary_from .*absent.txt: train_file is"):
        new_decoder.main([*given, "--vocabulary_from", str(tmp_path / "absent.txt")], ALONE)
    assert not (tmp_path / "model").exists() or not any((tmp_path / "model").iterdir())

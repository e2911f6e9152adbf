import logging
import re
from pathlib import Path

import pytest

from adakron.log import get_logger, setup_logging
from adakron.redaction import HIDDEN, is_secret_name, printable, redact, redact_arguments, redact_values, shortened

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.mark.parametrize(
    "text",
    [
        TOKEN, f"--hub_token={TOKEN}", "https://me:s3cretpass@example.org/x", "HF_TOKEN=s3cretpass", '{"api_key": "s3cretpass"}',
        "password: s3cretpass", "?token=s3cretpass&x=1", "Authorization: Bearer s3cretpass", "sk-s3cretpass0123456789ab",
        "ghp_s3cretpass0123456789", "'secret': 's3cretpass'",
    ],
)  # fmt: skip
def test_secrets_are_hidden(text):
    shown = redact(text)
    assert "s3cret" not in shown and TOKEN not in shown and HIDDEN in shown


@pytest.mark.parametrize(
    "text", ["max_tokens=12", "pad_token_id: 0", "3,281 tokens/s", "--tokenizer_name=bert", "a/hf_hub/x", "x@y", "secretary: Ann", "sk-1"]
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_long_texts_take_no_long_time():
    # Hours, where what stands before a name is looked at from each of its characters on.
    assert redact("a-" * 200_000 + "token=s3cret").endswith(f"token={HIDDEN}")


def test_command_lines_and_records():
    assert redact_arguments(["train.py", "--hf_token", "abc", "--seed", "1", "--api-key=xyz"]) == [
        "train.py", "--hf_token", HIDDEN, "--seed", "1", f"--api-key={HIDDEN}",
    ]  # fmt: skip
    assert redact_arguments(["--token", "--seed", "1"]) == ["--token", "--seed", "1"]
    content = {"a": [{"password": "x", "pad_token": "[PAD]"}], "url": "https://u:p@h/", "n": 1, "pad_token_id": 0}
    kept = {"a": [{"password": HIDDEN, "pad_token": "[PAD]"}], "url": f"https://{HIDDEN}@h/", "n": 1, "pad_token_id": 0}
    assert redact_values(content) == kept
    # run.json is opened again: a path leads where it led.
    paths = {"train_file": "/data/secret=1/train.jsonl", "nvme_path": "/mnt/token=2"}
    assert redact_values(paths) == paths
    assert redact_values(f"/data/{TOKEN}/x") == f"/data/{HIDDEN}/x" and redact_values("/login token=s3cret") == f"/login token={HIDDEN}"
    assert is_secret_name("--hf_token") and not is_secret_name("pad_token") and not is_secret_name("max_tokens")


def test_terminals_obey_nothing():
    assert printable("\x1b[31mred\x07 a\tb \u202eevil \ud800 é 日本 🙂") == "\\x1b[31mred\\x07 a\\tb \\u202eevil \\ud800 é 日本 🙂"
    assert len(shortened("x" * 100_000 + " (set --seed)")) < 1600 and shortened("x" * 100_000 + " (set --seed)").endswith("(set --seed)")


def test_log_lines_are_safe(capsys):
    setup_logging(0)
    get_logger("adakron.test").info("reading %s of %s\x1b[2J", TOKEN, "x" * 9000)
    logging.getLogger("adakron").handlers.clear()
    line = capsys.readouterr().err
    assert TOKEN not in line and "\x1b" not in line and len(line) < 3200


def test_nothing_in_the_source_unpickles():
    root = Path(__file__).resolve().parents[2]
    for file in [*(root / "adakron").rglob("*.py"), *(root / "launch").rglob("*.py")]:
        text = file.read_text()
        for call in re.finditer(r"torch\.load\((.*)\)", text):
            assert "weights_only=True" in call[1], f"{file}: {call[0]}"
        for call in re.finditer(r"np\.load\((.*)\)", text):
            assert "allow_pickle=False" in call[1], f"{file}: {call[0]}"
        unsafe = r"pickle\.loads?\(|Unpickler\(|\bdill\b|cloudpickle|joblib|yaml\.(unsafe|full)_load|shell=True"
        assert not re.search(unsafe, text), file
        assert "trust_remote_code=True" not in text, file
        assert not re.search(r"(?<![\w.])(?<!def )(eval|exec)\([^)]", text), file

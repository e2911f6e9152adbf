"""YAML recipes and settings of PEFT's methods that are broken, huge, nested, or try to run something."""

import json
from pathlib import Path

import numpy as np

from launch.arguments import train_parser
from tests.helpers.fuzzing import pick
from tests.helpers.hostile.values import mutate, plain, word

KEYS = sorted(action.dest for action in train_parser()._actions)

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n"
for _name, _next in zip("abcdefgh", "bcdefghi", strict=True):
    _BOMB += f"{_next}: &{_next} [{', '.join([f'*{_name}'] * 9)}]\n"

RAW: dict[str, bytes] = {
    "empty": b"",
    "billion laughs": _BOMB.encode(),
    "python object": b"!!python/object/apply:os.system ['touch owned']\n",
    "python name": b"learning_rate: !!python/name:os.system\n",
    "python module": b"seed: !!python/module:subprocess\n",
    "python new": b"seed: !!python/object/new:subprocess.Popen [['touch', 'owned']]\n",
    "bad int tag": b"seed: !!int x\n",
    "bad float tag": b"learning_rate: !!float x\n",
    "bad bool tag": b"do_train: !!bool maybe\n",
    "bad time": b"seed: 2026-99-99\n",
    "bad time tag": b"seed: !!timestamp x\n",
    "time": b"seed: 2026-01-01\n",
    "binary": b"seed: !!binary '*'\n",
    "set": b"seed: !!set {a, b}\n",
    "omap": b"seed: !!omap [a: 1]\n",
    "pairs": b"seed: !!pairs [a: 1]\n",
    "merge key": b"<<: {seed: 1}\nseed: 2\n",
    "self alias": b"&a seed: *a\n",
    "recursive": b"seed: &a [*a]\n",
    "huge int": b"seed: " + b"9" * 6000 + b"\n",
    "huge hex": b"seed: 0x" + b"f" * 6000 + b"\n",
    "sexagesimal": b"seed: 190:20:30\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "twice": b"seed: 1\nseed: 2\n",
    "list": b"- seed\n- 1\n",
    "word": b"seed\n",
    "null": b"null\n",
    "list key": b"? [a, b]\n: 1\n",
    "mapping key": b"? {a: b}\n: 1\n",
    "null key": b"~: 1\n",
    "number key": b"1: 2\n3.5: 4\n",
    "time key": b"2026-01-01: 4\n",
    "tab": b"seed:\t1\n\tx: 2\n",
    "deep list": b"seed: " + b"[" * 3000,
    "deep mapping": b"seed: " + b"{a: " * 500,
    "deep block": b"\n".join(b" " * level + b"a:" for level in range(300)),
    "bad utf-8": b"seed: \xff\xfe\n",
    "utf-16": "seed: 1\n".encode("utf-16"),
    "nul": b"seed: \x00\n",
    "escape": b'output_dir: "\\e[31m\\0x"\n',
    "escaped key": b'"\\e[31mseed": 1\n',
    "surrogate": b'output_dir: "\\ud800"\n',
    "many keys": b"".join(b"k%d: 1\n" % number for number in range(9000)),
    "many equal keys": b"seed: 1\n" * 9000,
    "large": b"# " + b"x" * 300_000 + b"\nseed: 1\n",
    "one long line": b"seed: '" + b"x" * 100_000 + b"'\n",
    "unclosed": b"seed: 'x\n",
    "colon": b"output_dir: a: b\n",
    "directive": b"%YAML 9.9\n---\nseed: 1\n",
    "unknown tag": b"seed: !mine 1\n",
    "config in itself": b"config: recipe.yaml\n",
    "help": b"help: true\n",
    "secret": b"hub_token: hf_abcdefghijklmnopqrstuv\n",
}


def hostile(rng: np.random.Generator) -> tuple[bytes, str]:
    """A recipe, and what is wrong with it."""
    if rng.random() < 0.5:
        name = pick(rng, sorted(RAW))
        return RAW[name], name
    lines = []
    for _ in range(int(rng.integers(1, 5))):
        key = pick(rng, KEYS)
        value = json.dumps(plain(rng)) if rng.random() < 0.6 else word(rng).encode("utf-8", "replace").decode().replace("\n", " ")
        lines.append(f"{key}: {value}")
    return "\n".join(lines).encode(), "random values"


def hostile_method_config(rng: np.random.Generator, folder: Path) -> str:
    """A value of --method_config: JSON text, or the name of a file."""
    if rng.random() < 0.4:
        file = folder / "settings.yaml"
        file.write_bytes(hostile(rng)[0])
        return str(file)
    good = {"r": 8, "lora_alpha": 16, "target_modules": ["query"], "init_lora_weights": True, "bias": "none", "use_rslora": False,
            "layers_to_transform": [0], "rank_pattern": {}, "megatron_core": "x", "megatron_config": None}  # fmt: skip
    content, _ = mutate(good, rng, int(rng.integers(1, 3)))
    return json.dumps(content) if rng.random() < 0.8 else word(rng).replace("\0", "")

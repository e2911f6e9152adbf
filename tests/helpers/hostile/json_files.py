"""DeepSpeed JSONs that are broken, huge, nested, or say something that is not so."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.fuzzing import pick
from tests.helpers.hostile.values import mutate

SHIPPED: list[dict[str, Any]] = [
    json.loads(file.read_text()) for file in sorted((Path(__file__).resolve().parents[3] / "ds_configs").glob("*.json"))
]

_EXTRA: dict[str, Any] = {
    "steps_per_print": 10, "wall_clock_breakdown": False, "gradient_predivide_factor": 1.0, "prescale_gradients": False,
    "activation_checkpointing": {"partition_activations": False}, "checkpoint": {"load_universal": False}, "aio": {"thread_count": 1},
    "comms_logger": {"enabled": False}, "flops_profiler": {"enabled": False}, "memory_breakdown": False, "dump_state": False,
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}, "round_robin_gradients": False,
                          "ignore_unused_parameters": True, "sub_group_size": 1000000, "elastic_checkpoint": False},
    "disable_allgather": False, "log_level": "warning",
}  # fmt: skip

RAW: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n",
    "nan": b'{"gradient_clipping": NaN}',
    "infinity": b'{"gradient_clipping": -Infinity}',
    "beyond a float": b'{"gradient_clipping": 1e999}',
    "huge int": b'{"train_batch_size": ' + b"9" * 6000 + b"}",
    "large int": b'{"steps_per_print": ' + b"9" * 200 + b"}",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "deep section": b'{"zero_optimization": ' + b'{"a":' * 100 + b"1" + b"}" * 101,
    "twice": b'{"bf16": {}, "bf16": {}}',
    "twice inside": b'{"bf16": {"enabled": true, "enabled": false}}',
    "list": b"[]",
    "text": b'"zero"',
    "number": b"3",
    "comment": b'{"bf16": {} // on\n}',
    "comma": b'{"bf16": {},}',
    "single quotes": b"{'bf16': {}}",
    "bad utf-8": b'{"a\xff": 1}',
    "utf-16": "{}".encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "nul": b'{"a\x00": 1}',
    "escaped nul": b'{"a\\u0000": 1}',
    "surrogate": b'{"a": "\\ud800"}',
    "escape": b'{"\\u001b[31mred": 1}',
    "truncated": b'{"zero_optimization": {"stage": 2',
    "two": b"{}{}",
    "many keys": json.dumps({f"k{number}": number for number in range(20_000)}).encode(),
    "large": b'{"a": "' + b"x" * 3_000_000 + b'"}',
    "yaml": b"zero_optimization:\n  stage: 2\n",
    "pickle": b"\x80\x04\x95",
    "secret": b'{"wandb": {"api_key": "0123456789abcdef0123"}}',
}


def hostile(rng: np.random.Generator) -> tuple[bytes, str]:
    """A file's content, and what is wrong with it."""
    if rng.random() < 0.25:
        name = pick(rng, sorted(RAW))
        return RAW[name], name
    content = dict(pick(rng, SHIPPED))
    if rng.random() < 0.4:
        key = pick(rng, sorted(_EXTRA))
        content[key] = _EXTRA[key]
    changed, touched = mutate(content, rng, int(rng.integers(1, 4)))
    if touched and rng.random() < 0.3 and isinstance(changed.get("zero_optimization"), dict):
        changed["zero_optimization"], more = mutate(changed["zero_optimization"], rng)
        touched += more
    return json.dumps(changed).encode(), ", ".join(touched)

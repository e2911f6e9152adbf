"""Which of PEFT's methods train under which of the shipped JSONs: the table of docs/peft.md.

`python -m tests.benchmarks.peft_methods` trains every method that is not refused on two processes, a few steps on a tiny BERT, and
prints the largest deviation of a loss from a plain PyTorch loop, and whether the saved adapter gives the same logits again.
"""

import json
import tempfile
from pathlib import Path

import torch

from adakron import models
from adakron.peft import folders
from adakron.peft.method_settings import available
from tests.helpers.launch import deepspeed
from tests.helpers.peft_worker import ROWS, Case, backbone, plain_loop, write_request

JSONS = (("zero0_fp32", False), ("zero1", True), ("zero2_fp32", False), ("zero2", True), ("zero3", False), ("zero3", True))


def cells(name: str, bf16: bool) -> dict[str, str]:
    """Method -> what came of it under that JSON."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = [Case(method, name, bf16) for method in available()]
        result = folder / "result.json"
        finished = deepspeed("--module", "tests.helpers.peft_worker", str(write_request(folder, cases)), str(result), ranks=2, timeout=900)
        assert result.exists(), finished.output
        for case, values in zip(cases, json.loads(result.read_text()), strict=True):
            if "error" in values:
                found[case.method] = values["error"][:60]
                continue
            losses, _ = plain_loop(case.method)
            deviation = max(abs(there - here) for there, here in zip(values["losses"], losses, strict=True))
            loaded = folders.load(backbone(), folder / case.name, dtype)
            models.cast_parameters(loaded, dtype)
            same = torch.equal(loaded(**ROWS).logits.float(), torch.tensor(values["logits"]))
            found[case.method] = f"{deviation:.0e}" + ("" if same else ", loads with other logits")
    return found


def main() -> None:
    """Print the table."""
    columns = {f"{name}{' bf16' if bf16 else ''}": cells(name, bf16) for name, bf16 in JSONS}
    print("| method | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for method in available():
        print(f"| {method} | " + " | ".join(column[method] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()

"""What `launch/bench.py` compares: this engine and its peers, each trained by processes of its own on the same work.

Every contender is a function of (workload, pace). They are kept as their users write them: nothing in them is slowed down, and nothing
is made faster that the library behind them does not offer by a setting.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contender:
    """A row of the table. name: shown there. place: module and function. ranks: processes, which share the threads."""

    name: str
    place: tuple[str, str]
    ranks: int = 1

    def load(self) -> Callable[..., Any]:
        """The function; imports what it needs."""
        module, function = self.place
        loaded: Callable[..., Any] = getattr(importlib.import_module(f"launch.contenders.{module}"), function)
        return loaded


CONTENDERS = {
    "adakron": Contender("AdaKron, this engine", ("ours", "train")),
    "plain_fast": Contender("AdaKron, a plain loop with the same kernels", ("loops", "plain_fast")),
    "plain": Contender("AdaKron, a plain loop", ("loops", "plain")),
    "hf_lora": Contender("HF Trainer + PEFT LoRA", ("hugging_face", "lora")),
    "hf_lora_cast": Contender("HF Trainer + PEFT LoRA, weights cast", ("hugging_face", "lora_cast")),
    "hf_lokr": Contender("HF Trainer + PEFT LoKr", ("hugging_face", "lokr")),
    "hf_adakron": Contender("HF Trainer + AdaKron through PEFT", ("hugging_face", "adakron")),
    "published": Contender("AdaKron, the published procedure", ("loops", "published")),
    "adakron_2ranks": Contender("AdaKron, this engine on 2 ranks", ("ours", "train"), ranks=2),
}

DEFAULT = tuple(name for name, one in CONTENDERS.items() if one.ranks == 1)
"""Those that run where none are named."""

"""What the published codes call the parts of an adapter, and where their checkpoints keep them.

AK is DetectiveMB/AdaKron at a5187e1, AM is microsoft/AdaMix. Each keeps a projection with E experts as
`<home>.ExpertSoup.<module>.deepspeed_experts.<e>.{weight,bias}` for e < E and `.expert_score_weight` of shape (E,).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from adakron.nn import Bottleneck, FactorOrder

Format = Literal["glue", "nlg"]
"""glue: adapters and head of a BERT or RoBERTa classifier. nlg: a whole GPT-2 with its adapters."""

AUTO_CLASSES: dict[Format, str] = {"glue": "AutoModelForSequenceClassification", "nlg": "AutoModelForCausalLM"}

HEADS: dict[Format, tuple[str, ...]] = {"glue": ("classifier",), "nlg": ()}
"""The modules that the published codes train whole; their parameters have the same names here."""

PREFIXES: dict[Format, tuple[str, ...]] = {"glue": ("bert", "roberta"), "nlg": ("transformer",)}
"""The encoder's or decoder's name in the model, with which every adapter's key begins."""

PUBLISHED_FACTOR = 4
"""Width of the first factor, a number in the published code (`expert_soup.py:118`)."""

PUBLISHED_NLG_WIDTH = 8
"""Bottleneck width of the text-generation code, a number in it (`NLG/src/model.py:215`)."""


@dataclass(frozen=True)
class Layout:
    """How one of the published codes builds its adapters.

    code: what messages call it. modules: its name of each projection -> ours. experts_in: our names of those that may have
    several experts there.
    """

    code: str
    format: Format
    modules: Mapping[str, str]
    bottleneck: Bottleneck
    factor_order: FactorOrder
    activation: str
    experts_in: tuple[str, ...]


LAYOUTS = (
    # src/transformers/models/expert_soup.py:51-143; every module takes a number of experts there, and uses one.
    Layout("AdaKron's GLUE code", "glue", {"MoA_A1": "down_b", "MoA_A2": "down_a", "MoA_B": "up"}, "kronecker", "a_major", "gelu", ()),
    # NLG/src/expert_soup.py:101-125
    Layout(
        "AdaKron's NLG code", "nlg", {"MoA_A": "down_a", "MoA_A1": "down_b", "MoA_B": "up"}, "kronecker", "b_major", "gelu", ("down_a",)
    ),
    # AM src/transformers/models/expert_soup.py
    Layout("AdaMix's GLUE code", "glue", {"MoA_A": "down", "MoA_B": "up"}, "plain", "a_major", "gelu", ("down", "up")),
    # AM NLG/src/expert_soup.py:18,80
    Layout("AdaMix's NLG code", "nlg", {"MoA_A": "down", "MoA_B": "up"}, "plain", "a_major", "gelu_tanh", ("down", "up")),
)

_GLUE_HOME = r"(?:bert|roberta)\.encoder\.layer\.\d+\.output"
_NLG_HOME = r"transformer\.h\.\d+\.mlp"
_KEY = re.compile(
    rf"(?P<home>{_GLUE_HOME}|{_NLG_HOME})\.ExpertSoup\.(?P<module>\w+)"
    r"\.(?:deepspeed_experts\.(?P<expert>\d{1,6})\.(?P<kind>weight|bias)|expert_score_weight)"
)


@dataclass(frozen=True)
class AdapterKey:
    """A key of an adapter's tensor. expert and kind ("weight", "bias") are None for the scores of a module's experts."""

    home: str
    module: str
    expert: int | None
    kind: str | None

    @property
    def format(self) -> Format:
        """The format that has such a home."""
        return "nlg" if self.home.startswith("transformer.") else "glue"


def parse_key(key: str) -> AdapterKey | None:
    """The parts of an adapter's key; None for any other."""
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    expert = match["expert"]
    return AdapterKey(match["home"], match["module"], None if expert is None else int(expert), match["kind"])


def site_of(home: str) -> str:
    """The layer that is adapted here, for the module that holds an adapter there."""
    return f"{home}.c_proj" if home.startswith("transformer.") else f"{home}.dense"


def home_of(site: str) -> str:
    """The inverse of `site_of`."""
    return site.rpartition(".")[0]


def published_sites(prefix: str, layers: int) -> list[str]:
    """The layers that the published codes adapt in a model with that name of its encoder or decoder: all of them."""
    place = "h.{}.mlp" if prefix == "transformer" else "encoder.layer.{}.output"
    return [site_of(f"{prefix}.{place.format(layer)}") for layer in range(layers)]


def adapter_keys(layout: Layout, home: str, num_experts: int, expert_projections: Sequence[str]) -> Iterator[tuple[str, str, int | None]]:
    """Of every tensor of one adapter: its key, our name relative to the adapter, and its expert.

    The expert is None for scores. Those of a module with one expert have a key there and no tensor here.
    """
    for module, projection in layout.modules.items():
        prefix = f"{home}.ExpertSoup.{module}"
        yield f"{prefix}.expert_score_weight", f"{projection}.expert_scores", None
        for expert in range(num_experts if projection in expert_projections else 1):
            for kind in ("weight", "bias"):
                yield f"{prefix}.deepspeed_experts.{expert}.{kind}", f"{projection}.{kind}", expert


def reorder_columns(up: Tensor, kron_factor: int, to: FactorOrder) -> Tensor:
    """The weight of an up projection (..., D, K) for the other order of the products.

    to: the order that is wanted; `up` is of the other one. Only moves numbers: there and back is bit-equal.
    """
    slow = up.shape[-1] // kron_factor if to == "a_major" else kron_factor
    return up.unflatten(-1, (slow, -1)).transpose(-1, -2).flatten(-2)

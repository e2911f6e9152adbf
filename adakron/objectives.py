"""Losses beside a task's own: how far two forward passes of the same examples disagree."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

OutputKind = Literal["logits", "values"]
"""What a task's outputs are: logits over classes or tokens in the last dimension, or real numbers."""


def consistency_sum(first: Tensor, second: Tensor, kind: OutputKind) -> Tensor:
    """The disagreement of two passes, summed over the targets; an fp32 scalar.

    first, second: outputs at the valid targets, (targets, classes) for logits, any shape for values.

    logits: with p and q the two distributions and sg a constant of the same value (no gradient),
    1/2 KL(sg(q) || p) + 1/2 KL(sg(p) || q) at each target. This is AdaMix's regulariser as AdaKron's repository has it
    (modeling_roberta.py:1261-1283, NLG/src/model.py:459-465), there averaged and not summed.
    values: 1/2 (first - sg(second))^2 + 1/2 (second - sg(first))^2. Ours: theirs takes a softmax over the one output of a
    regression and is identically zero.
    """
    first, second = first.float(), second.float()
    if kind == "values":
        return 0.5 * ((first - second.detach()).square().sum() + (second - first.detach()).square().sum())
    log_p, log_q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    to_p = F.kl_div(log_p, log_q.detach(), reduction="sum", log_target=True)
    return 0.5 * (to_p + F.kl_div(log_q, log_p.detach(), reduction="sum", log_target=True))

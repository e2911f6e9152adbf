"""Causal language modelling: a target behind its source (E2E, WebNLG, DART, own pairs), and plain text."""

from adakron.tasks.causal.base import CausalTask, cannot_predict
from adakron.tasks.causal.pairs import PAIR_TASKS, PairTask
from adakron.tasks.causal.plain_text import PlainTextTask
from adakron.tasks.causal.prompts import Prompts, prompts_of

CAUSAL_TASKS = (*PAIR_TASKS, "lm")
"""Names of the tasks here."""

__all__ = ["CAUSAL_TASKS", "PAIR_TASKS", "CausalTask", "PairTask", "PlainTextTask", "Prompts", "cannot_predict", "prompts_of"]

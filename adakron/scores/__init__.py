"""Scores of texts, as `evaluate` modules that ship with the package and need neither a network nor Java. docs/scores.md."""

from adakron.scores.generation import GenerationScore, score_texts

__all__ = ["GenerationScore", "score_texts"]

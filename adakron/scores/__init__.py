"""Scores of texts that ship with the package and need no network."""

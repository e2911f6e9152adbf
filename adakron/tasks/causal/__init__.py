"""Causal language modelling: a target behind its source (E2E, WebNLG, DART, own pairs), and plain text."""

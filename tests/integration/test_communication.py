"""What travels between ranks in a step: gradients and values of what trains, and of the backbone nothing but stage 3's parts."""

from pathlib import Path

import pytest

from tests.benchmarks.communication import measure, split

pytestmark = pytest.mark.launcher

BESIDE = 64
"""Bytes per step of numbers that all ranks must know: a norm, an overflow, whether to stop; and of padding."""


def test_only_what_trains_travels(tiny_bert: Path, tmp_path: Path):
    found = measure(tiny_bert, tmp_path, ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero3_fp32"))
    assert len(found) == 4
    for name, one in found.items():
        trained = 4 * one["trained"]
        reduced, gathered = split(one["collectives"])
        assert trained <= reduced <= trained + BESIDE, (name, one)
        if name == "zero0_fp32":
            assert gathered == 0, one
        elif name == "zero3_fp32":
            assert gathered > 10 * trained, one  # the backbone, which lies in parts: stage 3 is for models that fit in no other way
        else:
            assert trained <= gathered <= trained + BESIDE, (name, one)

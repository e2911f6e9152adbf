"""What launch/bench.py makes of what it measured: ratios, tables, targets, a drawing; no contender is started."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adakron.errors import ConfigError
from adakron.launcher import read_world
from launch import bench
from launch.contenders import CONTENDERS, plot, suite, tables, targets
from launch.contenders.workload import Workload


def contender(seconds: list[float], **more: Any) -> dict[str, Any]:
    nothing = {"peak_memory": 2**30, "start_seconds": 5.0, "phases_ms": {}, "evaluation_seconds": []}
    return {"seconds": seconds, **nothing, **more}


def result(contenders: dict[str, Any], **work: Any) -> dict[str, Any]:
    return {
        "machine": {"cpu": "a CPU", "cores": 2, "threads": 2, "gpu": None, "packages": {"torch": "2"}},
        "workload": Workload("sst2", None, None, "bf16", examples=100, rounds=3, **work).to_dict(),
        "useful_tokens_per_round": 1000,
        "flop_per_round": 6e9,
        "products_flop_per_second": 10e9,
        "contenders": contenders,
    }


def test_a_ratio_is_the_median_over_turns() -> None:
    # The machine was slow in the second turn, for both: medians of each alone would say 3 / 2.
    measured = result({"adakron": contender([1.0, 10.0, 2.0]), "hf_lora": contender([3.0, 30.0, 3.0])})
    assert tables.ratio(measured, "hf_lora") == pytest.approx(3.0)
    assert tables.ratio(measured, "published") is None
    assert tables.ratio(measured, "hf_lora", what="evaluation_seconds") is None


def test_every_contender_has_its_rows() -> None:
    phases = {"step": 20.0, "data": 1.0, "forward": 9.0, "backward": 8.0, "optimizer": 1.5, "rest": 0.5}
    measured = result(
        {
            "hf_lora": contender([4.0, 4.0, 4.0], evaluation_seconds=[2.0, 2.0, 2.0]),
            "adakron": contender([2.0, 2.0, 2.0], phases_ms=phases, evaluation_seconds=[1.0, 1.0, 1.0]),
            "plain_fast": contender([1.6, 1.6, 1.6], evaluation_seconds=[1.0, 1.0, 1.0]),
        },
        evaluation_examples=50,
    )
    text = "\n".join(tables.document(measured))
    assert "| HF Trainer + PEFT LoRA | 25 | 0 % | 250 | 15 % | 1,024 MiB | 2.00 |" in text
    assert "| AdaKron, this engine | 20.0 | 1.0 | 9.0 | 8.0 | 1.5 | - | 0.5 | 5.0 |" in text
    assert "| HF Trainer + PEFT LoRA | 25 | 0 % | 2.00 |" in text
    assert "engine overhead over the plain loop with the same kernels: 25.0 %" in text
    assert text.index("a plain loop with the same kernels |") < text.index("this engine |") < text.index("PEFT LoRA |")


def test_without_its_base_there_is_no_ratio() -> None:
    text = "\n".join(tables.document(result({"hf_lora": contender([4.0])})))
    assert "1,024 MiB | |" in text and "overhead" not in text and "Scoring" not in text


ALL = {name: contender([3.0], evaluation_seconds=[3.0], start_seconds=6.0) for name in CONTENDERS}


def judged(results: dict[str, Any]) -> dict[tuple[str, str], bool | None]:
    return {(one["case"], one["target"]): one["met"] for one in (target.judge(results) for target in targets.TARGETS)}


def test_targets_are_met_where_this_engine_is_far_ahead() -> None:
    ours = contender([0.1], evaluation_seconds=[1.0], start_seconds=6.0)
    case = result({**ALL, "adakron": ours, "plain_fast": contender([0.1]), "adakron_2ranks": contender([0.1])})
    assert set(judged(dict.fromkeys(suite.CASES, case)).values()) == {True}


def test_targets_are_missed_where_this_engine_is_behind() -> None:
    ours = contender([4.0], evaluation_seconds=[4.0], start_seconds=13.0, peak_memory=2**30 + 1)
    case = result({**ALL, "adakron": ours, "adakron_2ranks": contender([4.5])})
    assert set(judged(dict.fromkeys(suite.CASES, case)).values()) == {False}


def test_a_target_without_its_case_is_not_measured() -> None:
    found = judged({targets.MRPC: result({"adakron": contender([1.0]), "hf_lora": contender([1.69])})})
    assert {case for (case, _), met in found.items() if met is not None} == {targets.MRPC}
    assert found[targets.MRPC, "times as fast as HF Trainer + PEFT LoRA"] is False
    text = "\n".join(targets.table([target.judge({}) for target in targets.TARGETS]))
    assert text.count("| - | not measured |") == len(targets.TARGETS)


def test_every_target_has_what_it_needs_in_the_suite() -> None:
    asked = {target.case for target in targets.TARGETS}
    assert asked <= set(suite.CASES)
    measured = {
        name: result({one: contender([1.0], evaluation_seconds=[1.0] * bool(case.evaluation_examples)) for one in case.contenders})
        for name, case in suite.CASES.items()
    }
    assert None not in judged(measured).values()
    document = "\n".join(suite.report({"cases": measured, "targets": [target.judge(measured) for target in targets.TARGETS]}))
    assert all(f"## {name}" in document for name in suite.CASES)


def test_missing_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    suite.check_data([targets.SST2], str(tmp_path))
    with pytest.raises(ConfigError, match=r"where there is no mrpc; .*make bench DATA_ROOT=DIR"):
        suite.check_data([*suite.CASES], str(tmp_path))
    with pytest.raises(ConfigError, match="--data_root is not given"):
        suite.check_data([targets.SST2], "")


def test_a_plot_needs_matplotlib_a_folder_and_a_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"png or \.svg"):
        plot.check_plot(tmp_path / "bars.pdf")
    with pytest.raises(ConfigError, match="there is no folder"):
        plot.check_plot(tmp_path / "none" / "bars.png")
    with pytest.raises(ConfigError, match=r"needs matplotlib.*adakron\[plots\]"):
        plot.check_plot(tmp_path / "bars.png")


@pytest.mark.parametrize("flag", ["json", "plot"])
def test_a_folder_in_a_files_place_is_said_before_anything_is_measured(flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.png").mkdir()
    for name in ("compare", "check_plot"):
        monkeypatch.setattr(bench, name, lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=f"--{flag} is .*there.png, which is a folder; name a file in it"):
        bench.main([f"--{flag}", str(tmp_path / "there.png")], read_world({}))


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_bars_are_drawn(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, the extra plots, is not installed")
    measured = result({"adakron": contender([1.0]), "hf_lora": contender([2.0])})
    plot.check_plot(tmp_path / f"bars{suffix}")
    plot.draw({"one": measured, "two": measured}, tmp_path / f"bars{suffix}")
    assert (tmp_path / f"bars{suffix}").read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_results_are_json() -> None:
    measured = result({"adakron": contender([1.0])})
    assert json.loads(json.dumps(measured)) == measured

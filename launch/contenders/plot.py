"""Samples per second as bars, where matplotlib is installed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adakron.errors import ConfigError
from launch.contenders import CONTENDERS
from launch.contenders.tables import OURS, number, samples_per_second

SUFFIXES = (".png", ".svg")


def check_plot(file: Path) -> None:
    """ConfigError where nothing could be drawn there."""
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"--plot is {file}; its name must end in {' or '.join(SUFFIXES)}")
    if not file.parent.is_dir():
        raise ConfigError(f"--plot is {file}, and there is no folder {file.parent}; make it, or name another file")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'adakron[plots]', or drop --plot") from None


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """One panel for each result, under its name; the fastest contender on top."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen

    speeds = {title: samples_per_second(result) for title, result in results.items()}
    heights = [len(one) for one in speeds.values()]
    figure = Figure(figsize=(8.0, 1.0 + sum(0.4 * height + 0.6 for height in heights)), layout="constrained")
    panels = figure.subplots(len(speeds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, one) in zip(panels, speeds.items(), strict=True):
        names = [CONTENDERS[name].name for name in reversed(one)]
        bars = panel.barh(names, [*reversed(one.values())], color=["tab:orange" if name == OURS else "tab:blue" for name in reversed(one)])
        panel.bar_label(bars, labels=[number(speed) for speed in reversed(one.values())], padding=3)
        panel.margins(x=0.1)
        panel.set(title=title, xlabel="samples/s" if panel is panels[-1] else "")
    figure.savefig(file, dpi=150)

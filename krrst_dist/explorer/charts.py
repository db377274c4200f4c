"""Charts as SVG or PNG, drawn by matplotlib on white paper, whatever the page around them. Know no results.

matplotlib is loaded with the first chart: it takes most of a second, which the first page need not wait for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#555555"
"""of axes and text"""
_ONE_AT_A_TIME = threading.Lock()  # matplotlib draws in one thread only
Format = Literal["svg", "png"]
Points = Sequence[tuple[float, float]]


def bars(title: str, methods: Sequence[str], columns: Sequence[str], means: np.ndarray, stds: np.ndarray, unit: str,
         format: Format = "svg") -> bytes:
    """A panel for each column, in it the methods side by side with error bars (Figure 3's layout). means, stds: [methods, columns], NaN
    where missing. Each panel has the range of its own numbers, and says where it begins."""
    across = min(3, len(columns))
    figure, panels = _figure(max(6.0, across * max(2.0, 0.22 * len(methods))), 2.6 * -(-len(columns) // across), across, len(columns))
    for column, axes in enumerate(panels):
        mean, std = means[:, column], np.nan_to_num(stds[:, column])
        for i, method in enumerate(methods):
            axes.bar(i, np.nan_to_num(mean[i]), 0.92, yerr=std[i], label=_plain(method), color=_colour(i), ecolor=INK, capsize=2)
        axes.set_xticks([])
        low, high = np.nanmin(mean - std, initial=np.inf), np.nanmax(mean + std, initial=-np.inf)
        cut = max(0.0, low - 0.25 * (high - low)) if np.isfinite(low) and high > low else 0.0
        if cut:
            axes.set_ylim(cut)
        axes.set_xlabel(_plain(columns[column]) + (f" (from {cut:.3g} on)" if cut else ""))
    panels[0].set_ylabel(unit)
    return _finish(figure, panels[0], title, format, columns=min(4, len(methods)))


def scatter(title: str, methods: Sequence[str], values: Sequence[Sequence[float]], unit: str, format: Format = "svg") -> bytes:
    """Every run's number, a row of points a method."""
    figure, (axes,) = _figure(6.0, 1.2 + 0.32 * len(methods))
    for i, numbers in enumerate(values):
        axes.plot(numbers, [i] * len(numbers), "o", color=_colour(i), alpha=0.7)
    axes.set_yticks(range(len(methods)), [_plain(method) for method in methods])
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel(unit)
    return _finish(figure, axes, title, format)


def lines(title: str, curves: Sequence[tuple[str, Points]], across: str, up: str, format: Format = "svg") -> bytes:
    """Curves over each other."""
    figure, (axes,) = _figure(6.4, 3.4)
    for i, (name, points) in enumerate(curves):
        x, y = np.asarray(points, float).reshape(-1, 2).T
        axes.plot(x, y, color=_colour(i), linewidth=1.2, label=_plain(name), marker="o" if len(x) < 12 else "", markersize=3)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return _finish(figure, axes, title, format, columns=1 if len(curves) < 9 else 0)


def parallel(title: str, names: Sequence[str], rows: Sequence[Sequence[str | float]], values: Sequence[float], unit: str,
             format: Format = "svg") -> bytes:
    """Parallel coordinates: a line a run through the values of its settings, ending at its number. names: of the settings."""
    from matplotlib import colormaps

    figure, (axes,) = _figure(max(6.0, 1.4 * (len(names) + 1)), 3.6)
    scaled, ticks = [], []
    for column in [*zip(*rows, strict=True), values]:
        heights, labels = _heights(column)
        scaled.append([heights[value] for value in column])
        ticks.append(labels)
    low, high = min(values), max(values)
    for i, path in enumerate(zip(*scaled, strict=True)):
        axes.plot(range(len(path)), path, alpha=0.6, color=colormaps["viridis"]((values[i] - low) / (high - low or 1)))
    for x, labels in enumerate(ticks):
        axes.axvline(x, color=INK, linewidth=0.6)
        for text, height in labels:
            axes.text(x + 0.02, height, _plain(text), fontsize=6, color=INK, va="center",
                      bbox={"boxstyle": "square,pad=0.1", "color": "white", "alpha": 0.8, "linewidth": 0})
    axes.set_xticks(range(len(names) + 1), [*map(_plain, names), unit], rotation=15, ha="right")
    axes.set_yticks([])
    return _finish(figure, axes, title, format)


def cloud(title: str, parts: Sequence[tuple[str, np.ndarray]], format: Format = "svg") -> bytes:
    """Points in a plane without units. parts: name -> [p, 2]; the first is drawn below the others, as pixels in a picture of curves."""
    figure, (axes,) = _figure(6.4, 6.0)
    for i, (name, at) in enumerate(parts):
        axes.scatter(*at.T, s=6 if i == 0 else 14, color=INK if i == 0 else _colour(i - 1), alpha=0.35 if i == 0 else 0.9, linewidths=0,
                     label=_plain(name), rasterized=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(0, 0), ncols=len(parts))
    return _finish(figure, axes, title, format)


def _heights(column: Sequence[str | float]) -> tuple[dict[str | float, float], list[tuple[str, float]]]:
    """Each value's height in [0, 1], and the labels beside the axis."""
    known = sorted(set(column), key=lambda value: (isinstance(value, str), value))
    if any(isinstance(value, str) for value in known):
        heights = {value: i / max(1, len(known) - 1) for i, value in enumerate(known)}
    else:
        span = known[-1] - known[0] or 1
        heights = {value: (value - known[0]) / span for value in known}
    marked = known if len(known) <= 20 else [known[0], known[-1]]
    return heights, [(value if isinstance(value, str) else f"{value:.4g}", heights[value]) for value in marked]


def _figure(width: float, height: float, across: int = 1, count: int = 1) -> tuple[Figure, list[Axes]]:
    """With so many panels, so many of them in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = [figure.add_subplot(-(-count // across), across, i + 1) for i in range(count)]
    for axes in panels:
        axes.tick_params(colors=INK, labelsize=8)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, panels


def _finish(figure: Figure, axes: Axes, title: str, format: Format, columns: int = 0) -> bytes:
    """axes: the panel whose legend is that of all. columns: of the legend, 0 for none."""
    from matplotlib import rc_context

    figure.suptitle(_plain(title, most=120), color=INK, fontsize=9, x=0.01, ha="left")
    if columns and (named := axes.get_legend_handles_labels())[1]:
        figure.legend(*named, fontsize=7, ncols=columns, frameon=False, labelcolor=INK, loc="outside lower left")
    sink = BytesIO()
    with _ONE_AT_A_TIME, rc_context({"svg.fonttype": "path", "svg.hashsalt": "krrst"}):
        figure.savefig(sink, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return sink.getvalue()


def _colour(i: int) -> tuple[float, float, float]:
    """The i-th of twenty, of which the last ten are the first ones in pale."""
    from matplotlib import colormaps

    return colormaps["tab20"].colors[2 * i % 20 + (i % 20 >= 10)]


def _plain(text: str, most: int = 60) -> str:
    """Text that matplotlib does not take for mathematics, of bearable length. It stands in the SVG as a comment, too, which `--` ends."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = (text if len(text) <= most else text[:most - 3] + "...").replace("$", r"\$").replace("--", "–")
    return f" {text}" if text.startswith("_") else text  # a label that begins so is left out of legends

"""Two pictures of a run: the distilled images before and after, and the loss curves.

Draws with matplotlib's Agg canvas and keeps no global state, so that it works in any process and thread. Knows
nothing of how the images and numbers came about.

Letters: m images [C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from krrst_dist import storage
from krrst_dist.artifacts import Space

COLUMNS = 10  # images in a row
LABELS, GAP, DPI = 90, 14, 120  # pixels left of the images, between rows of pairs, and in an inch


@dataclass(frozen=True)
class Curve:
    """The losses of one run: (update, loss) points. held_out begins with that of random images with targets; it may be empty."""

    seed: int
    outer: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]


def images_png(before: np.ndarray, after: np.ndarray, space: Space, path: str | Path, *, limit: int = 50) -> None:
    """Write the first images, each row of starting images above the row of what became of them, as a PNG.

    before, after: [m, C, H, W] in `space`, in the same order; shown as pixels clipped to [0, 1]. At most `limit`
    are drawn. path: file or URI. Raises StorageError where it cannot be written.
    """
    shown = min(limit, len(before))
    zoom = max(1, round(96 / before.shape[-1]))
    pictures = [np.clip(space.to_pixels(x[:shown]), 0, 1).repeat(zoom, -1).repeat(zoom, -2) for x in (before, after)]
    columns = min(COLUMNS, shown)
    starts = range(0, shown, columns)
    bands = [np.concatenate([_strip(x[start:start + columns], columns) for x in pictures]) for start in starts]
    height, width, _ = bands[0].shape  # of one row of pairs, in pixels of the picture
    figure = Figure(figsize=((LABELS + width) / DPI, len(bands) * (height + GAP) / DPI), dpi=DPI)
    for i, band in enumerate(reversed(bands)):  # from the bottom up, as matplotlib counts
        bottom = i * (height + GAP)
        figure.figimage(band, LABELS, bottom)
        for text, at in (("distilled", 0.25), ("start", 0.75)):
            y = (bottom + at * height) / (len(bands) * (height + GAP))
            figure.text((LABELS - 8) / (LABELS + width), y, text, ha="right", va="center", fontsize=9)
    _write(figure, path)


def curve_png(curves: Sequence[Curve], path: str | Path) -> None:
    """Write the loss curves of one or several runs, one colour a run, as a PNG.

    The loss on the pool's own models is light, as it jumps with their age; the held-out ridge loss is what to
    watch, against the dashed level of random images with targets. The highest jumps are cut off. path: file or URI.
    """
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        colour = f"C{i}"
        axes.plot(*_points(curve.outer), color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(*_points(curve.held_out), color=colour, linewidth=2, marker="o", markersize=4, label=f"seed {curve.seed}")
        if curve.held_out:
            axes.axhline(curve.held_out[0][1], color=colour, linestyle="--", linewidth=1)
    held_out = any(curve.held_out for curve in curves)
    if held_out:
        axes.set_ylim(0, _top(curves))
    axes.set_xlabel("meta-update")
    axes.set_ylabel("mean squared error on real images" if held_out else "the method's loss")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    kinds = [Line2D([], [], color="0.3", linewidth=2, marker="o", markersize=4, label="held-out ridge loss"),
             Line2D([], [], color="0.3", linestyle="--", linewidth=1, label="held-out, random images + targets"),
             Line2D([], [], color="0.3", alpha=0.35, linewidth=0.8, label="outer loss (pool models)")] if held_out else []
    seeds = axes.get_legend_handles_labels()[0] if len(curves) > 1 else []
    axes.legend(handles=[*kinds, *seeds], fontsize=8, framealpha=0.9, edgecolor="none")
    _write(figure, path)


def _points(points: Sequence[tuple[int, float]]) -> np.ndarray:
    return np.asarray(points, float).reshape(-1, 2).T  # [2, points]


def _top(curves: Sequence[Curve]) -> float:
    """The axis' upper end: above every held-out loss and all but the highest of the outer losses."""
    watched = [loss for curve in curves for _, loss in curve.held_out]
    outer = [loss for curve in curves for _, loss in curve.outer]
    return max(1.2 * max(watched), float(np.quantile(outer, 0.95)) if outer else 0)


def _strip(x: np.ndarray, columns: int) -> np.ndarray:
    """[n, C, H, W] in [0, 1], n <= columns -> one row of images, 2 white pixels around each: [H+4, columns (W+4), 3]."""
    row = np.ones((columns, 3, x.shape[2] + 4, x.shape[3] + 4), np.float32)
    row[:len(x), :, 2:-2, 2:-2] = x
    return np.concatenate([*row], axis=2).transpose(1, 2, 0)


def _write(figure: Figure, path: str | Path) -> None:
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    storage.write_whole(path, buffer.getvalue())

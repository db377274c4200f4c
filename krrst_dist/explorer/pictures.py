"""A distillation run to look at: its images as PNG, its losses, what its file says. Writes no HTML."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import flatten
from krrst_dist.explorer import charts
from krrst_dist.explorer.library import SetFiles

PAGE = 60
"""images on a page"""
ZOOMS = (32, 64, 96, 160, 256)
"""pixels a side that images are shown at"""


def pixels(x: np.ndarray, held: DistilledSet) -> np.ndarray:
    """[m, C, H, W] of a set -> uint8 [m, H, W, 3]."""
    shown = np.clip(held.space.to_pixels(x), 0, 1)
    if shown.shape[1] == 1:
        shown = shown.repeat(3, 1)
    return (shown[:, :3].transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)


def png(held: DistilledSet, index: int) -> bytes:
    """One image. Raises IndexError."""
    if not 0 <= index < len(held.x_syn):
        raise IndexError(index)
    return _encoded(pixels(held.x_syn[index:index + 1], held)[0])


def sheet(held: DistilledSet, *, columns: int = 10, zoom: int = 1, most: int | None = None) -> bytes:
    """Images in rows, as one PNG."""
    images = pixels(held.x_syn[:most], held).repeat(zoom, 1).repeat(zoom, 2)
    count, height, width, _ = images.shape
    rows, gap = -(-count // columns), 2
    page = np.full((rows * (height + gap) + gap, min(columns, count) * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        page[top:top + height, left:left + width] = image
    return _encoded(page)


def archive(held: DistilledSet) -> bytes:
    """A .zip of one PNG an image and labels.json."""
    sink = BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
        for i, image in enumerate(pixels(held.x_syn, held)):
            file.writestr(f"{i:05}.png", _encoded(image))
        about = {"label_kind": held.label_kind, "class_names": held.class_names, "y_syn": held.y_syn.tolist()}
        file.writestr("labels.json", json.dumps(about))
    return sink.getvalue()


def about(held: DistilledSet) -> list[tuple[str, str]]:
    """What a set's file says of it, name by name."""
    first = [("images", " x ".join(map(str, held.x_syn.shape))), ("labels", f"{held.label_kind}, {' x '.join(map(str, held.y_syn.shape))}"),
             ("space", held.space.kind), ("fingerprint", held.fingerprint)]
    settings = flatten({"recipe": held.recipe} | held.metadata)
    return first + [(name, value if isinstance(value, str) else json.dumps(value)) for name, value in sorted(settings.items())]


def losses(files: SetFiles, format: charts.Format = "svg") -> bytes | None:
    """The run's loss curves, None where it has none."""
    history = files.history
    if history is None or not {"step", "loss", "held_out"} <= set(history.column_names):
        return None
    curves = [(name, points) for name, column in (("loss on the pool's models", "loss"), ("held-out ridge loss", "held_out"))
              if (points := _thinned([pair for pair in zip(history["step"].to_pylist(), history[column].to_pylist(), strict=True)
                                      if pair[1] is not None]))]
    return charts.lines("losses", curves, "meta-update", "loss", format) if curves else None


def _thinned(points: Sequence[tuple[float, float]], most: int = 2000) -> list[tuple[float, float]]:
    return list(points[::max(1, len(points) // most)])


def _encoded(image: np.ndarray) -> bytes:
    sink = BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()

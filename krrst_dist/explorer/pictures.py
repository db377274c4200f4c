"""A distillation run to look at: its images as PNG, its losses, its map of the feature space, what its file says. Writes no HTML."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyarrow as pa

from krrst_dist.artifacts import DistilledSet
from krrst_dist.explorer import charts
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.feature_map import KINDS, FeatureMap
from krrst_dist.setting_names import flatten
from krrst_dist.sheets import sheet, to_pixels, to_png

DRAWN = 1e300
"""larger numbers are in no chart"""
PAGE = 60
"""images on a page"""
ZOOMS = (32, 64, 96, 160, 256)
"""pixels a side that images are shown at"""
TITLES = {"real": "targets of real images", "labels": "Y_s", "images": "features of X_s"}
"""of the kinds of points in a feature map"""


def png(images: np.ndarray, index: int) -> bytes:
    """One of uint8 [m, H, W, C]. Raises IndexError."""
    if not 0 <= index < len(images):
        raise IndexError(index)
    return to_png(images[index])


def overview(held: DistilledSet, *, columns: int = 10, zoom: int = 1, most: int | None = None) -> bytes:
    """A set's images in rows, as one PNG."""
    return sheet(to_pixels(held.x_syn[:most], held.space), columns=columns, zoom=zoom, gap=2)


def archive(held: DistilledSet) -> bytes:
    """A .zip of one PNG an image and labels.json."""
    sink = BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as file:
        for i, image in enumerate(to_pixels(held.x_syn, held.space)):
            file.writestr(f"{i:05}.png", to_png(image))
        about = {"label_kind": held.label_kind, "class_names": held.class_names, "y_syn": held.y_syn.tolist()}
        file.writestr("labels.json", json.dumps(about))
    return sink.getvalue()


@dataclass(frozen=True)
class About:
    """What a set's file says of it, name by name. settings: all that it was made with."""

    main: list[tuple[str, str]]
    settings: list[tuple[str, str]]


MAIN = ("method", "source", "seed", "updates", "held_out_loss", "commit")


def about(held: DistilledSet) -> About:
    """What there is to say of a set."""
    said = {name: value if isinstance(value, str) else json.dumps(value)
            for name, value in sorted(flatten({"recipe": held.recipe} | held.metadata).items())}
    main = [("images", " x ".join(map(str, held.x_syn.shape))), ("labels", f"{held.label_kind}, {' x '.join(map(str, held.y_syn.shape))}"),
            ("space", held.space.kind), ("fingerprint", held.fingerprint)]
    return About(main + [(name.replace("_", " "), said[name]) for name in MAIN if name in said],
                 [(name, value) for name, value in said.items() if name not in MAIN])


def losses(files: SetFiles, format: charts.Format = "svg") -> bytes | None:
    """The run's loss curves, None where it has none."""
    own = f"{files.method}'s loss" if files.method else "the method's loss"
    return _curves(files, "losses", {"loss": own, "held_out": "held-out ridge loss"}, "loss", format)


def learning_rate(files: SetFiles, format: charts.Format = "svg") -> bytes | None:
    """The learning rate of X_s, None where the run's table has none."""
    return _curves(files, "learning rate", {"lr": "learning rate of X_s"}, "learning rate", format)


def points(found: FeatureMap) -> bytes:
    """What the page draws of a feature map, as JSON: kinds, and a point a row [x, y, kind, index], x and y in [0, 1]."""
    positions = found.positions.astype(float)
    low, high = positions.min(0), positions.max(0)
    at = (positions - low) / np.where(high > low, high - low, 1)
    rows = [[round(float(x), 4), round(float(y), 4), int(kind), int(index)]
            for (x, y), kind, index in zip(at, found.kinds, found.indices, strict=True)]
    return json.dumps({"kinds": [TITLES[kind] for kind in KINDS], "points": rows, "real": found.real_places.tolist(),
                       "labels": found.real_labels.tolist(), "nearest": found.nearest_places.tolist(),
                       "distances": [round(float(value), 4) for value in found.distances]}).encode()


def feature_chart(found: FeatureMap, format: charts.Format = "svg") -> bytes:
    """The same as a chart."""
    parts = [(TITLES[kind], found.positions[found.kinds == i]) for i, kind in enumerate(KINDS)]
    return charts.cloud("t-SNE in the target's feature space", [(title, at) for title, at in parts if len(at)], format)


def _curves(files: SetFiles, title: str, columns: dict[str, str], unit: str, format: charts.Format) -> bytes | None:
    history = files.history
    if history is None:
        return None
    there = [field.name for field in history.schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)]
    if there.count("step") != 1:
        return None
    curves = [(name, points) for column, name in columns.items() if there.count(column) == 1 and (points := _points(history, column))]
    return charts.lines(title, curves, "meta-update", unit, format) if curves else None


def _points(history: pa.Table, column: str, most: int = 2000) -> list[tuple[float, float]]:
    """A column by step, evenly thinned; what cannot be drawn is left out."""
    rows = history.select(["step", column]).drop_null()
    rows = rows.take(np.arange(0, len(rows), max(1, len(rows) // most)))
    pairs = zip(rows["step"].to_pylist(), rows[column].to_pylist(), strict=True)
    return [(x, y) for x, y in pairs if abs(x) < DRAWN and abs(y) < DRAWN]

"""Small betons of real images, for the tests of the data room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from krrst_dist.data import integrity
from krrst_dist.data.beton import write_beton
from krrst_dist.data.prepared import Part, Prepared


class Items:
    """Images and labels as `write_beton` takes them."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i], int(self.labels[i])


def real_images(parquet: Path, count: int, resolution: int) -> Items:
    """The first images of a Parquet file, squashed to the resolution."""
    rows = next(pq.ParquetFile(parquet).iter_batches(count)).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB").resize((resolution, resolution)) for row in rows]
    return Items(np.stack([np.asarray(image) for image in images]), np.array([row["label"] for row in rows]))


def prepared_beton(path: Path, items: Items, encoding: str, *, part: int | None = None) -> Prepared:
    """Write a beton, or several of `part` images each, and describe them."""
    part = part or len(items)
    paths = [path if part == len(items) else path.with_name(f"{path.stem}-{i}.beton") for i in range(-(-len(items) // part))]
    for i, file in enumerate(paths):
        rows = range(i * part, min((i + 1) * part, len(items)))
        write_beton(file, Items(items.pixels[rows.start:rows.stop], items.labels[rows.start:rows.stop]), indices=rows,
                    resolution=items.pixels.shape[1], encoding=encoding, progress=False)
    return describe(paths, items, encoding)


def describe(paths: Sequence[Path], items: Items, encoding: str) -> Prepared:
    """The description that `prepare` would give."""
    per = -(-len(items) // len(paths))
    parts = tuple(Part(path.name, i * per, min(per, len(items) - i * per), path.stat().st_size, integrity.named(integrity.crc32(path)),
                       (0, 0, 0), (0, 0, 0)) for i, path in enumerate(paths))
    pixels = items.pixels / 255
    mean, std = (tuple(values.tolist()) for values in (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))))
    return Prepared(path=paths[0].with_suffix(".json"), resolution=items.pixels.shape[1], resize="squash", encoding=encoding, mean=mean,
                    std=std, class_names=(), labelled=True, name="cifar100", split="test", official_count=None,
                    fingerprint="these images", parts=parts)


def beton_of(prepared: Prepared) -> Path:
    """The one beton."""
    path, = prepared.files
    return path

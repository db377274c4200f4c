"""Small betons of real images, for the tests of the data room."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from krrst_dist.data import integrity
from krrst_dist.data.beton import write_beton
from krrst_dist.data.prepared import Prepared


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


def prepared_beton(path: Path, items: Items, encoding: str) -> Prepared:
    """Write a beton and describe it."""
    write_beton(path, items, resolution=items.pixels.shape[1], encoding=encoding, progress=False)
    return describe(path, items, encoding)


def describe(path: Path, items: Items, encoding: str) -> Prepared:
    """The description that `prepare` would give."""
    pixels = items.pixels / 255
    mean, std = (tuple(values.tolist()) for values in (pixels.mean((0, 1, 2)), pixels.std((0, 1, 2))))
    return Prepared(path=path, count=len(items), size=path.stat().st_size, checksum=integrity.named(integrity.crc32(path)),
                    resolution=items.pixels.shape[1], resize="squash", encoding=encoding, mean=mean, std=std, class_names=(),
                    labelled=True, name="cifar100", split="test", found=len(items), official_count=None, fingerprint="these images")

"""The same batches from arrays in memory: for tests of the algorithm, and machines without FFCV."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from krrst_dist.data.images import resize, to_rgb
from krrst_dist.data.order import EpochOrder, State
from krrst_dist.data.reader import Batch, channels_first, check_indices
from krrst_dist.data.sources import open_images


class MemoryReader:
    """A `Reader` over images [n, H, W, C] uint8 and labels [n]; the order is BetonReader's, bit for bit."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, *, batch: int, seed: int, purpose_index: int) -> None:
        """As `BetonReader`."""
        self._order = EpochOrder(indices, batch=batch, seed=seed, shard=purpose_index)
        check_indices(self._order.indices, len(images))
        self._images, self._labels = images, np.asarray(labels, dtype=np.int64)

    def next(self) -> Batch:
        index = self._order.current().copy()
        self._order.advance()
        return Batch(index, channels_first(self._images[index]), self._labels[index])

    def state(self) -> State:
        return self._order.state()

    def restore(self, state: State) -> None:
        self._order.restore(state)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class InMemory:
    """One split of a data set: images uint8 [n, H, W, 3], labels int64 [n], channel statistics over its pixels in [0, 1]."""

    images: np.ndarray
    labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


def load_images(name: str, split: Literal["train", "test"], *, root: Path, resolution: int) -> InMemory:
    """Decode a whole split, as `krrst prepare` does for images up to 64 px, in one thread: for tens of thousands of images.

    Raises DataError, BadImage.
    """
    found = open_images(name, split, root)
    images = np.empty((len(found), resolution, resolution, 3), np.uint8)

    for i in range(len(found)):
        images[i] = resize(to_rgb(found[i].image), resolution, "crop")
    channels = images.reshape(-1, 3)
    parts = [channels[start : start + 2**20].astype(np.float64) / 255 for start in range(0, len(channels), 2**20)]
    mean = sum(part.sum(0) for part in parts) / len(channels)
    variance = sum(((part - mean) ** 2).sum(0) for part in parts) / len(channels)
    return InMemory(images, found.labels, tuple(mean.tolist()), tuple(np.sqrt(variance).tolist()), found.class_names)

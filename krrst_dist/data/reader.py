"""Batches of real images, in an order that depends on the seed alone; their position can be saved and restored.

The protocol that distillation reads through, and the reader of betons. FFCV is imported when one is opened, so that
the package works without it (`memory_reader.py`). Knows nothing of targets or normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from krrst_dist.config import ConfigError
from krrst_dist.data.order import EpochOrder, State
from krrst_dist.data.prepared import Prepared


@dataclass(frozen=True)
class Batch:
    """b images, no memory shared with the reader."""

    index: np.ndarray  # int64 [b], places in the prepared data set
    images: Tensor  # uint8 [b, C, H, W], channels_last
    labels: np.ndarray  # int64 [b]


class Reader(Protocol):
    """An endless sequence of batches; epochs are reshuffled, nothing comes twice in one, its last batch may be short."""

    def next(self) -> Batch: ...

    def state(self) -> State:
        """The position of the batch that `next()` will return."""
        ...

    def restore(self, state: State) -> None:
        """Go to a position; what is skipped is not decoded."""
        ...

    def close(self) -> None: ...


class BetonReader:
    """The images `indices` of a prepared data set, by FFCV. One thread at a time may use it."""

    def __init__(self, prepared: Prepared, indices: np.ndarray, *, batch: int, seed: int, purpose_index: int, threads: int = 1) -> None:
        """indices: int64 [n_s]. purpose_index: the logical shard, whose orders differ from every other's at equal seed.
        threads: that decode a batch; changes nothing but the time it takes.

        Raises ConfigError (batch larger than the shard, indices that do not exist), DataError (the file).
        """
        self._order = EpochOrder(indices, batch=batch, seed=seed, shard=purpose_index)
        check_indices(self._order.indices, prepared.count)
        self._decoder = open_decoder(prepared, threads=threads)

    def next(self) -> Batch:
        index = self._order.current().copy()
        pixels, labels = self._decoder.read(index)
        self._order.advance()
        return Batch(index, channels_first(pixels), labels)

    def state(self) -> State:
        return self._order.state()

    def restore(self, state: State) -> None:
        self._order.restore(state)

    def close(self) -> None:
        self._decoder.close()


def read_all(prepared: Prepared, indices: np.ndarray, *, threads: int = 1) -> tuple[Tensor, np.ndarray]:
    """Images uint8 [n, C, H, W] (channels_last) and labels int64 [n] at `indices` [n], in that order; for parts that fit in memory."""
    indices = np.asarray(indices, dtype=np.int64)
    pixels = np.empty((len(indices), prepared.resolution, prepared.resolution, 3), np.uint8)
    labels = np.empty(len(indices), np.int64)
    for i, part in enumerate(read_in_order(prepared, indices, batch=1024, threads=threads)):
        place = slice(i * 1024, i * 1024 + len(part.labels))
        channels_first(pixels[place]).copy_(part.images)
        labels[place] = part.labels
    return channels_first(pixels), labels


def read_in_order(prepared: Prepared, indices: np.ndarray, *, batch: int, threads: int = 1) -> Iterator[Batch]:
    """Once through `indices` [n], in their order, `batch` at a time."""
    check_indices(indices, prepared.count)
    decoder = open_decoder(prepared, threads=threads)
    try:
        for start in range(0, len(indices), batch):
            index = np.array(indices[start:start + batch], dtype=np.int64)
            pixels, labels = decoder.read(index)
            yield Batch(index, channels_first(pixels), labels)
    finally:
        decoder.close()


def channels_first(pixels: np.ndarray) -> Tensor:
    """uint8 [b, H, W, C] -> [b, C, H, W], the same memory: channels_last."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def open_decoder(prepared: Prepared, *, threads: int):
    """A `BetonDecoder` of all parts, whose rows are the places in the prepared data set. Raises DataError."""
    from krrst_dist.data.beton_decoder import BetonDecoder

    return BetonDecoder([(path, part.count) for path, part in prepared.files.items()], threads=threads)


def check_indices(indices: np.ndarray, count: int) -> None:
    """Raises ConfigError unless there are some and each is one of the `count` images."""
    if len(indices) == 0 or indices.min() < 0 or indices.max() >= count:
        span = f"{indices.min()}..{indices.max()}" if len(indices) else "none"
        raise ConfigError(f"indices = {span}: must be at least one and within 0..{count - 1}, the images of the data set; "
                          f"make them from its own split")

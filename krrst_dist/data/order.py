"""Which image comes when: shards, and the order of their epochs, as pure functions of seeds.

All that a reader has to remember is its position, (epoch, batch): every order can be made again from the seed.
Knows nothing of files or pixels.
"""

from __future__ import annotations

import numpy as np

from krrst_dist.config import ConfigError
from krrst_dist.seeds import numpy_rng

State = dict[str, int]
"""{"epoch": int, "batch": int}: the next batch, counted from 0 in its epoch."""


def shard_indices(training: np.ndarray, shard: int, shards: int, seed: int) -> np.ndarray:
    """The images of one logical shard: perm(seed)[shard::shards] of `training` [n] -> int64 [about n / shards].

    The shards are disjoint and together are `training`.
    """
    if not 0 <= shard < shards:
        raise ConfigError(f"shard = {shard}: there are shards 0..{shards - 1}; choose one of them")
    if shards > len(training):
        raise ConfigError(f"distill.shards = {shards}: only {len(training)} images are there to share out; take fewer shards")
    return numpy_rng(seed, "shards").permutation(np.asarray(training, dtype=np.int64))[shard::shards]


class EpochOrder:
    """The endless sequence of batches of indices; every epoch is a new permutation, whose last batch may be short."""

    def __init__(self, indices: np.ndarray, *, batch: int, seed: int, shard: int) -> None:
        """indices: int64 [n_s], each image once.

        Raises ConfigError when `batch` exceeds the images there are, or an image is listed twice.
        """
        self.indices = np.array(indices, dtype=np.int64)  # [n_s]
        n = len(self.indices)
        if not 1 <= batch <= n:
            raise ConfigError(f"batch = {batch} images a shard: must be 1 to {n}, the images of shard {shard}; lower distill.batch "
                              f"(shards times this), or take fewer shards or more data")
        if len(np.unique(self.indices)) != n:
            raise ConfigError(f"indices of shard {shard}: some of the {n} are the same image; list each image once")
        self.batch, self.seed, self.shard = batch, seed, shard
        self.batches = -(-n // batch)  # an epoch's
        self.restore({"epoch": 0, "batch": 0})

    def current(self) -> np.ndarray:
        """Indices of the next batch: int64 [b], or fewer at the end of an epoch."""
        start = self._position * self.batch
        return self._permutation[start:start + self.batch]

    def advance(self) -> None:
        """Go on to the batch after it."""
        if self._position + 1 < self.batches:
            self._position += 1
        else:
            self.restore({"epoch": self._epoch + 1, "batch": 0})

    def state(self) -> State:
        return {"epoch": self._epoch, "batch": self._position}

    def restore(self, state: State) -> None:
        """Go to any position. Raises ConfigError for one that this order does not have."""
        epoch, position = state["epoch"], state["batch"]
        if epoch < 0 or not 0 <= position < self.batches:
            raise ConfigError(f"reader position = {state}: an epoch of {len(self.indices)} images at batch {self.batch} has "
                              f"batches 0..{self.batches - 1}; resume with the data, shards and batch it was saved with")
        self._epoch, self._position = epoch, position
        self._permutation = numpy_rng(self.seed, "epoch order", self.shard, epoch).permutation(self.indices)


def global_batch(training: np.ndarray, *, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices [batch] of the images of a step: every image of `training` [n] once an epoch, in an order that is new in each.

    A batch at an epoch's end goes on with the next epoch's first images, so that all batches are of one size.
    """
    n, start = len(training), step * batch
    epochs = range(start // n, (start + batch - 1) // n + 1)
    order = np.concatenate([numpy_rng(seed, "target epoch", epoch).permutation(training) for epoch in epochs])
    return order[start % n :][:batch]

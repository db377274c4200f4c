"""How the shards' contributions become one outer step, and how the new values reach the actors.

Here through Ray's object store: ordered, so that the sum is the same bit for bit however many actors there are, and
with nothing to rebuild after a failure. Another way to sum is another class with the methods of `Aggregator`. Knows
nothing of checkpoints or progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import ray
from torch import Tensor

from krrst_dist.algorithm import Contribution, Outer
from krrst_dist.on_ray.group import START, STEP, WorkerGroup


@dataclass(frozen=True)
class Update:
    """One meta-update that was applied: what was summed, and the seconds of each stage (of the slowest actor)."""

    contribution: Contribution
    train: float
    contribute: float
    combine: float
    total: float


class Aggregator(Protocol):
    """Does whole meta-updates on the actors' shards."""

    @property
    def shared(self) -> tuple[ray.ObjectRef, ...]:
        """What is learned (X_s [m, C, H, W], Y_s [m, k]) as it is now, as arrays in the object store."""

    def update(self, step: int) -> Update:
        """Do meta-update `step`."""

    def state_dict(self) -> dict[str, Tensor]:
        """The outer optimiser's state."""


class ObjectStoreAggregator:
    """The driver holds the outer optimiser; arrays travel by the object store."""

    def __init__(self, group: WorkerGroup, outer: Outer, combine: Callable[[Sequence[Contribution]], Contribution]) -> None:
        """combine: how the shards' contributions, in their order, make one."""
        self._group, self._outer, self._combine = group, outer, combine
        self._slowest = 0.0
        self._share()

    @property
    def shared(self) -> tuple[ray.ObjectRef, ...]:
        """What is learned (X_s [m, C, H, W], Y_s [m, k]) as it is now, as arrays in the object store."""
        return self._shared

    def update(self, step: int) -> Update:
        """Do meta-update `step`: contributions in shard order, the outer step, the new values to the store."""
        started = time.perf_counter()
        answers = self._group.everywhere("update", step, *self._shared, silence=max(STEP, 20 * self._slowest) if self._slowest else START)
        arrived = time.perf_counter()
        parts = sorted((part for answer in answers for part in answer.parts), key=lambda part: part.shard)
        total = self._combine([part.unpack() for part in parts])
        self._outer.step(*total.gradients)
        self._share()
        done = time.perf_counter()
        self._slowest = max(self._slowest, arrived - started)
        return Update(total, train=max(answer.train_seconds for answer in answers),
                      contribute=max(answer.contribute_seconds for answer in answers), combine=done - arrived, total=done - started)

    def state_dict(self) -> dict[str, Tensor]:
        """The outer optimiser's state."""
        return self._outer.state_dict()

    def _share(self) -> None:
        self._shared = tuple(ray.put(value.numpy()) for value in self._outer.values)

"""How the shards' contributions become one outer step, and how the new values reach the actors.

Two ways. Through Ray's object store: ordered, so that the sum is the same bit for bit however many actors there are, and
with nothing to rebuild after a failure. Collective, for several GPUs: an all-reduce among the actors, nothing of which
passes the driver. Knows nothing of checkpoints or progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import ray
import torch
from torch import Tensor

from krrst_dist.algorithm import Contribution, Outer
from krrst_dist.on_ray import sliced
from krrst_dist.on_ray.group import START, WorkerGroup, silence_allowed


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

    def update(self, step: int, *, last: bool = False) -> Update:
        """Do meta-update `step`. last: no other one follows."""

    def state_dict(self) -> dict[str, Tensor]:
        """The outer optimiser's state."""


class ObjectStoreAggregator:
    """The driver holds the outer optimiser; arrays travel by the object store.

    While the driver sums, and the new values travel, the actors begin with what does not need them of the next update.
    """

    def __init__(self, group: WorkerGroup, outer: Outer, combine: Callable[[Sequence[Contribution]], Contribution]) -> None:
        """combine: how the shards' contributions, in their order, make one."""
        self._group, self._outer, self._combine = group, outer, combine
        self._slowest = 0.0
        self._ahead: list[tuple[int, ray.ObjectRef]] = []
        self._share()

    @property
    def shared(self) -> tuple[ray.ObjectRef, ...]:
        """What is learned (X_s [m, C, H, W], Y_s [m, k]) as it is now, as arrays in the object store."""
        return self._shared

    def update(self, step: int, *, last: bool = False) -> Update:
        """Do meta-update `step`: contributions in shard order, the outer step, the new values to the store."""
        started = time.perf_counter()
        silence = silence_allowed(self._slowest)
        if self._group.layout.spread:
            parts, train = sliced.contributions(self._group, step, self._shared, silence=silence)
        else:
            parts, train = self._whole(step, silence, last)
        arrived = time.perf_counter()
        total = self._combine(parts)
        self._outer.step(*total.gradients)
        self._share()
        done = time.perf_counter()
        self._slowest = max(self._slowest, arrived - started)
        return Update(total, train=train, contribute=arrived - started - train, combine=done - arrived, total=done - started)

    def _whole(self, step: int, silence: float, last: bool) -> tuple[list[Contribution], float]:
        """All contributions, in shard order, each computed by one actor; and the longest training."""
        calls = self._group.ask("update", step, *self._shared)
        ahead, self._ahead = self._ahead, [] if last else self._group.ask("look_ahead", step + 1)
        self._group.gather(ahead, silence=silence)
        answers = self._group.gather(calls, silence=silence)
        parts = sorted((part for answer in answers for part in answer.parts), key=lambda part: part.shard)
        return [part.unpack() for part in parts], max(answer.train_seconds for answer in answers)

    def state_dict(self) -> dict[str, Tensor]:
        """The outer optimiser's state."""
        return self._outer.state_dict()

    def _share(self) -> None:
        self._shared = tuple(ray.put(value.numpy()) for value in self._outer.values)


class CollectiveAggregator:
    """Each actor holds a replica of the outer optimiser, and they sum among themselves (`collective.py`); the driver says when an update
    is to be done and hears its loss. It gets X_s and Y_s at checkpoints and for held-out losses alone."""

    def __init__(self, group: WorkerGroup, outer: Outer, combine: Callable[[Sequence[Contribution]], Contribution]) -> None:
        """outer: the state to start from; the driver's own copy is brought up to date at checkpoints."""
        self._group, self._outer, self._slowest = group, outer, 0.0
        self._shared: tuple[ray.ObjectRef, ...] | None = None
        alone = len(set(group.everywhere("node", silence=START))) == 1
        (place,) = group.gather([(0, group.call(0, "rendezvous", alone))], silence=START)
        start, actors = (ray.put(outer), ray.put(combine)), range(group.layout.actors)
        group.gather([(g, group.call(g, "join", place, alone, g, len(actors), *start, group.device)) for g in actors], silence=START)

    @property
    def shared(self) -> tuple[ray.ObjectRef, ...]:
        """What is learned as it is now, in the object store of actor 0's host."""
        if self._shared is None:
            references = self._group.call(0, "values", returns=len(self._outer.values))
            self._shared = tuple(references) if isinstance(references, list) else (references,)
        return self._shared

    def update(self, step: int, *, last: bool = False) -> Update:
        """Do meta-update `step` in all actors at once."""
        started = time.perf_counter()
        told = self._group.gather(self._group.ask("together", step, last), silence=silence_allowed(self._slowest))
        total = time.perf_counter() - started
        self._slowest, self._shared = max(self._slowest, total), None
        self._outer.steps = step + 1
        return Update(Contribution(told[0].loss, (), told[0].images, told[0].retries), train=max(one.train for one in told),
                      contribute=max(one.contribute for one in told), combine=max(one.combine for one in told), total=total)

    def state_dict(self) -> dict[str, Tensor]:
        """The outer optimiser's state, of actor 0; the driver's copy has it, too, from then on."""
        (state,) = self._group.gather([(0, self._group.call(0, "outer_state"))], silence=START)
        self._outer.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
        return self._outer.state_dict()

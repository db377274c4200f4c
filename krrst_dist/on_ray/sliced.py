"""Meta-gradients whose rows several actors share: who does which slice, and how weights and features get from one to the other.

`algorithm/slices.py` says what each slice computes. Weights, features and their gradients go from actor to actor by the object store;
the driver sees what it needs for the sum alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
from torch import Tensor

from krrst_dist.algorithm import Contribution, Shard, Slice, SlicedShard

if TYPE_CHECKING:
    from krrst_dist.on_ray.group import WorkerGroup

BuildSlice = Callable[[int, int], Slice]
"""(shard index, p) -> slice p > 0 of it. Picklable; called in the actor."""
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Layout:
    """Who hosts what: slice p of shard s is unit p * S + s, and unit u is on actor u mod G."""

    shards: int
    slices: int
    actors: int

    @property
    def spread(self) -> bool:
        """Are a shard's slices on several actors?"""
        return self.actors > self.shards

    def actor(self, shard: int, p: int = 0) -> int:
        """The actor of a slice; p = 0: of the shard itself."""
        return (p * self.shards + shard) % self.actors

    def shards_of(self, actor: int) -> list[int]:
        """The shards that an actor hosts."""
        return [s for s in range(self.shards) if self.actor(s) == actor]

    def slices_of(self, actor: int) -> list[tuple[int, int]]:
        """(shard, p) of the further slices that an actor hosts; none where each shard does its own."""
        return [(s, p) for s in range(self.shards) for p in range(1, self.slices) if self.spread and self.actor(s, p) == actor]


@dataclass(frozen=True)
class Head:
    """What the driver gets of a solved shard: its contribution but for dL/dX_s [m, C, H, W]."""

    shard: int
    loss: float
    y: np.ndarray  # dL/dY_s [m, k]
    images: int
    retries: int
    train_seconds: float


class SlicedParts:
    """One actor's share: some shards, and slices of others."""

    def __init__(self, shards: Sequence[Shard], slices: Mapping[tuple[int, int], Slice]) -> None:
        self._shards = {shard.index: SlicedShard(shard) for shard in shards if isinstance(shard, Shard)}
        self._slices = slices
        self._kept: dict[int, tuple[Tensor, ...]] = {}  # of slice 0: features, then their gradient

    def restore(self, positions: Mapping[int, Mapping[str, Any]]) -> None:
        """Put the slices' readers where their shards' are. positions: by shard."""
        for (shard, _), one in self._slices.items():
            one.batches.restore(dict(positions[shard]))

    def weights(self, step: int, shard: int) -> dict[str, np.ndarray]:
        """Of the model drawn for the update."""
        return {name: value.cpu().contiguous().numpy() for name, value in self._shards[shard].weights(step).items()}

    def features(self, step: int, shard: int, p: int, weights: Mapping[str, np.ndarray] | None, x_syn: Tensor) -> Arrays | None:
        """f_syn and f_real of slice p; those of slice 0 stay here. weights: for p > 0."""
        if p == 0:
            self._kept[shard] = self._shards[shard].features(step, x_syn)
            return None
        own = {name: torch.tensor(value) for name, value in weights.items()}
        return tuple(value.cpu().numpy() for value in self._slices[shard, p].features(own, x_syn))

    def solve(self, step: int, shard: int, y_syn: Tensor, features: Sequence[Arrays],
              train_seconds: float) -> tuple[Head, *Arrays]:
        """The ridge head on all slices' features, and dL/dfeatures of slices 1..P-1; that of slice 0 stays here.

        features: of slices 1..P-1. train_seconds: passed on.
        """
        others = [tuple(torch.tensor(value) for value in rows) for rows in features]
        solved = self._shards[shard].solve(step, y_syn, [self._kept.pop(shard), *others])
        own, *rest = solved.g_features
        self._kept[shard] = (own,)
        head = Head(shard, solved.loss, solved.y.cpu().numpy(), solved.images, solved.retries, train_seconds)
        return head, *(g.contiguous().cpu().numpy() for g in rest)

    def pull_back(self, step: int, shard: int, p: int, solved: Head | np.ndarray) -> np.ndarray:
        """Slice p's rows of dL/dX_s. solved: p of what `solve` gave, for p = 0 the head, which tells that it is solved."""
        if p == 0:
            (own,) = self._kept.pop(shard)
            g = self._shards[shard].pull_back(step, own)
        else:
            g = self._slices[shard, p].pull_back(torch.tensor(solved))
        return g.contiguous().cpu().numpy()


def contributions(group: WorkerGroup, step: int, shared: Sequence[ray.ObjectRef], *, silence: float
                  ) -> tuple[list[Contribution], float]:
    """Every shard's contribution to an update, in shard order, and the longest training. shared: X_s and Y_s in the object store.

    All is asked at once, act by act, so that no actor is asked for something of which a part waits behind it.
    """
    layout, (x_syn, y_syn) = group.layout, shared
    shards, units = range(layout.shards), [(s, p) for s in range(layout.shards) for p in range(layout.slices)]
    weights = {s: group.call(layout.actor(s), "weights", step, s, x_syn, y_syn) for s in shards}
    features = {(s, p): group.call(layout.actor(s, p), "features", step, s, p, weights[s] if p else None, x_syn) for s, p in units}
    solved = {s: group.call(layout.actor(s), "solve", step, s, y_syn, *(features[s, p] for p in range(1, layout.slices)),
                            returns=layout.slices) for s in shards}
    rows = [group.call(layout.actor(s, p), "pull_back", step, s, p, solved[s][p]) for s, p in units]
    heads = group.gather([(layout.actor(s), solved[s][0]) for s in shards], silence=silence)
    x = group.gather([(layout.actor(s, p), row) for (s, p), row in zip(units, rows, strict=True)], silence=silence)
    made = []
    for head in heads:
        own = x[head.shard * layout.slices:(head.shard + 1) * layout.slices]
        made.append(Contribution(head.loss, (torch.from_numpy(np.concatenate(own)), torch.tensor(head.y)), head.images, head.retries))
    return made, max(head.train_seconds for head in heads)

"""What a method gives the engine to do, and what a run comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from krrst_dist.algorithm import Contribution, Outer
from krrst_dist.on_ray.progress import curve, read_history
from krrst_dist.on_ray.sliced import BuildSlice
from krrst_dist.on_ray.snapshots import Draw
from krrst_dist.on_ray.worker import Build, Do, Measure


@dataclass(frozen=True)
class Outcome:
    """What a run comes to: what is learned (X_s [m, C, H, W], Y_s [m, k]) after `updates` updates, and the losses on the way.

    outer: (step, loss) of each update, counted from 1; held_out: (step, held-out ridge loss).
    """

    values: tuple[Tensor, ...]
    updates: int
    outer: list[tuple[int, float]]
    held_out: list[tuple[int, float]]

    @classmethod
    def of(cls, outer: Outer, directory: str) -> Outcome:
        """From the optimiser's end state and the run's table."""
        history = read_history(directory)
        return cls(outer.values, outer.steps, curve(history, "loss"), curve(history, "held_out"))


@dataclass(frozen=True)
class Work:
    """What a method gives the engine to do. All but `outer`, `combine` and `draw` is called in the actors, and picklable.

    outer: horizon of the learning rate's schedule -> the learned tensors at their start. build: shard index -> shard. combine: how the
    shards' contributions make one. chores, do: what has to be computed once before shards can be built, and how. measure: (network
    index, values, alive) -> held-out ridge loss; None: not measured. draw: pictures along the way; None: none. warm_up: signs of life that
    the shards' warm-up gives, about.
    slices: P, how many actors can share a shard, where `slice` builds a further slice of one.
    """

    outer: Callable[[int], Outer]
    build: Build
    combine: Callable[[Sequence[Contribution]], Contribution]
    chores: Sequence[str] = ()
    do: Do | None = None
    measure: Measure | None = None
    draw: Draw | None = None
    warm_up: int = 0
    slices: int = 1
    slice: BuildSlice | None = None

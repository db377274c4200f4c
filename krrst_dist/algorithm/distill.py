"""Algorithm 1 in one process: the serial loop. The distributed engine does the same steps with remote shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from krrst_dist.algorithm.contribution import Contribution, mean
from krrst_dist.algorithm.outer import OuterOptimizer
from krrst_dist.algorithm.shard import Shard


def distill(outer: OuterOptimizer, shards: Sequence[Shard], *, updates: int,
            on_update: Callable[[int, Contribution], None] | None = None) -> tuple[Tensor, Tensor]:
    """Learn (X_s, Y_s) by `updates` meta-updates in all; an optimiser that has done some already goes on from there.

    outer: holds X_s [m, C, H, W] and Y_s [m, k]. shards: one is the paper's Algorithm 1; of several, each takes
    part with its own pool and its own part of the real batch. on_update(step, what was applied) follows each one.
    Returns (X_s, Y_s).
    """
    x_syn, y_syn = outer.x_syn, outer.y_syn
    if outer.steps == 0:
        for shard in shards:
            shard.warm_up(x_syn, y_syn)  # l models each, trained for t ~ U(1, T-1) steps
    for step in range(outer.steps, updates):
        update = mean([shard.contribute(step, x_syn, y_syn) for shard in shards])  # dL/dX_s, dL/dY_s
        outer.step(*update.gradients)
        x_syn, y_syn = outer.x_syn, outer.y_syn
        for shard in shards:
            shard.advance(step, x_syn, y_syn)  # one step, or a fresh model after T of them
        if on_update:
            on_update(step, update)
    return x_syn, y_syn

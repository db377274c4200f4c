"""The actors' side of updates by all-reduce: each has a replica of what is learned and steps it like all others.

Sums are in the order of the all-reduce, so that rounding depends on the number of actors, which by the object store it does
not. Knows the shards of its actor and torch.distributed; neither Ray nor the driver (`aggregate.CollectiveAggregator`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from krrst_dist.algorithm import Contribution, Outer
from krrst_dist.methods.common.protocol import Part

LONGEST = timedelta(hours=1)
"""that a process waits for the others; the driver, which knows what is usual, ends a wait that is too long well before"""
Combine = Callable[[Sequence[Contribution]], Contribution]


@dataclass(frozen=True)
class Told:
    """What the driver hears of an update from one actor: what was summed over all, and its own seconds."""

    loss: float
    images: int
    retries: int
    train: float
    contribute: float
    combine: float


class Replica:
    """One actor's copy of the outer optimiser, and its place in the process group."""

    def __init__(self, outer: Outer, combine: Combine, device: torch.device) -> None:
        self.outer, self._combine, self._device = outer.to(device), combine, device

    def update(self, step: int, parts: Sequence[Part], contribute: Callable[[int, Part, tuple[Tensor, ...]], Contribution], *,
               last: bool) -> Told:
        """Do meta-update `step` with the shards that live here: contribute, sum over all actors, step, follow up."""
        started, values = time.perf_counter(), self.outer.values
        mine = self._combine([contribute(step, part, values) for part in parts])
        contributed = time.perf_counter()
        counts = torch.tensor([mine.images, mine.retries], device=self._device)
        dist.all_reduce(counts)
        images, retries = counts.tolist()
        flat, shapes = _flat(mine, weight(self._combine, mine.images, images), self._device)
        under_way = dist.all_reduce(flat, async_op=True)
        if not last:
            for part in parts:
                part.look_ahead(step + 1)
        under_way.wait()
        loss, gradients = _unflat(flat, shapes)
        self.outer.step(*gradients)
        combined, values = time.perf_counter(), self.outer.values
        for part in parts:
            part.advance(step, *values)
        return Told(loss, images, retries, time.perf_counter() - combined, contributed - started, combined - contributed)

    def values(self) -> tuple[np.ndarray, ...]:
        """What is learned, as it is now."""
        return tuple(value.cpu().numpy() for value in self.outer.values)


def weight(combine: Combine, mine: int, images: int) -> float:
    """The factor on a part with `mine` of all `images` in what `combine` makes of all parts, which is linear in them."""
    return combine([Contribution(1.0, (), mine), Contribution(0.0, (), images - mine)]).loss


def join(place: str, rank: int, world: int, device: torch.device) -> None:
    """Become process `rank` of a group of `world`. place: where they meet, as `init_method` says it."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world, timeout=LONGEST)


def _flat(part: Contribution, factor: float, device: torch.device) -> tuple[Tensor, list[torch.Size]]:
    """Loss and gradients times the factor, in one vector."""
    gradients = [g.to(device) for g in part.gradients]
    flat = torch.cat([torch.tensor([part.loss], dtype=gradients[0].dtype, device=device), *(g.reshape(-1) for g in gradients)])
    return flat.mul_(factor), [g.shape for g in gradients]


def _unflat(flat: Tensor, shapes: Sequence[torch.Size]) -> tuple[float, list[Tensor]]:
    pieces = flat[1:].split([shape.numel() for shape in shapes])
    return flat[0].item(), [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

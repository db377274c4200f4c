"""What the engine costs by itself: updates of a preset's sizes whose shards compute nothing, by both ways to sum, and a model of it.

Serial updates with the same outer step take turns with the engine's; the difference is what actors cost. All on one machine:
where there are more actors than cores, their work queues, so that hosts of their own do better.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from krrst_dist.algorithm import Contribution, OuterOptimizer, mean
from krrst_dist.bench import measure
from krrst_dist.bench.cost import Overhead
from krrst_dist.bench.problem import Problem
from krrst_dist.methods.common.protocol import Stateless
from krrst_dist.on_ray.aggregate import CollectiveAggregator, ObjectStoreAggregator
from krrst_dist.on_ray.errors import LostActor
from krrst_dist.on_ray.group import WorkerGroup
from krrst_dist.on_ray.sliced import Layout
from krrst_dist.presets_and_grids import load_preset

WAYS = {"store": ObjectStoreAggregator, "collective": CollectiveAggregator}


class NullPart(Stateless):
    """A shard whose gradient is there already."""

    def __init__(self, index: int, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(index)
        self._gradients = tuple(torch.full(shape, 1e-3) for shape in shapes)

    def contribute(self, step: int, *values: Tensor) -> Contribution:
        return Contribution(0.0, self._gradients, 1)


@dataclass(frozen=True)
class Measured:
    """Seconds an update beyond a serial one's, as measured; none where an actor was lost. size: bytes of X_s and Y_s."""

    way: str
    preset: str
    size: int
    actors: int
    seconds: list[float]


def measure_overhead(*, presets: Sequence[str], actors: Sequence[int], rounds: int) -> list[Measured]:
    """Both ways, all sizes, all numbers of actors, each `rounds` times. On the cluster that this process is in. Says how far it is, and
    goes on where one of them is too much for this machine."""
    found = []
    for preset in presets:
        start = Problem(load_preset(preset)).start()
        for count, way in product(actors, WAYS):
            try:
                seconds = _measure(way, start, count, rounds)
                said = f"{1e3 * statistics.median(seconds):.3g} ms"
            except LostActor as lost:
                seconds, said = [], f"no figure: {lost}"
            found.append(Measured(way, preset, sum(value.nbytes for value in start), count, seconds))
            print(f"{preset}, {way}, {count} actors: {said}", flush=True)
    return found


def _measure(way: str, start: Sequence[Tensor], actors: int, rounds: int) -> list[float]:
    shapes = [tuple(value.shape) for value in start]
    with WorkerGroup(Layout(actors, 1, actors), threads=1) as group:
        group.start()
        group.build(partial(NullPart, shapes=shapes))
        alone, outer = _outer(start), _outer(start)
        aggregator = WAYS[way](group, outer, mean)
        part = NullPart(0, shapes)
        steps = {"serial": lambda: _serial(alone, part), "engine": lambda: aggregator.update(outer.steps)}
        times = measure.in_turns(steps, rounds + 1)
    return [max(0.0, engine - serial) for engine, serial in zip(times["engine"][1:], times["serial"][1:], strict=True)]


def _outer(start: Sequence[Tensor]) -> OuterOptimizer:
    return OuterOptimizer(*start, lr_x=1e-4, lr_y=1e-4, decay_updates=1000)


def _serial(outer: OuterOptimizer, part: NullPart) -> None:
    outer.step(*mean([part.contribute(outer.steps, *outer.values)]).gradients)


def report(measured: Sequence[Measured], models: dict[str, Overhead], update: float) -> str:
    """A table of the overheads, the fits, and what they mean for updates of `update` seconds of work."""
    lines = ["| update without compute | X_s and Y_s | actors | milliseconds beyond the serial one: median (least-most) | fitted |",
             "| --- | ---: | ---: | --- | ---: |"]
    for one in measured:
        fitted = models[one.way].seconds(one.size, one.actors)
        milliseconds = measure.spread([1e3 * seconds for seconds in one.seconds]) if one.seconds else "an actor was lost, see above"
        lines.append(f"| {one.way}, {one.preset} | {one.size / 1e6:.0f} MB | {one.actors} | {milliseconds} | {1e3 * fitted:.3g} |")
    lines += ["", *(f"fit      {way}: {1e3 * fit.start:.3g} ms + {1e3 * fit.actor:.3g} ms an actor + {1e9 * fit.byte:.3g} ms a MB + "
                    f"{1e9 * fit.byte_actor:.3g} ms a MB and actor" for way, fit in models.items())]
    size = measured[0].size
    lines += ["", f"| actors, {size / 1e6:.0f} MB, {update:.3g} s of work each | " + " | ".join(models) + " |",
              "| ---: |" + " ---: |" * len(models)]
    for actors in (1, 2, 4, 8, 16, 64):
        shares = (update / (update + fit.seconds(size, actors)) for fit in models.values())
        lines.append(f"| {actors} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    return "\n".join(lines)

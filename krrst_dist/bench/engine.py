"""`krrst bench engine`: what the actors cost over the serial loop, with compute and without, and what a second one gains.

Everything runs on one machine's CPUs; the steps that are compared take turns, so an actor whose turn it is not is idle.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from krrst_dist.algorithm import mean
from krrst_dist.bench import measure
from krrst_dist.bench.cost import Overhead
from krrst_dist.bench.overhead import WAYS, Measured, measure_overhead, report
from krrst_dist.bench.problem import Problem
from krrst_dist.on_ray import cluster
from krrst_dist.on_ray.aggregate import ObjectStoreAggregator
from krrst_dist.on_ray.group import WorkerGroup
from krrst_dist.on_ray.sliced import Layout
from krrst_dist.presets_and_grids import load_preset


@dataclass(frozen=True)
class EngineTimes:
    """Seconds an update, round by round: S = 1 by the serial loop and by one actor of as many threads; S = 2 by one and by
    two actors of one thread."""

    serial: list[float]
    one_shard: list[float]
    one_actor: list[float]
    two_actors: list[float]
    null: list[Measured]

    @property
    def overhead(self) -> list[float]:
        """The engine's time over the serial loop's."""
        return [engine / serial for engine, serial in zip(self.one_shard, self.serial, strict=True)]

    @property
    def speed_up(self) -> list[float]:
        """Updates a second of two actors over those of one."""
        return [one / two for one, two in zip(self.one_actor, self.two_actors, strict=True)]


def bench_engine(*, preset: str = "cifar100", rounds: int = 5, threads: int | None = None, m: int | None = None,
                 batch: int | None = None, actors: tuple[int, ...] = (1, 2, 4, 8, 16),
                 sizes: tuple[str, ...] = ("cifar100", "tinyimagenet")) -> EngineTimes:
    """Time the Ray engine with one actor beside the serial loop, and two actors beside one, on this machine's CPUs; then updates that
    compute nothing, with more actors.

    Args:
        preset: whose sizes and networks; images and targets are random.
        rounds: pairs that are timed, after one that is not.
        threads: CPU threads of the serial loop and of the one actor beside it; default: as many as torch takes.
        m: synthetic images, instead of the preset's.
        batch: real images of all shards, instead of the preset's.
        actors: numbers of actors of the updates that compute nothing.
        sizes: presets of whose sizes they are.
    """
    threads, before = threads or torch.get_num_threads(), torch.get_num_threads()
    given = {name: value for name, value in {"distill.m": m, "distill.batch": batch}.items() if value is not None}
    one, two = (Problem(load_preset(preset, **given, **{"distill.shards": shards})) for shards in (1, 2))
    cluster.connect(num_cpus=max(threads, 3, *actors, os.cpu_count() or 1))  # more CPUs than there are, maybe: they are used in turns
    torch.set_num_threads(threads)
    try:
        cluster.require(cpus=threads, gpus=0, actors=1)
        with ExitStack() as stack:
            overhead = measure.in_turns({"serial": one.ours(), "engine": _engine(stack, one, actors=1, threads=threads)}, rounds + 1)
        cluster.require(cpus=1, gpus=0, actors=3)
        with ExitStack() as stack:
            speed_up = measure.in_turns({str(count): _engine(stack, two, actors=count, threads=1) for count in (1, 2)}, rounds + 1)
        null = measure_overhead(presets=sizes, actors=actors, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    result = EngineTimes(*(times[1:] for times in (*overhead.values(), *speed_up.values())), null)  # the first round warms up
    models = {way: Overhead.fit([one for one in null if one.way == way]) for way in WAYS}
    print(_report(result, one, threads), report(null, models, statistics.median(result.one_shard)), sep="\n\n")
    return result


def _engine(stack: ExitStack, problem: Problem, *, actors: int, threads: int) -> measure.Step:
    """One meta-update by the engine, with actors that live until the stack is left."""
    group = stack.enter_context(WorkerGroup(Layout(problem.config.distill.shards, 1, actors), threads=threads))
    group.start()
    group.build(problem.shard)
    outer = problem.outer()
    aggregator = ObjectStoreAggregator(group, outer, mean)
    return lambda: aggregator.update(outer.steps)


def _report(times: EngineTimes, problem: Problem, threads: int) -> str:
    more = 100 * (statistics.median(times.overhead) - 1)
    return "\n".join([
        measure.circumstances("cpu", threads), f"sizes    {problem.sizes}", "",
        "| update | seconds: median (least-most) |", "| --- | --- |",
        f"| S = 1, serial loop, {threads} thread(s) | {measure.spread(times.serial)} |",
        f"| S = 1, engine with one actor of {threads} thread(s) | {measure.spread(times.one_shard)} |",
        f"| engine / serial, by pair | {measure.spread(times.overhead)}, i.e. {more:+.1f} % |",
        f"| S = 2, one actor of one thread | {measure.spread(times.one_actor)} |",
        f"| S = 2, two actors of one thread | {measure.spread(times.two_actors)} |",
        f"| updates a second, two actors / one, by pair | {measure.spread(times.speed_up)} |",
    ])

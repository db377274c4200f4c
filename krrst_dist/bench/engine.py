"""`krrst bench engine`: what the actors cost over the serial loop, with compute and without, and what a second one gains.

Everything runs on one machine; the steps that are compared take turns, so an actor whose turn it is not is idle.
"""

from __future__ import annotations

import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch

from krrst_dist.algorithm import mean
from krrst_dist.bench import measure
from krrst_dist.bench.cost import Overhead
from krrst_dist.bench.overhead import WAYS, Measured, measure_overhead, report
from krrst_dist.bench.problem import Problem
from krrst_dist.on_ray import cluster, rooms
from krrst_dist.on_ray.group import WorkerGroup
from krrst_dist.on_ray.sliced import Layout
from krrst_dist.presets_and_grids import load_preset


@dataclass(frozen=True)
class EngineTimes:
    """Seconds an update, round by round: S = 1 by the serial loop and by one actor of as many threads, by each way to sum; S = 2 by one
    and by two actors of one thread; and what updates cost that compute nothing. The last three are empty on a GPU."""

    serial: list[float]
    store: list[float]
    collective: list[float]
    one_actor: list[float]
    two_actors: list[float]
    null: list[Measured]

    @property
    def overhead(self) -> list[float]:
        """The engine's time over the serial loop's."""
        return _ratios(self.store, self.serial)

    @property
    def speed_up(self) -> list[float]:
        """Updates a second of two actors over those of one."""
        return _ratios(self.one_actor, self.two_actors)


def bench_engine(*, preset: str = "cifar100", rounds: int = 5, threads: int | None = None, device: Literal["cpu", "cuda"] = "cpu",
                 precision: Literal["float32", "tf32", "bfloat16"] = "float32", m: int | None = None, batch: int | None = None,
                 actors: tuple[int, ...] = (1, 2, 4, 8, 16), sizes: tuple[str, ...] = ("cifar100", "tinyimagenet")) -> EngineTimes:
    """Time the Ray engine with one actor beside the serial loop; on CPUs also two actors beside one, and updates that compute nothing,
    with more actors.

    Args:
        preset: whose sizes and networks; images and targets are random.
        rounds: pairs that are timed, after one that is not.
        threads: CPU threads of the serial loop and of the one actor beside it; default: as many as torch takes.
        device: of both; cuda: one GPU.
        precision: of the pool's forward and backward passes.
        m: synthetic images, instead of the preset's.
        batch: real images of all shards, instead of the preset's.
        actors: numbers of actors of the updates that compute nothing.
        sizes: presets of whose sizes they are.
    """
    measure.ready(device)
    threads, before, on_cpu = threads or torch.get_num_threads(), torch.get_num_threads(), device == "cpu"
    given = {name: value for name, value in {"distill.m": m, "distill.batch": batch}.items() if value is not None}
    one, two = (Problem(load_preset(preset, **given, **{"distill.shards": shards, "engine.precision": precision}), device)
                for shards in (1, 2))
    cluster.connect(num_cpus=max(2 * threads, 3, *actors, os.cpu_count() or 1))  # more CPUs than there are, maybe: they are used in turns
    torch.set_num_threads(threads)
    try:
        overhead = _in_turns(one, {"serial": None, **{way: (way, 1, threads) for way in WAYS}}, rounds)
        speed_up = _in_turns(two, {"one": ("store", 1, 1), "two": ("store", 2, 1)}, rounds) if on_cpu else {"one": [], "two": []}
        null = measure_overhead(presets=sizes, actors=actors, rounds=rounds) if on_cpu else []
    finally:
        torch.set_num_threads(before)
    result = EngineTimes(*overhead.values(), *speed_up.values(), null)
    print(_report(result, one, threads, device))
    if null:
        models = {way: Overhead.fit([one for one in null if one.way == way and one.seconds]) for way in WAYS}
        print("", report(null, models, statistics.median(result.store)), sep="\n")
    return result


def _in_turns(problem: Problem, steps: dict[str, tuple[str, int, int] | None], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, a round that warms up left out. steps: None for the serial loop, else way to sum, actors, threads of each.
    The actors of all live until the last round; on a GPU each has a share of it."""
    engines = [engine for engine in steps.values() if engine]
    on_gpu = problem.device != "cpu"
    share = 1 / sum(count for _, count, _ in engines) if on_gpu else 0
    rooms.require(cpus=max(threads for *_, threads in engines), gpus=share, actors=sum(count for _, count, _ in engines))
    with ExitStack() as stack:
        built = {name: problem.ours() if engine is None else _engine(stack, problem, *engine, gpus=share) for name, engine in steps.items()}
        times = measure.in_turns(built, rounds + 1, problem.device)
    return {name: seconds[1:] for name, seconds in times.items()}


def _engine(stack: ExitStack, problem: Problem, way: str, actors: int, threads: int, *, gpus: float) -> measure.Step:
    """One meta-update by the engine, with actors that live until the stack is left."""
    group = stack.enter_context(WorkerGroup(Layout(problem.config.distill.shards, 1, actors), threads=threads, gpus=gpus))
    group.start()
    group.build(problem.shard)
    outer = problem.outer().to("cpu")  # where the driver holds it; actors take replicas to their own device
    aggregator = WAYS[way](group, outer, mean)
    return lambda: aggregator.update(outer.steps)


def _ratios(these: list[float], those: list[float]) -> list[float]:
    return [one / other for one, other in zip(these, those, strict=True)]


def _report(times: EngineTimes, problem: Problem, threads: int, device: str) -> str:
    actor = f"S = 1, engine with one actor of {threads} thread(s)"
    rows = {f"S = 1, serial loop, {threads} thread(s)": times.serial, f"{actor}, object store": times.store,
            f"{actor}, all-reduce": times.collective, "object store / serial, by pair": times.overhead,
            "all-reduce / serial, by pair": _ratios(times.collective, times.serial), "S = 2, one actor of one thread": times.one_actor,
            "S = 2, two actors of one thread": times.two_actors, "updates a second, two actors / one, by pair": times.speed_up}
    return "\n".join([
        measure.circumstances(device, threads), f"sizes    {problem.sizes}, {problem.config.engine.precision}", "",
        "| update | seconds: median (least-most) |", "| --- | --- |",
        *(f"| {name} | {measure.spread(values)} |" for name, values in rows.items() if values)])

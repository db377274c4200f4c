"""`krrst bench update`: does one meta-update at a preset's full size fit this machine, and how long does it take?"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from krrst_dist.bench import measure
from krrst_dist.bench.problem import Problem
from krrst_dist.presets_and_grids import load_preset


@dataclass(frozen=True)
class UpdateCost:
    """Seconds of each update after the first, and bytes that updates need beyond the data."""

    seconds: list[float]
    memory: int


def bench_update(*, preset: str = "imagenet64", updates: int = 1, threads: int | None = None, chunk_size: int | None = None,
                 device: str = "cpu") -> UpdateCost:
    """Time whole meta-updates at a preset's sizes, after one that is not timed, and measure their peak memory.

    Args:
        preset: whose sizes and networks; images and targets are random.
        updates: that are timed.
        threads: CPU threads; default: as many as torch takes.
        chunk_size: synthetic images whose activations are held at once, instead of the preset's.
        device: cpu, cuda, cuda:1, ...
    """
    threads, before = threads or torch.get_num_threads(), torch.get_num_threads()
    given = {"distill.shards": 1} | ({"distill.chunk_size": chunk_size} if chunk_size else {})
    measure.ready(device)
    problem = Problem(load_preset(preset, **given), device)
    torch.set_num_threads(threads)
    try:
        times = measure.in_turns({"update": problem.ours()}, updates + 1, device)["update"]
    finally:
        torch.set_num_threads(before)
    cost = UpdateCost(times[1:], measure.peak_memory(partial(Problem.ours, problem), device, threads))
    print("\n".join([measure.circumstances(device, threads), f"sizes    {problem.sizes}", "",
                     "| one update | seconds: median (least-most) | peak memory |", "| --- | --- | --- |",
                     f"| {preset} | {measure.spread(cost.seconds)} | {cost.memory / 2**30:.2f} GiB |"]))
    return cost

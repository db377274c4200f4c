"""`krrst bench grid`: what a grid's machinery costs for each cell, with cells that compute nothing."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

from krrst_dist.bench import measure
from krrst_dist.config import ConfigError
from krrst_dist.on_ray import cluster
from krrst_dist.on_ray.grid_trial import trivial_trial
from krrst_dist.on_ray.trials import run_trials


@dataclass(frozen=True)
class GridTimes:
    """Seconds a cell, round by round: with a process for each trial, Tune's default, and with processes that serve many, as in grids."""

    fresh: list[float]
    reused: list[float]


def bench_grid(*, cells: int = 20, rounds: int = 3, cpus: int = 2) -> GridTimes:
    """Time grids of trivial cells, the two ways taking turns, and print a table.

    Args:
        cells: trials of a grid.
        rounds: grids of each kind.
        cpus: trials at a time.
    """
    for name, value in (("cells", cells), ("rounds", rounds), ("cpus", cpus)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    cluster.start_local(num_cpus=cpus)
    work = {f"cell {i}": None for i in range(cells)}
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for reuse in (False, True) if turn % 2 == 0 else (True, False):
                started = time.perf_counter()
                ended = list(run_trials("bench", trivial_trial, work, cpus=1, gpus=0, retries=0, storage=folder, title=str, reuse=reuse))
                assert all(end.status == "ok" for _, end in ended)
                times[reuse].append((time.perf_counter() - started) / cells)
    result = GridTimes(times[False], times[True])
    print("\n".join([
        measure.circumstances("cpu", 1), "",
        f"| {cells} trivial cells, {cpus} at a time | seconds a cell: median (least-most) |", "| --- | --- |",
        f"| a process for each (Tune's default) | {measure.spread(result.fresh)} |",
        f"| processes that serve many, as in our grids | {measure.spread(result.reused)} |"]))
    return result

"""`krrst bench step`: our meta-update beside a textbook one, at a preset's sizes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from krrst_dist.bench import measure
from krrst_dist.bench.problem import Problem
from krrst_dist.config import ConfigError
from krrst_dist.presets_and_grids import load_preset


@dataclass(frozen=True)
class StepTimes:
    """Per round, in seconds; operations a step; peak memory in bytes, by what was measured (empty if it was not)."""

    textbook: list[float]
    ours: list[float]
    operations: dict[str, float]
    memory: dict[str, int]

    @property
    def ratios(self) -> list[float]:
        """Textbook over ours, round by round."""
        return [theirs / mine for theirs, mine in zip(self.textbook, self.ours, strict=True)]


def bench_step(*, preset: str = "cifar100", rounds: int = 5, threads: int | None = None, device: str = "cpu",
               precision: Literal["float32", "tf32", "bfloat16"] = "float32", m: int | None = None, batch: int | None = None,
               chunk_size: int = 100, memory: bool = True) -> StepTimes:
    """Time our meta-update beside a textbook one, taking turns, and print a table.

    The textbook step does what the released one does: teacher (stem padding 2) on the augmented batch, autograd through an LU
    solve, whole batch, float32, NCHW. Ours reads stored targets. Both train the pool model they used. Images and targets are random.

    Args:
        preset: whose sizes and networks.
        rounds: pairs that are timed, after one that is not.
        threads: CPU threads; default: as many as torch takes.
        device: cpu, cuda, cuda:1, ...
        precision: of our feature extractor; the textbook step is float32 always.
        m: synthetic images, instead of the preset's.
        batch: real images, instead of the preset's.
        chunk_size: for the row with bounded memory.
        memory: measure peak memory too (on a CPU in fresh processes: a few more steps each).
    """
    measure.ready(device)
    if rounds < 1:
        raise ConfigError(f"rounds = {rounds}: at least one pair is timed; take rounds = 5")
    given = {"distill.m": m, "distill.batch": batch, "engine.precision": precision, "distill.shards": 1}
    overrides = {name: value for name, value in given.items() if value is not None}
    problem = Problem(load_preset(preset, **overrides), device)
    chunked = Problem(load_preset(preset, **overrides | {"distill.chunk_size": chunk_size}), device)
    threads = threads or torch.get_num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        steps = {"textbook": problem.textbook(), "ours": problem.ours()}
        operations = {name: measure.operations(step) for name, step in steps.items()}  # and warm up
        times = measure.in_turns(steps, rounds, device)
        del steps
        bytes_ = {name: measure.peak_memory(partial(_build, which, how), device, threads) for name, (which, how) in {
            "textbook": (problem, "textbook"), "ours": (problem, "ours"), f"ours, chunks of {chunk_size}": (chunked, "ours"),
            "meta-gradient alone": (problem, "our_meta_gradient"),
            f"meta-gradient alone, chunks of {chunk_size}": (chunked, "our_meta_gradient"),
        }.items()} if memory else {}
    finally:
        torch.set_num_threads(before)
    result = StepTimes(times["textbook"], times["ours"], operations, bytes_)
    print(_report(result, problem, threads))
    return result


def _build(problem: Problem, how: str) -> measure.Step:
    return getattr(problem, how)()


def _report(times: StepTimes, problem: Problem, threads: int) -> str:
    lines = [
        measure.circumstances(problem.device, threads),
        f"sizes    {problem.sizes}",
        f"data     random images and targets; our features in {problem.config.engine.precision}, the textbook's in float32",
        "",
        "| step | seconds: median (least-most) | operations | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for name, values in (("textbook", times.textbook), ("ours", times.ours)):
        lines.append(f"| {name} | {measure.spread(values)} | {_tera(times.operations[name])} | {_giga(times.memory.get(name))} |")
    lines += [f"| {name} | | | {_giga(value)} |" for name, value in times.memory.items() if name not in ("textbook", "ours")]
    lines.append(f"| textbook / ours, by pair | {measure.spread(times.ratios)}, {len(times.ratios)} pair(s) | "
                 f"{times.operations['textbook'] / times.operations['ours']:.2f} | |")
    return "\n".join(lines)


def _tera(operations: float) -> str:
    return f"{operations / 1e12:.3g} T"


def _giga(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**30:.2f} GiB"

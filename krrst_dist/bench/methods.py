"""`krrst bench methods`: seconds and memory of one outer step of each method that has any, at equal m, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from krrst_dist import plugins, seeds
from krrst_dist.artifacts import Space
from krrst_dist.bench import measure
from krrst_dist.bench.problem import MEAN, STD, Problem
from krrst_dist.config import DEFAULT_METHOD, Config
from krrst_dist.data.stream import centred
from krrst_dist.presets_and_grids import load_preset


class RandomSource:
    """Random images of so many classes, as a `Source`, as far as methods with labels read one."""

    class_names = None
    space = Space("normalised", MEAN, STD)

    def __init__(self, config: Config, classes: int, of_class: int) -> None:
        self._config, self._side = config, config.source.resolution
        self.training = np.arange(classes * of_class)
        self.labels = self.training % classes
        self.classes = tuple(np.arange(label, len(self.training), classes) for label in range(classes))

    @cached_property
    def _images(self) -> Tensor:
        return torch.randn(256, 3, self._side, self._side, generator=seeds.torch_rng(0, "bench images"))

    @property
    def targets(self) -> RandomTargets:
        """As many dimensions as the preset's target has."""
        return RandomTargets(Problem(self._config).k)

    def training_images(self, rows: np.ndarray) -> Tensor:
        """[n, C, H, W]; the same 256 again and again."""
        return self._images[torch.from_numpy(np.asarray(rows)) % 256]

    def batches(self, labels: str, config: Config, index: int, *, device: str | torch.device) -> RandomBatches:
        """Always the same one."""
        n = config.distill.batch // config.distill.shards
        x, y = self.training_images(np.arange(n)), centred(np.arange(n) % len(self.classes), len(self.classes))
        return RandomBatches(x.to(device), torch.from_numpy(y).to(device))

    def some_of_class(self, label: int, count: int, *, seed: int, purpose: str, step: int) -> Tensor:
        """The first `count` of a class."""
        return self.training_images(self.classes[label][:count])


@dataclass(frozen=True)
class RandomTargets:
    """Random representations of k dimensions."""

    k: int

    def look_up(self, index: np.ndarray) -> Tensor:
        """[n, k]."""
        return torch.randn(len(index), self.k, generator=seeds.torch_rng(0, "bench targets"))


@dataclass(frozen=True)
class RandomBatches:
    """One batch, again and again."""

    x: Tensor
    y: Tensor

    def next(self) -> tuple[Tensor, Tensor]:
        """(x, y)."""
        return self.x, self.y


@dataclass(frozen=True)
class MethodCost:
    """Seconds of each step after the first, and bytes that steps need beyond the data."""

    seconds: list[float]
    memory: int


def outer_step(config: Config, classes: int, of_class: int, device: str) -> Callable[[], None]:
    """One outer step of a method that learns, on random images: what all its shards do, one after the other."""
    method = plugins.load(config.method)
    if config.method == DEFAULT_METHOD:
        return Problem(config, device).ours()
    source = RandomSource(config, classes, of_class)
    stored: dict[str, dict[str, Tensor]] = {}

    def read(chore: str) -> dict[str, Tensor]:
        if chore not in stored:  # an expert that moves a little in every epoch
            p = method.student(config, source, torch.device("cpu"), "student").start
            moves = torch.randn(config.distill.teacher_epochs + 1, len(p), generator=seeds.torch_rng(0, chore)) * 1e-3
            stored[chore] = {"weights": p + moves.cumsum(0), "losses": torch.zeros(len(source.training))}
        return stored[chore]

    start = method.start(config, source, read)
    parts = [method.part(config, source, start, s, read=read, device=torch.device(device)) for s in range(config.distill.shards)]
    outer = method.outer(config, start, horizon=config.distill.horizon)

    def step() -> None:
        now = outer.steps
        update = method.combine([part.contribute(now, *outer.values) for part in parts])
        outer.step(*(gradient.cpu() for gradient in update.gradients))
        for part in parts:
            part.advance(now, *outer.values)

    return step


def _settings(preset: str, method: str, m: int | None) -> Config:
    """A method's own, with two experts where it has any: a step reads one of them, however many there are."""
    experts = hasattr(plugins.load(method).settings(), "experts")
    return load_preset(preset, method=method, **({"distill.m": m} if m else {}), **({"distill.experts": 2} if experts else {}))


METHODS = ("krr_st", "dsa", "dm", "mtt", "kip", "frepo", "mkdt", "ssl_bilevel")


def bench_methods(*, preset: str = "cifar100-cpu", methods: tuple[str, ...] = METHODS, m: int | None = None, classes: int = 100,
                  of_class: int = 480, rounds: int = 3, threads: int = 1, device: str = "cpu") -> dict[str, MethodCost]:
    """Time outer steps of several methods in turns, after one each that is not timed, and measure their peak memory.

    Args:
        preset: whose sizes and settings.
        methods: that learn.
        m: synthetic images of all of them, instead of the preset's.
        classes: of the source.
        of_class: training images of each.
        rounds: steps of each that are timed.
        threads: CPU threads.
        device: cpu, cuda, cuda:1, ...
    """
    measure.ready(device)
    builds = {name: partial(outer_step, _settings(preset, name, m), classes, of_class, device) for name in methods}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        times = measure.in_turns({name: build() for name, build in builds.items()}, rounds + 1, device)
    finally:
        torch.set_num_threads(before)
    costs = {name: MethodCost(times[name][1:], measure.peak_memory(build, device, threads)) for name, build in builds.items()}
    print("\n".join([measure.circumstances(device, threads), "", "| one outer step | m | seconds: median (least-most) | peak memory |",
                     "| --- | ---: | --- | ---: |",
                     *(f"| {plugins.load(name).title} | {builds[name].args[0].distill.m} | {measure.spread(cost.seconds)} | "
                       f"{cost.memory / 2**30:.2f} GiB |" for name, cost in costs.items())]))
    return costs

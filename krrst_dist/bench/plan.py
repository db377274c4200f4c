"""`krrst plan`: what a run would take on so many GPUs, before one is rented. Counted (`cost.py`) and measured (`measured.yaml`), not run.

Layouts of one preset are compared: one GPU; P slices of one shard's update (the same algorithm, S = 1); S shards (an update then averages S
models). Every GPU is taken to be a host of its own behind a link of the given bandwidth. What the engine adds was measured with one actor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

from krrst_dist.bench.cost import FLOAT, Cost
from krrst_dist.config import Config, ConfigError, nearest
from krrst_dist.presets_and_grids import load_preset

OPTIMISER = 6
"""tensors like X_s and Y_s that a replica holds: themselves, gradient, two moments, what is sent and received"""
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Layout:
    """One way to use `gpus` GPUs, and what it comes to. Seconds of an update; bytes on the busiest GPU.

    alone: of the update with as many models on one GPU after the other; `efficiency` is alone / (gpus * seconds).
    """

    name: str
    gpus: int
    parts: dict[str, float]
    alone: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of an update."""
        return sum(self.parts.values())

    @property
    def efficiency(self) -> float:
        """Work done over work that the GPUs could have done."""
        return self.alone / (self.gpus * self.seconds)

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.parts, key=self.parts.__getitem__)


def plan(*, preset: str = "imagenet64", gpus: int = 8, bandwidth: str = "25Gb", price: float | None = None, gpu: str = "h100",
         precision: Literal["float32", "tf32", "bfloat16"] = "bfloat16", updates: int | None = None) -> list[Layout]:
    """Predict seconds an update, efficiency, memory and cost of a preset on several GPUs.

    Args:
        preset: whose sizes.
        gpus: GPUs to be used.
        bandwidth: of each host's link, in bits a second: 25Gb, 100Gb, 400Gb.
        price: of a GPU for an hour.
        gpu: one of those that were measured.
        precision: of the networks.
        updates: to be done; default: the preset's.
    """
    config, constants = load_preset(preset), measured()
    if config.method != "krr_st":
        raise ConfigError(f"preset = {preset!r}: costs are counted for krr_st alone, not for {config.method}")
    for name, value, least in (("gpus", gpus, 1), ("updates", updates, 1), ("price", price, 0)):
        if value is not None and not value >= least:
            raise ConfigError(f"{name} = {value}: at least {least}")
    if gpu not in constants["gpus"]:
        raise ConfigError(f"gpu = {gpu!r}: has not been measured; {nearest(gpu, list(constants['gpus']))}")
    if precision not in constants["gpus"][gpu]:
        raise ConfigError(f"precision = {precision!r}: has not been measured on {gpu}; take float32 or bfloat16")
    reckon = _Reckoning(config, constants, rate=constants["gpus"][gpu][precision], link=bytes_a_second(bandwidth))
    layouts = [reckon.shards(1, "S = 1 on one GPU")]
    if gpus > 1:
        most = min(gpus, config.distill.m, config.distill.batch)
        layouts += [reckon.slices(most), reckon.shards(gpus, f"S = {gpus}, another algorithm: {gpus} models an update")]
    print(_report(config, layouts, updates or config.distill.updates, price, f"{gpu}, {precision}, {bandwidth}/s",
                  constants["gpus"][gpu]["from"]))
    return layouts


def bytes_a_second(bandwidth: str) -> float:
    """25Gb -> 3.125e9. Raises ConfigError for what is not a number of bits."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kMGT]?)b(?:it|ps)?(?:/s)?\s*", bandwidth)
    try:
        value = float(found[1]) * _UNITS.get(found[2], 1) / 8
    except (TypeError, ValueError):
        value = 0.0
    if not value > 0:
        raise ConfigError(f"bandwidth = {bandwidth!r}: must be bits a second, such as 25Gb or 400Gb")
    return value


def measured() -> dict[str, Any]:
    """The constants."""
    return yaml.safe_load(resources.files(__package__).joinpath("measured.yaml").read_text())


@dataclass(frozen=True)
class _Reckoning:
    config: Config
    constants: dict[str, Any]
    rate: float  # operations a second
    link: float  # bytes a second, each way

    def shards(self, shards: int, name: str) -> Layout:
        """S shards on as many GPUs, summed by all-reduce."""
        cost = Cost.of(self.config, shards=shards)
        work = self._seconds(cost.train, cost.real, cost.synthetic, cost.ridge)
        travel = 2 * (shards - 1) / shards * cost.learned / self.link
        engine = self.constants["engine"]["collective"]
        parts = {"computing": work, "summing gradients over the network": travel, "the engine": engine}
        return Layout(name, shards, parts, alone=shards * work + engine, memory=self._memory(cost))

    def slices(self, slices: int) -> Layout:
        """One shard, whose rows are shared by P GPUs; the pool model's training and the ridge head stay on one. By the object store, that
        is, through the hosts' memories."""
        cost = Cost.of(self.config, shards=1)
        alone = self._seconds(cost.train, cost.real, cost.synthetic, cost.ridge)
        others = (slices - 1) / slices
        syn = self.config.distill.m / (self.config.distill.m + self.config.distill.batch) * cost.features
        travel = (slices - 1) * (cost.weights + cost.learned) + others * (cost.features + syn + cost.learned)
        parts = {"training the pool model, on one GPU": self._seconds(cost.train), "the ridge head, on one GPU": self._seconds(cost.ridge),
                 "features and their gradients": self._seconds(cost.real, cost.synthetic) / slices,
                 "moving weights and features through one link": travel / self.link,
                 "the engine": self.constants["engine"]["store"] * cost.learned}
        alone += self.constants["engine"]["collective"]
        return Layout(f"S = 1, P = {slices} slices", slices, parts, alone=alone, memory=self._memory(cost))

    def _seconds(self, *operations: float) -> float:
        return sum(operations) / self.rate

    def _memory(self, cost: Cost) -> float:
        return self.constants["peak_over_activations"] * cost.activations + cost.pool + OPTIMISER * cost.learned + cost.features + \
            FLOAT * self.config.distill.batch * 3 * self.config.source.resolution**2


def _report(config: Config, layouts: list[Layout], updates: int, price: float | None, circumstances: str, origin: str) -> str:
    first, settings = layouts[0], config.distill
    lines = [f"{config.preset}: m = {settings.m}, b = {settings.batch}, {config.source.resolution} px, {updates:,} updates; "
             f"{circumstances}",
             f"a prediction; compute measured by: {origin}; the engine's own time with one actor on an H200", "",
             "| layout | GPUs | seconds an update | updates a second, of one GPU's | efficiency | memory a GPU | hours |"
             + (" price |" if price is not None else "") + " most time goes to |",
             "| --- | ---: | ---: | ---: | ---: | ---: | ---: |" + (" ---: |" if price is not None else "") + " --- |"]
    for one in layouts:
        hours = one.seconds * updates / 3600
        lines.append(f"| {one.name} | {one.gpus} | {one.seconds:.3g} | {first.seconds / one.seconds:.2f} | {100 * one.efficiency:.0f} % | "
                     f"{one.memory / 2**30:.1f} GiB | {hours:.3g} |" + (f" {price * hours * one.gpus:,.0f} |" if price is not None else "")
                     + f" {one.limit} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """`krrst plan ...`."""
    import tyro

    tyro.cli(plan, args=arguments, prog="krrst plan")

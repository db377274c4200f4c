"""KRR-ST, the method of the paper: Algorithm 1 from settings and prepared files, and its result as a distilled set.

Each part is a pure function of (settings, seed, files), so that any process can build the shards it hosts. Knows
files and the algorithm; not who runs it, nor where.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from pydantic import Field, model_validator
from torch import nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import ModelPool, OuterOptimizer, Shard, Slice
from krrst_dist.algorithm.contribution import mean
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.config import Config, ConfigError, MethodSettings, NetworkSettings, NonNegative, Positive, Settings
from krrst_dist.data.reader import read_all
from krrst_dist.methods.common.protocol import Method, Read
from krrst_dist.methods.common.source import Source


class PoolSettings(Settings):
    """The pool of models f_w (3.2)."""

    network: NetworkSettings = NetworkSettings(widths=(128, 256, 512))
    size: Positive = 10
    """l, models a shard"""
    max_steps: Annotated[int, Field(ge=2)] = 1000
    """T, steps after which a model is replaced by a fresh one"""
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    reset: Literal["paper", "released"] = "paper"
    """paper: a replaced model's step count returns to 0; released: it stays at T, as in the authors' code,
    so that the slot holds an untrained network from then on"""


class DistillSettings(MethodSettings):
    """Algorithm 1. The defaults are the published ones for CIFAR-100 (METHOD 5)."""

    m: Annotated[int, Field(ge=2)] = 1000
    """synthetic images; batch norm in the pool's networks cannot be trained on a single one"""
    batch: Positive = 1024
    """b, real images a meta-update, over all shards"""
    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 160_000
    """meta-updates to do"""
    decay_updates: Positive | None = None
    """updates over which the learning rate falls to its floor (1e-3 of the start); default: `updates` of
    the run's first start. Updates beyond it stay at the floor"""
    lr_x: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's learning rate for X_s, in pixel units (images in [0, 1])"""
    lr_y: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's learning rate for Y_s"""
    ridge: Annotated[float, Field(gt=0)] = 1e-6
    """lambda over trace(K)"""
    chunk_size: Positive | None = None
    """synthetic images whose activations are held at once; bounds memory, changes rounding only"""
    slices: Positive = 1
    """P, parts that the images of a meta-gradient are cut into: so many actors can share one shard's. Changes rounding only"""
    shards: Annotated[Positive, tyro.conf.arg(aliases=("--shards",))] = 1
    """S, logical shards; 1 is Algorithm 1 to the letter"""
    space: Literal["normalised", "raw"] = "normalised"
    """where X_s lives: the source's normalised space, or raw pixels in [0, 1] as in the authors' code"""
    start_y: Literal["target", "noise"] = "target"
    """Y_s at the start: g_phi of the starting images, or standard normal noise (Appendix E)"""
    views: NonNegative = 0
    """stored crop-and-flip views of each real image; 0: the image as it is"""
    pool: PoolSettings = PoolSettings()

    @property
    def horizon(self) -> int:
        """Outer steps of the learning rate's schedule."""
        return self.decay_updates or self.updates

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> DistillSettings:
        if self.batch % self.shards:
            raise ValueError(
                f"batch = {self.batch} is not a multiple of shards = {self.shards}: every shard reads "
                f"batch / shards images; take batch = {max(1, round(self.batch / self.shards)) * self.shards}"
            )
        return self

    @model_validator(mode="after")
    def _slices_have_rows(self) -> DistillSettings:
        rows = min(self.m, self.batch // self.shards)
        if self.slices > rows:
            raise ValueError(f"slices = {self.slices}: a shard has {self.m} synthetic and {self.batch // self.shards} real images to cut "
                             f"up; take at most {rows}")
        return self


class KrrSt(Method):
    """Kernel ridge regression on self-supervised targets."""

    title = "KRR-ST"
    settings = DistillSettings
    combine = staticmethod(mean)

    def needs_targets(self, settings: MethodSettings) -> bool:
        """It learns from nothing else."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Do m and the batch fit a training part of this many images? Raises ConfigError."""
        settings = config.distill
        if settings.m > training:
            raise ConfigError(f"distill.m = {settings.m}: X_s starts as that many different training images, and there are {training}; "
                              f"lower it")
        owned, asked = training // settings.shards, settings.batch // settings.shards
        if asked > owned:
            raise ConfigError(f"distill.batch = {settings.batch}: each of the {settings.shards} shard(s) reads {asked} images a batch but "
                              f"owns {owned}; lower distill.batch to at most {owned * settings.shards}")

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """X_s = m random training images, Y_s = their target representations (or noise)."""
        settings, prepared, seed = config.distill, source.prepared, config.seed
        chosen = seeds.numpy_rng(seed, "start").permutation(source.training)[:settings.m]
        space = Space(settings.space, prepared.mean, prepared.std)
        pixels = read_all(prepared, chosen)[0].numpy().astype(np.float32) / 255  # [m, C, H, W]
        y = source.targets.look_up(chosen).numpy()  # [m, k]
        if settings.start_y == "noise":
            y = seeds.numpy_rng(seed, "start noise").standard_normal(y.shape, dtype=np.float32)
        x = np.ascontiguousarray(space.from_pixels(pixels), np.float32)
        return DistilledSet(x, y, "features", config.evaluate.pretrain.recipe(), space, source.class_names)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> OuterOptimizer:
        """AdamW on X_s, in pixel units, and Y_s."""
        return OuterOptimizer(torch.from_numpy(start.x_syn), torch.from_numpy(start.y_syn), lr_x=config.distill.lr_x,
                              lr_y=config.distill.lr_y, decay_updates=horizon, scale=torch.from_numpy(start.space.scale()))

    def part(self, config: Config, source: Source, start: DistilledSet | None, index: int, *, read: Read | None = None,
             device: torch.device | str = "cpu") -> Shard:
        """Logical shard `index`: its pool of fresh models and its reader, ready for `warm_up` or `load_state_dict`."""
        settings = config.distill

        def fresh_model() -> nn.Module:
            return networks.with_head(_network(config), source.targets.k).to(device, memory_format=torch.channels_last)

        pool = ModelPool(fresh_model, **settings.pool.model_dump(exclude={"network"}), seed=config.seed, shard=index)
        batches = source.batches("targets", config, index, device=device)
        return Shard(index, pool, batches, ridge=settings.ridge, chunk_size=settings.chunk_size, slices=settings.slices,
                     precision=config.engine.precision, device=device)

    def slice(self, config: Config, source: Source, shard: int, p: int, *, device: torch.device | str = "cpu") -> Slice:
        """Slice p > 0 of a shard: a network for its model's weights, and its reader once more."""
        network = _network(config).to(device, memory_format=torch.channels_last)
        return Slice(p, config.distill.slices, network, source.batches("targets", config, shard, device=device),
                     chunk_size=config.distill.chunk_size, precision=config.engine.precision, device=device)

    def warm_up_steps(self, config: Config) -> int:
        """Training steps of all pools: half the largest age each."""
        settings = config.distill
        return settings.shards * settings.pool.size * settings.pool.max_steps // 2

    def network(self, config: Config) -> NetworkSettings:
        """The pool's."""
        return config.distill.pool.network


def _network(config: Config) -> nn.Module:
    """A fresh f_w."""
    network = config.distill.pool.network
    return networks.build(network.name, resolution=config.source.resolution, **network.options())


METHOD = KrrSt()

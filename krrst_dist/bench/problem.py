"""Random data and fresh models of a preset's sizes, as a textbook step, as our step and as shards for the engine.

Everything is built from settings alone, so that a fresh process can build it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import ModelPool, OuterOptimizer, Shard, mean
from krrst_dist.bench.textbook import TextbookStep
from krrst_dist.config import Config
from krrst_dist.data.normalise import normalise

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)  # of the random images, near enough those of photographs


class RandomBatches:
    """The same random uint8 images, normalised anew each time, with stored random targets: what a reader costs is not in it."""

    def __init__(self, images: Tensor, targets: Tensor, device: str) -> None:
        self._images, self._targets, self._device = images, targets, device

    def next(self) -> tuple[Tensor, Tensor]:
        return normalise(self._images.to(self._device), MEAN, STD), self._targets.to(self._device)

    def state(self) -> dict[str, int]:
        return {}

    def restore(self, state: dict[str, int]) -> None:
        pass


@dataclass(frozen=True)
class Problem:
    """One preset's step on one device."""

    config: Config
    device: str = "cpu"

    @property
    def k(self) -> int:
        """Target dimensions."""
        settings = self.config.target.network
        return networks.build(settings.name, resolution=self.config.source.resolution, **settings.options()).feature_dim

    @property
    def sizes(self) -> str:
        """For people."""
        settings, network = self.config.distill, self.config.distill.pool.network
        return (f"{self.config.preset}: m = {settings.m}, b = {settings.batch}, {self.config.source.resolution} px, {network.name} "
                f"{'-'.join(map(str, network.widths or ()))}, target {self.config.target.network.name} (k = {self.k})")

    def model(self, *, channels_last: bool) -> nn.Module:
        """A fresh pool model."""
        settings = self.config.distill.pool.network
        model = networks.with_head(networks.build(settings.name, resolution=self.config.source.resolution, **settings.options()), self.k)
        return model.to(self.device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def teacher(self) -> nn.Module:
        """The target network with the released stem: padding 2, where it has a small stem."""
        settings = self.config.target.network
        released = {"stem_padding": 2} if settings.name in ("resnet10", "resnet18") else {}
        network = networks.build(settings.name, resolution=self.config.source.resolution, **settings.options() | released)
        return network.to(self.device).requires_grad_(False)

    def start(self) -> tuple[Tensor, Tensor]:
        """X_s [m, C, H, W] and Y_s [m, k], as if normalised."""
        m, r, generator = self.config.distill.m, self.config.source.resolution, seeds.torch_rng(0, "bench start")
        return torch.randn(m, 3, r, r, generator=generator), torch.randn(m, self.k, generator=generator)

    def images(self, b: int, *, shard: int = 0) -> Tensor:
        """uint8 [b, C, H, W] with mean 0.5 and std 0.25."""
        r, generator = self.config.source.resolution, seeds.torch_rng(0, "bench images", shard)
        return (torch.randn(b, 3, r, r, generator=generator) * 64 + 128).clamp_(0, 255).to(torch.uint8)

    def shard(self, index: int) -> Shard:
        """Logical shard `index`, with one pool model, never reborn."""
        settings = self.config.distill
        b = settings.batch // settings.shards
        targets = torch.randn(b, self.k, generator=seeds.torch_rng(0, "bench targets", index))
        batches = RandomBatches(self.images(b, shard=index).contiguous(memory_format=torch.channels_last), targets, self.device)
        pool = ModelPool(lambda: self.model(channels_last=True), size=1, lr=settings.pool.lr, momentum=settings.pool.momentum,
                         weight_decay=settings.pool.weight_decay, max_steps=2**31 - 1, shard=index)
        return Shard(index, pool, batches, ridge=settings.ridge, chunk_size=settings.chunk_size, precision=self.config.engine.precision,
                     device=self.device)

    def outer(self) -> OuterOptimizer:
        """AdamW at the start."""
        settings = self.config.distill
        x_syn, y_syn = (value.to(self.device) for value in self.start())
        return OuterOptimizer(x_syn, y_syn, lr_x=settings.lr_x, lr_y=settings.lr_y, decay_updates=settings.updates, scale=STD[0])

    def ours(self) -> Callable[[], None]:
        """Our step: the body of `algorithm.distill`'s loop."""
        outer, shards = self.outer(), [self.shard(index) for index in range(self.config.distill.shards)]

        def step() -> None:
            now, x_syn, y_syn = outer.steps, outer.x_syn, outer.y_syn
            update = mean([shard.contribute(now, x_syn, y_syn) for shard in shards])
            outer.step(*update.gradients)
            x_syn, y_syn = outer.x_syn, outer.y_syn
            for shard in shards:
                shard.advance(now, x_syn, y_syn)

        return step

    def our_meta_gradient(self) -> Callable[[], None]:
        """The meta-gradient of our step alone: what `chunk_size` bounds the memory of."""
        shard, (x_syn, y_syn) = self.shard(0), self.start()
        return lambda: shard.contribute(0, x_syn, y_syn)

    def textbook(self) -> Callable[[], None]:
        """The textbook step at the same sizes, in float32 whatever the asked-for precision."""
        settings, (x_syn, y_syn) = self.config.distill, (value.to(self.device) for value in self.start())
        step = TextbookStep(
            self.model(channels_last=False), self.teacher(), x_syn, y_syn, self.images(settings.batch).to(self.device), mean=MEAN, std=STD,
            lr_x=settings.lr_x, lr_y=settings.lr_y, ridge=settings.ridge, lr=settings.pool.lr, momentum=settings.pool.momentum,
            weight_decay=settings.pool.weight_decay)

        def in_float32() -> None:
            torch.backends.cudnn.allow_tf32 = False
            step()

        return in_float32

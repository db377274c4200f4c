"""SSL bilevel: the plain way to distil without labels, which the paper argues against (3.1, equation 3 and Theorem 1).

A fresh network is trained on the synthetic images by a self-supervised loss, Barlow Twins, with random views of them in
every step; it is then to have a small self-supervised loss on real images. The gradient goes through all training steps.
As the views that a step happens to draw are in it twice, in how the network got there and in what it then lacks, its expectation
is not the gradient of what would be trained on all views alike. KRR-ST's inner loss, a regression, draws nothing.

The published text says no more: networks, steps and learning rates are ours, for small scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import tyro
from pydantic import Field
from torch import Tensor, nn

from krrst_dist import seeds
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.algorithm.barlow_twins import barlow_twins, projector
from krrst_dist.algorithm.contribution import mean
from krrst_dist.algorithm.outer import adamw, falling
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.ssl_pair import two_normalised_views
from krrst_dist.config import Config, ConfigError, MethodSettings, NetworkSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import check_network, network_of
from krrst_dist.methods.common.flat_network import FlatNetwork, plain_step
from krrst_dist.methods.common.protocol import Method, Read, Stateless
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.unroll import through_steps
from krrst_dist.recipes import OFF_DIAGONAL, PROJECTOR

Pair = tuple[Tensor, Tensor]
"""two views of each image, [n, C, H, W] each"""


class SSLBilevelSettings(MethodSettings):
    """All of them ours but the weight of the redundancy term, which is Barlow Twins' own."""

    m: Annotated[int, Field(ge=2)] = 1000
    """synthetic images; the loss correlates over them, so one is not enough. Every inner step takes all"""
    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 1000
    """outer steps, each with a fresh network"""
    network: NetworkSettings = NetworkSettings(widths=(128, 256, 512))
    """what is trained on the images"""
    projector: tuple[Positive, ...] = PROJECTOR
    """widths of the projector's layers, on top of it"""
    off_diagonal: Annotated[float, Field(gt=0)] = OFF_DIAGONAL
    """weight of the redundancy term"""
    steps: Positive = 10
    """N, inner steps"""
    lr_net: Annotated[float, Field(gt=0)] = 1e-4
    """their learning rate, by plain SGD. A higher one trains more, and leaves a gradient that is little but noise"""
    batch: Annotated[int, Field(ge=2)] = 256
    """real images that a shard's network is then tested on"""
    lr_x: Annotated[float, Field(gt=0)] = 0.01
    """AdamW's learning rate for X_s, in pixel units (images in [0, 1]); it falls linearly to a thousandth"""


def twins_loss(network: FlatNetwork, theta: Tensor, pairs: Sequence[Pair], off_diagonal: float) -> Tensor:
    """Barlow Twins, averaged over the pairs that were drawn of the same images; a scalar. Batch norm sees both views at once."""
    losses = [barlow_twins(*network(theta, torch.cat(pair)).chunk(2), off_diagonal) for pair in pairs]
    return torch.stack(losses).mean()


def outer_gradient(network: FlatNetwork, x_syn: Tensor, *, views: Callable[[int, Tensor], Sequence[Pair]], real: Sequence[Pair], steps: int,
                   rate: float, off_diagonal: float, alive: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
    """The loss on real images after `steps` inner steps from the network's own weights, and its gradient with respect to X_s.

    x_syn: [m, C, H, W]. views: (number of the step, X_s) -> the pairs that its loss is averaged over, differentiable; one is the method,
    and all there are give the expected inner loss. real: likewise for the outer loss. alive: called after every step, both ways.
    """
    def train(i: int, theta: Tensor, x: Tensor) -> Tensor:
        return plain_step(twins_loss(network, theta, views(i, x), off_diagonal), theta, rate)

    loss, (gradient,) = through_steps(train, steps, network.start, [x_syn], lambda theta: twins_loss(network, theta, real, off_diagonal),
                                      alive=alive)
    return loss, gradient


class SSLBilevelPart(Stateless):
    """A network and a real batch of its own in every step. Nothing is left between steps."""

    def __init__(self, config: Config, source: Source, index: int, device: torch.device) -> None:
        super().__init__(index)
        self._config, self._settings, self._source, self._device = config, config.distill, source, device
        self._scale, self._offset = (torch.from_numpy(values).to(device) for values in (source.space.scale(), source.space.offset()))

    def contribute(self, step: int, x_syn: Tensor) -> Contribution:
        """The gradient with respect to X_s. Raises DivergedError."""
        settings, seed, place = self._settings, self._config.seed, (self.index, step)
        rows = seeds.numpy_rng(seed, "bilevel real images", *place).permutation(len(self._source.training))[:settings.batch]
        real = self._source.training_images(rows).to(self._device, x_syn.dtype)
        loss, gradient = outer_gradient(
            self._network(step), x_syn.to(self._device), views=lambda i, x: [self._pair(x, "bilevel views", *place, i)],
            real=[self._pair(real, "bilevel real views", *place)], steps=settings.steps, rate=settings.lr_net,
            off_diagonal=settings.off_diagonal, alive=self.alive)
        if not (loss.isfinite() and gradient.isfinite().all()):
            raise DivergedError(f"update {step}, shard {self.index}: loss {loss.item():g}, or its gradient, is not finite; a learning rate "
                                f"is too high (distill.lr_net, distill.lr_x)")
        return Contribution(loss.item(), (gradient,), len(rows))

    def _network(self, step: int) -> FlatNetwork:
        with seeds.seeded(self._config.seed, "bilevel network", self.index, step):
            network = network_of(self._config)
            model = nn.Sequential(network, projector(network.feature_dim, self._settings.projector))
        return FlatNetwork(model.to(self._device))

    def _pair(self, x: Tensor, purpose: str, *indices: int) -> Pair:
        rng = seeds.torch_rng(self._config.seed, purpose, *indices)
        return two_normalised_views(x, rng, scale=self._scale, offset=self._offset)


class SSLBilevel(Method):
    """Self-supervised loss in both levels. Of several shards each has its own network and real batch; their gradients are averaged."""

    title = "SSL bilevel"
    settings = SSLBilevelSettings
    combine = staticmethod(mean)

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, a network that takes the resolution, float32. Raises ConfigError."""
        real_images.check_enough(config, training, None)
        if config.distill.batch > training:
            raise ConfigError(f"distill.batch = {config.distill.batch}: there are {training} training images; lower it")
        if not config.distill.projector:
            raise ConfigError("distill.projector = (): the loss is one of its outputs; give at least one width")
        check_network(config, self.title)

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images, without labels: pre-training on the set takes the same kind of loss."""
        return real_images.random_unlabelled(config, source)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """KRR-ST's AdamW, on X_s alone."""
        return Outer({"x_syn": torch.from_numpy(start.x_syn)}, lr={"x_syn": config.distill.lr_x}, optimizer=adamw,
                     schedule=falling(horizon), scale={"x_syn": torch.from_numpy(start.space.scale())})

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read | None = None,
             device: torch.device | str = "cpu") -> SSLBilevelPart:
        """Shard `index`."""
        return SSLBilevelPart(config, source, index, torch.device(device))


METHOD = SSLBilevel()

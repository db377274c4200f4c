"""Methods whose loss is a sum over classes of what tells a class's synthetic images from its real ones (DSA, DM).

Each class is a term of its own, so that logical shards can have their own classes: shard s of S has those with c mod S = s.
Knows how a class is read and augmented; what the term is, the method says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import Config, ConfigError, MethodSettings, NetworkSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method, Read, Stateless
from krrst_dist.methods.common.source import Source


class ClassWiseSettings(MethodSettings):
    """What DSA and DM have in common. Images are normalised by the source's own statistics; the authors took ImageNet's for TinyImageNet,
    and the same lr_x was a smaller step in pixels."""

    network: NetworkSettings = NetworkSettings(widths=(128, 128, 128), norm="instance")
    """what the images are compared with; published for 32 px (four widths for 64 px)"""
    batch_real: Positive = 256
    """real images of each class a step; all of them, where there are fewer"""


class ClassWise(Method):
    """Starts as real images with their labels; learns X_s by SGD with momentum. Its settings have `lr_x` and `momentum`."""

    settings = ClassWiseSettings
    shard: ClassVar[type[ClassWisePart]]

    def needs_labels(self, settings: MethodSettings) -> bool:
        """Its loss goes by classes."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, one for each class, a network that takes the resolution, float32. Raises ConfigError."""
        real_images.check_enough(config, training, classes)
        m = config.distill.m
        if classes is not None and m < len(classes):
            raise ConfigError(f"distill.m = {m}: {self.title} goes class by class, and each of the {len(classes)} classes needs an image "
                              f"of its own; take at least {len(classes)}")
        if classes is not None and config.distill.shards > len(classes):
            raise ConfigError(f"distill.shards = {config.distill.shards}: {self.title} shares out classes, and there are {len(classes)}; "
                              f"take at most {len(classes)}")
        check_network(config, self.title)

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images of each class."""
        return real_images.random_labels(config, source)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """SGD with a constant learning rate on X_s, in the normalised space; its momentum is kept over the whole run."""
        return Outer({"x_syn": torch.from_numpy(start.x_syn)}, lr={"x_syn": config.distill.lr_x},
                     optimizer=lambda groups: torch.optim.SGD(groups, momentum=config.distill.momentum))

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read | None = None,
             device: torch.device | str = "cpu") -> ClassWisePart:
        """The classes of shard `index`."""
        return self.shard(config, source, start, index, torch.device(device))


class ClassWisePart(Stateless):
    """Some classes. A method gives `begin`, what precedes a step, and `term`, the loss of one class."""

    def __init__(self, config: Config, source: Source, start: DistilledSet, index: int, device: torch.device) -> None:
        super().__init__(index)
        self.config, self.settings, self.device = config, config.distill, device
        self._source = source
        mine = [label for label in range(len(source.classes)) if label % config.distill.shards == index]
        self._rows = {label: rows for label in mine if len(rows := np.flatnonzero(start.y_syn == label))}  # of X_s

    def begin(self, step: int) -> None:
        """What precedes outer step `step`."""

    def term(self, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """The loss of a class, a scalar: of its images [n, C, H, W], differentiable, and as many real ones as were asked for; augmented."""
        raise NotImplementedError

    def contribute(self, step: int, x_syn: Tensor) -> Contribution:
        """The sum over its classes. Both batches of a class undergo the same augmentation. Raises DivergedError."""
        self.begin(step)
        seed, loss, images = self.config.seed, 0.0, 0
        gradient = torch.zeros_like(x_syn, device=self.device)
        for label, rows in self._rows.items():
            real = self._source.some_of_class(label, self.settings.batch_real, seed=seed, purpose="real of class", step=step)
            synthetic = x_syn[rows].to(self.device).requires_grad_()
            omega = seeds.derive(seed, "siamese augmentation", step, label)
            term = self.term(label, *(diff_augment(x, seed=omega, siamese=True) for x in (synthetic, real.to(self.device, x_syn.dtype))))
            gradient[rows] = torch.autograd.grad(term, synthetic)[0]
            loss, images = loss + term.item(), images + len(real)
            self.alive()
        if not (np.isfinite(loss) and torch.isfinite(gradient).all()):
            raise DivergedError(f"update {step}, shard {self.index}: loss {loss:g}, or its gradient, is not finite; a learning rate is too "
                                f"high (distill.lr_x)")
        return Contribution(loss, (gradient,), images)


def check_network(config: Config, title: str) -> None:
    """Does its network take the resolution, and is float32 asked for? Raises ConfigError."""
    if config.engine.precision != "float32":
        raise ConfigError(f"engine.precision = {config.engine.precision!r}: {title} computes in float32 alone; leave it out")
    with torch.device("meta"):
        network_of(config)


def network_of(config: Config) -> nn.Module:
    """A network with its classless features, from torch's global generator."""
    network = config.distill.network
    return networks.build(network.name, resolution=config.source.resolution, **network.options())

"""DSA: gradient matching with differentiable siamese augmentation (Zhao and Bilen, 2021; BASELINES 3).

A network theta is trained on the synthetic images; along its way, the gradient that a class's synthetic images give
it is to have the direction of the one its real images give. An outer step is one step on the images; `outer_loop` of them
make a trajectory, at whose start theta is fresh. Every shard trains the same theta by itself: that is little beside the matching.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from pydantic import Field
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import DivergedError
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import Config, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import ClassWise, ClassWisePart, ClassWiseSettings, network_of
from krrst_dist.methods.common.protocol import Tensors
from krrst_dist.methods.common.source import Source


class DSASettings(ClassWiseSettings):
    """The published values for 10 images a class; for 1 image outer_loop and inner_loop are 1 and 1, for 50 they are 50 and 10."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 10_000
    """steps on the images: 1,000 trajectories of 10"""
    outer_loop: Positive = 10
    """T, steps on the images in a trajectory"""
    inner_loop: Positive = 50
    """epochs that theta is trained for on X_s after each of them but the last"""
    batch_train: Positive = 256
    """synthetic images of such a training step"""
    lr_net: Annotated[float, Field(gt=0)] = 0.01
    """learning rate of theta, by plain SGD"""
    lr_x: Annotated[float, Field(gt=0)] = 0.1
    """SGD's learning rate for X_s, in the normalised space"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5


def gradient_distance(synthetic: list[Tensor], real: list[Tensor]) -> Tensor:
    """Sum over layers and output rows of 1 - cos, a scalar; gradients of biases and gains (one dimension) do not count.

    A row is a convolution's filter or a class's weights. 1e-6 is added to the product of norms.
    """
    distance = synthetic[0].new_zeros(())
    for ours, theirs in zip(synthetic, real, strict=True):
        if ours.dim() > 1:
            a, b = ours.flatten(1), theirs.flatten(1)
            distance = distance + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return distance


class DSAPart(ClassWisePart):
    """Some classes, and theta."""

    def __init__(self, config: Config, source: Source, start: DistilledSet, index: int, device: torch.device) -> None:
        super().__init__(config, source, start, index, device)
        self._classes, self._y = len(source.classes), torch.from_numpy(start.y_syn).to(device)
        self._trajectory = -1

    def begin(self, step: int) -> None:
        """A fresh theta, where a trajectory begins."""
        if step // self.settings.outer_loop != self._trajectory:
            self._begin_trajectory(step // self.settings.outer_loop)

    def term(self, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """The distance of the two gradients with respect to theta."""
        return gradient_distance(self._gradient(synthetic, label, differentiable=True), self._gradient(real, label, differentiable=False))

    def advance(self, step: int, x_syn: Tensor) -> None:
        """Train theta on X_s, each batch under an augmentation of its own."""
        settings, seed = self.settings, self.config.seed
        if step % settings.outer_loop == settings.outer_loop - 1:
            return
        x, rate = x_syn.to(self.device), settings.lr_net
        for epoch in range(settings.inner_loop):
            order = torch.randperm(len(x), generator=seeds.torch_rng(seed, "theta's order", step, epoch)).to(self.device)
            for i, rows in enumerate(order.split(settings.batch_train)):
                batch = diff_augment(x[rows], seed=seeds.derive(seed, "theta's augmentation", step, epoch, i))
                gradients = torch.autograd.grad(F.cross_entropy(self._theta(batch), self._y[rows]), self._parameters)
                with torch.no_grad():
                    for value, gradient in zip(self._parameters, gradients, strict=True):
                        value -= rate * gradient
            self.alive()

    def check(self, step: int | None) -> None:
        """Is theta finite?"""
        if self._trajectory >= 0 and not all(value.isfinite().all() for value in self._parameters):
            raise DivergedError(f"update {step}, shard {self.index}: theta has weights that are not finite; a learning rate is too high "
                                f"(distill.lr_net, distill.lr_x)")

    def state_dict(self) -> tuple[Tensors, dict[str, int]]:
        """theta, and the number of its trajectory."""
        return dict(self._theta.state_dict()) if self._trajectory >= 0 else {}, {"trajectory": self._trajectory}

    def load_state_dict(self, tensors: Tensors, numbers: dict[str, int]) -> None:
        """Go on where `state_dict()` was taken."""
        self._trajectory = -1
        if numbers["trajectory"] >= 0:
            self._begin_trajectory(numbers["trajectory"])
            self._theta.load_state_dict(tensors)

    def _begin_trajectory(self, number: int) -> None:
        with seeds.seeded(self.config.seed, "DSA network", number):
            self._theta: nn.Module = networks.with_head(network_of(self.config), self._classes)
        self._theta.to(self.device)
        self._parameters = list(self._theta.parameters())
        self._trajectory = number

    def _gradient(self, x: Tensor, label: int, *, differentiable: bool) -> list[Tensor]:
        loss = F.cross_entropy(self._theta(x), torch.full((len(x),), label, device=x.device))
        return list(torch.autograd.grad(loss, self._parameters, create_graph=differentiable))


class DSA(ClassWise):
    """Gradient matching."""

    title = "DSA"
    settings = DSASettings
    shard = DSAPart

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """As of every method that goes class by class, and two classes: theta is trained to tell them apart. Raises ConfigError."""
        super().check(config, training=training, classes=classes)
        real_images.check_several_classes(config, classes, self.title)


METHOD = DSA()

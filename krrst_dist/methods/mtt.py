"""MTT: matching training trajectories (Cazenavette et al., 2022; BASELINES 5).

Experts are networks trained on the real images, with their weights stored after every epoch: chores, which the engine
spreads. A student starts from an expert's weights and takes N plain gradient steps on the synthetic images; it is to arrive where the
expert was some epochs later. Its step size alpha is learned, too. The last images are kept; the authors keep those that did
best on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from pydantic import Field, model_validator
from torch import Tensor

from krrst_dist import networks, seeds
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.algorithm.contribution import mean
from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import Config, MethodSettings, NetworkSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import check_network, network_of
from krrst_dist.methods.common.flat_network import FlatNetwork, plain_step
from krrst_dist.methods.common.protocol import Method, Read, Stateless
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.unroll import through_steps


class MTTSettings(MethodSettings):
    """The published values for CIFAR-100, 10 images a class; TinyImageNet's are in its preset."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 5000
    """outer steps"""
    network: NetworkSettings = NetworkSettings(widths=(128, 128, 128), norm="instance")
    """of experts and students"""
    experts: Positive = 100
    """networks trained on the real images"""
    teacher_epochs: Positive = 50
    """epochs of each, after every one of which its weights are stored"""
    teacher_lr: Annotated[float, Field(gt=0)] = 0.01
    """their learning rate, by plain SGD, and where alpha starts"""
    teacher_batch: Positive = 256
    """real images of a step of theirs"""
    steps: Positive = 20
    """N, steps of the student"""
    batch: Positive | None = None
    """synthetic images of such a step; all of them where left out"""
    expert_epochs: Positive = 2
    """epochs after its start that the student is compared with the expert"""
    max_start_epoch: Positive = 20
    """the student starts at an epoch below it"""
    lr_x: Annotated[float, Field(gt=0)] = 1000.0
    """SGD's learning rate for X_s, in the normalised space"""
    lr_alpha: Annotated[float, Field(gt=0)] = 1e-5
    """SGD's learning rate for alpha"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _epochs_are_there(self) -> MTTSettings:
        last = self.max_start_epoch - 1 + self.expert_epochs
        if last > self.teacher_epochs:
            raise ValueError(f"max_start_epoch = {self.max_start_epoch}: a student that starts at the last epoch below it is compared with "
                             f"epoch {last} of an expert, which has teacher_epochs = {self.teacher_epochs}; lower it or raise those")
        return self


def matching_loss(theta: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """|| theta - goal ||^2 / || start - goal ||^2, a scalar; all are [p]."""
    return (theta - goal).square().sum() / (start - goal).square().sum()


class Student(FlatNetwork):
    """A classifier whose weights are one vector theta [p]."""

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy on images x [n, C, H, W] with classes y [n], a scalar."""
        return F.cross_entropy(self(theta, x), y)

    def step(self, theta: Tensor, x: Tensor, y: Tensor, rate: Tensor | float) -> Tensor:
        """theta after a plain gradient step, differentiable."""
        return plain_step(self.loss(theta, x, y), theta, rate)


class MTTPart(Stateless):
    """An expert's stretch in every step; of several shards each draws its own. Nothing is left between steps."""

    def __init__(self, config: Config, start: DistilledSet, index: int, student: Student, read: Read, device: torch.device) -> None:
        super().__init__(index)
        self._config, self._settings, self._device = config, config.distill, device
        self._y, self._student, self._read = torch.from_numpy(start.y_syn).to(device), student, read

    def contribute(self, step: int, x_syn: Tensor, alpha: Tensor) -> Contribution:
        """The gradient with respect to X_s and alpha [1]. Raises DivergedError."""
        settings, seed = self._settings, self._config.seed
        rng = seeds.numpy_rng(seed, "expert's stretch", self.index, step)
        expert, epoch = int(rng.integers(settings.experts)), int(rng.integers(settings.max_start_epoch))
        weights = self._read(_chore(expert))["weights"].to(self._device, x_syn.dtype)  # [epochs + 1, p]
        theta, goal = weights[epoch], weights[epoch + settings.expert_epochs]
        batches = self._batches(step)

        def train(i: int, theta: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
            batch = diff_augment(x[batches[i]], seed=seeds.derive(seed, "student's augmentation", self.index, step, i))
            return self._student.step(theta, batch, self._y[batches[i]], alpha)

        loss, gradients = through_steps(train, settings.steps, theta, [x_syn.to(self._device), alpha.to(self._device)],
                                        lambda last: matching_loss(last, theta, goal), alive=self.alive)
        if not all(value.isfinite().all() for value in (loss, *gradients)):
            raise DivergedError(f"update {step}, shard {self.index}: loss {loss.item():g} against expert {expert}, or its gradient, is not "
                                f"finite; a learning rate is too high (distill.lr_x, distill.lr_alpha)")
        return Contribution(loss.item(), gradients, 1)

    def _batches(self, step: int) -> list[Tensor]:
        """The synthetic images of each of the student's steps: the parts of one permutation after the other."""
        settings, m, found, epoch = self._settings, len(self._y), [], 0
        while len(found) < settings.steps:
            order = torch.randperm(m, generator=seeds.torch_rng(self._config.seed, "student's order", self.index, step, epoch))
            found += order.to(self._device).split(settings.batch or m)
            epoch += 1
        return found[:settings.steps]


class MTT(Method):
    """Trajectory matching. One chore an expert; all distillation seeds share them."""

    title = "MTT"
    settings = MTTSettings
    chores_read = ("source.", "distill.network", "distill.teacher_")
    combine = staticmethod(mean)

    def needs_labels(self, settings: MethodSettings) -> bool:
        """Experts and students classify."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, a network that takes the resolution, float32. Raises ConfigError."""
        real_images.check_enough(config, training, classes)
        check_network(config, self.title)

    def chores(self, config: Config, source: Source) -> Sequence[str]:
        """One an expert."""
        return [_chore(expert) for expert in range(config.distill.experts)]

    def do(self, config: Config, source: Source, chore: str, *, device: torch.device, alive: Callable[[], None]) -> Mapping[str, Tensor]:
        """An expert's weights at its start and after every epoch, [epochs + 1, p]."""
        settings, expert, n = config.distill, int(chore.rpartition("-")[2]), len(source.training)
        student = _student(config, source, device, "MTT expert", expert)
        theta, labels = student.start, torch.from_numpy(source.labels)
        weights = [theta.cpu()]
        for epoch in range(settings.teacher_epochs):
            order = seeds.numpy_rng(0, "expert's order", expert, epoch).permutation(n)
            for i, rows in enumerate(np.split(order, range(settings.teacher_batch, n, settings.teacher_batch))):
                seed = seeds.derive(0, "expert's augmentation", expert, epoch, i)
                x = diff_augment(source.training_images(rows).to(device, theta.dtype), seed=seed)
                theta = theta.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(student.loss(theta, x, labels[rows].to(device)), theta)
                theta = theta - settings.teacher_lr * gradient
                alive()
            weights.append(theta.detach().cpu())
        if not weights[-1].isfinite().all():
            raise DivergedError(f"expert {expert} diverged; lower distill.teacher_lr")
        return {"weights": torch.stack(weights)}

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images of each class."""
        return real_images.random_labels(config, source)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """SGD on X_s, in the normalised space, and on alpha [1]."""
        settings = config.distill
        return Outer({"x_syn": torch.from_numpy(start.x_syn), "alpha": torch.tensor([settings.teacher_lr])},
                     lr={"x_syn": settings.lr_x, "alpha": settings.lr_alpha},
                     optimizer=lambda groups: torch.optim.SGD(groups, momentum=settings.momentum))

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read,
             device: torch.device | str = "cpu") -> MTTPart:
        """Shard `index`."""
        where = torch.device(device)
        return MTTPart(config, start, index, _student(config, source, where, "MTT student"), read, where)

    def result(self, start: DistilledSet, values: Sequence[Tensor]) -> DistilledSet:
        """X_s; alpha was for the student alone."""
        return super().result(start, values[:1])


def _chore(expert: int) -> str:
    return f"expert-{expert}"


def _student(config: Config, source: Source, device: torch.device, *purpose: str | int) -> Student:
    with seeds.seeded(0, *purpose):
        network = networks.with_head(network_of(config), len(source.classes))
    return Student(network.to(device))


METHOD = MTT()

"""Matching training trajectories: what MTT and MKDT share.

Experts are networks trained on the real images, with their weights stored after every epoch: chores, which the engine spreads. A student
starts from an expert's weights and takes N plain gradient steps on the synthetic images; it is to arrive where the expert was some epochs
later. Its step size alpha is learned, too. What a network is trained to predict, the method says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.algorithm.contribution import mean
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, MethodSettings, NetworkSettings, Positive
from krrst_dist.methods.common.class_wise import network_of
from krrst_dist.methods.common.flat_network import FlatNetwork, plain_step
from krrst_dist.methods.common.protocol import Method, Read, Stateless
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.unroll import through_steps

Loss = Callable[[Tensor, Tensor], Tensor]
View = Callable[..., Tensor]
"""(images [n, C, H, W], seed=) -> the images as networks see them"""


class TrajectorySettings(MethodSettings):
    """What MTT and MKDT have in common; the values are MTT's."""

    network: NetworkSettings = NetworkSettings(widths=(128, 128, 128), norm="instance")
    """of experts and students"""
    experts: Positive = 100
    """networks trained on the real images"""
    teacher_epochs: Positive = 50
    """epochs of each, after every one of which its weights are stored"""
    teacher_lr: Annotated[float, Field(gt=0)] = 0.01
    """their learning rate, by SGD, and where alpha starts"""
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """theirs"""
    teacher_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """theirs"""
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
    """SGD's"""

    @model_validator(mode="after")
    def _epochs_are_there(self) -> TrajectorySettings:
        last = self.max_start_epoch - 1 + self.expert_epochs
        if last > self.teacher_epochs:
            raise ValueError(f"max_start_epoch = {self.max_start_epoch}: a student that starts at the last epoch below it is compared with "
                             f"epoch {last} of an expert, which has teacher_epochs = {self.teacher_epochs}; lower it or raise those")
        return self


def matching_loss(theta: Tensor, start: Tensor, goal: Tensor) -> Tensor:
    """|| theta - goal ||^2 / || start - goal ||^2, a scalar; all are [p]."""
    return (theta - goal).square().sum() / (start - goal).square().sum()


class Student(FlatNetwork):
    """A network with a head whose weights are one vector theta [p], and what it is trained on: loss(outputs, y) -> scalar."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__(network)
        self._loss = loss

    def loss(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """On images x [n, C, H, W] with labels y, a scalar."""
        predicted = self(theta, x)
        return self._loss(predicted, y.to(predicted.dtype) if y.is_floating_point() else y)

    def step(self, theta: Tensor, x: Tensor, y: Tensor, rate: Tensor | float) -> Tensor:
        """theta after a plain gradient step, differentiable."""
        return plain_step(self.loss(theta, x, y), theta, rate)


class TrajectoryPart(Stateless):
    """An expert's stretch in every step; of several shards each draws its own. Nothing is left between steps."""

    def __init__(self, config: Config, start: DistilledSet, index: int, student: Student, view: View, read: Read,
                 device: torch.device) -> None:
        super().__init__(index)
        self._config, self._settings, self._device = config, config.distill, device
        self._y, self.student, self._view, self._read = torch.from_numpy(start.y_syn), student, view, read

    def contribute(self, step: int, x_syn: Tensor, *learned: Tensor) -> Contribution:
        """The gradient with respect to X_s, Y_s where it is learned, and alpha [1], the last one. Raises DivergedError."""
        settings, seed = self._settings, self._config.seed
        rng = seeds.numpy_rng(seed, "expert's stretch", self.index, step)
        expert, epoch = int(rng.integers(settings.experts)), int(rng.integers(settings.max_start_epoch))
        weights = self._read(chore_of(expert))["weights"].to(self._device, x_syn.dtype)  # [epochs + 1, p]
        theta, goal = weights[epoch], weights[epoch + settings.expert_epochs]
        batches, fixed = self._batches(step), () if len(learned) > 1 else (self._y.to(self._device),)

        def train(i: int, theta: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
            y, alpha = (*fixed, *rest)
            batch = self._view(x[batches[i]], seed=seeds.derive(seed, "student's augmentation", self.index, step, i))
            return self.student.step(theta, batch, y[batches[i]], alpha)

        loss, gradients = through_steps(train, settings.steps, theta, [value.to(self._device) for value in (x_syn, *learned)],
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


class TrajectoryMethod(Method):
    """Base of MTT and MKDT. One chore an expert; all distillation seeds share them."""

    settings = TrajectorySettings
    chores_read = ("source.", "distill.network", "distill.teacher_")
    combine = staticmethod(mean)
    purpose: ClassVar[str]
    """of its networks' first weights"""
    loss: Loss
    view: View

    def outputs(self, source: Source) -> int:
        """k, of what a network predicts."""
        raise NotImplementedError

    def labels(self, source: Source, rows: np.ndarray) -> Tensor:
        """What it is to predict for these training images [n]: [n] or [n, k]."""
        raise NotImplementedError

    def student(self, config: Config, source: Source, device: torch.device, role: str, *numbers: int) -> Student:
        """A network with fresh weights. role: student or expert."""
        with seeds.seeded(0, f"{self.purpose} {role}", *numbers):
            network = networks.with_head(network_of(config), self.outputs(source))
        return Student(network.to(device), self.loss)

    def chores(self, config: Config, source: Source) -> Sequence[str]:
        """One an expert."""
        return [chore_of(expert) for expert in range(config.distill.experts)]

    def do(self, config: Config, source: Source, chore: str, *, device: torch.device, alive: Callable[[], None]) -> Mapping[str, Tensor]:
        """An expert's weights at its start and after every epoch, [epochs + 1, p]."""
        settings, expert, n = config.distill, int(chore.rpartition("-")[2]), len(source.training)
        student = self.student(config, source, device, "expert", expert)
        theta, velocity = student.start, torch.zeros_like(student.start)
        weights = [theta.cpu()]
        for epoch in range(settings.teacher_epochs):
            order = seeds.numpy_rng(0, "expert's order", expert, epoch).permutation(n)
            for i, rows in enumerate(np.split(order, range(settings.teacher_batch, n, settings.teacher_batch))):
                seed = seeds.derive(0, "expert's augmentation", expert, epoch, i)
                x = self.view(source.training_images(rows).to(device, theta.dtype), seed=seed)
                theta = theta.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(student.loss(theta, x, self.labels(source, rows).to(device)), theta)
                velocity = settings.teacher_momentum * velocity + gradient + settings.teacher_weight_decay * theta.detach()
                theta = theta - settings.teacher_lr * velocity
                alive()
            weights.append(theta.detach().cpu())
        if not weights[-1].isfinite().all():
            raise DivergedError(f"expert {expert} diverged; lower distill.teacher_lr")
        return {"weights": torch.stack(weights)}

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """SGD on X_s, in the normalised space, and on alpha [1]."""
        settings = config.distill
        return Outer({"x_syn": torch.from_numpy(start.x_syn), "alpha": torch.tensor([settings.teacher_lr])},
                     lr={"x_syn": settings.lr_x, "alpha": settings.lr_alpha},
                     optimizer=lambda groups: torch.optim.SGD(groups, momentum=settings.momentum))

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read,
             device: torch.device | str = "cpu") -> TrajectoryPart:
        """Shard `index`."""
        where = torch.device(device)
        return TrajectoryPart(config, start, index, self.student(config, source, where, "student"), self.view, read, where)


def chore_of(expert: int) -> str:
    """The name of an expert's chore."""
    return f"expert-{expert}"

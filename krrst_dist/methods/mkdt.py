"""MKDT: matching knowledge distillation trajectories (Joshi, Ni and Mirzasoleiman, 2025).

MTT on the target model's representations instead of classes: experts and students regress them, by mean squared error and without
augmentation, so that no labels are needed. It starts from the images that the trained experts regress worst, with their representations,
and learns those, too. Later than the paper that this package follows; settings are those of its authors' commands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from pydantic import Field
from torch import Tensor

from krrst_dist.algorithm import Outer
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError, MethodSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import check_network
from krrst_dist.methods.common.protocol import Read
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.trajectories import TrajectoryMethod, TrajectorySettings, chore_of


class MKDTSettings(TrajectorySettings):
    """The published values for CIFAR-100 and 2 % of its images, which is what m = 1000 is; TinyImageNet's are in its preset."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 5000
    """outer steps"""
    teacher_epochs: Positive = 20
    """epochs of each expert, after every one of which its weights are stored"""
    teacher_lr: Annotated[float, Field(gt=0)] = 0.1
    """their learning rate, by SGD, and where alpha starts"""
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """theirs"""
    teacher_weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """theirs"""
    steps: Positive = 40
    """N, steps of the student"""
    batch: Positive | None = 256
    """synthetic images of such a step; all of them where left out"""
    max_start_epoch: Positive = 2
    """the student starts at an epoch below it"""
    lr_y: Annotated[float, Field(gt=0)] = 1.0
    """SGD's learning rate for Y_s"""
    lr_alpha: Annotated[float, Field(gt=0)] = 1e-4
    """SGD's learning rate for alpha"""


def as_it_is(x: Tensor, *, seed: int) -> Tensor:
    """No augmentation."""
    return x


class MKDT(TrajectoryMethod):
    """Trajectory matching on representations."""

    title, purpose = "MKDT", "MKDT"
    settings = MKDTSettings
    loss, view = staticmethod(F.mse_loss), staticmethod(as_it_is)

    def needs_targets(self, settings: MethodSettings) -> bool:
        """Experts and students regress them."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, a network that takes the resolution, float32. Raises ConfigError."""
        if config.distill.m > training:
            raise ConfigError(f"distill.m = {config.distill.m}: there are {training} training images; lower it")
        check_network(config, self.title)

    def outputs(self, source: Source) -> int:
        """Dimensions of a representation."""
        return source.targets.k

    def labels(self, source: Source, rows: np.ndarray) -> Tensor:
        """Representations, float32 [n, k]."""
        return source.targets.look_up(source.training[rows])

    def do(self, config: Config, source: Source, chore: str, *, device: torch.device, alive: Callable[[], None]) -> Mapping[str, Tensor]:
        """An expert's weights, and the squared error of the last ones on every training image, mean over dimensions, [n]."""
        made = super().do(config, source, chore, device=device, alive=alive)
        expert, last = self.student(config, source, device, "expert", int(chore.rpartition("-")[2])), made["weights"][-1].to(device)
        losses = []
        for rows in torch.arange(len(source.training)).split(config.distill.teacher_batch):
            with torch.no_grad():
                predicted = expert(last, source.training_images(rows.numpy()).to(device, last.dtype)).cpu()
            losses.append((predicted - self.labels(source, rows.numpy())).square().mean(1))
            alive()
        return made | {"losses": torch.cat(losses)}

    def start(self, config: Config, source: Source, read: Read) -> DistilledSet:
        """The m images of the largest error, averaged over experts, with their representations."""
        losses = torch.stack([read(chore_of(expert))["losses"] for expert in range(config.distill.experts)]).mean(0)  # [n]
        rows = losses.argsort(descending=True, stable=True)[:config.distill.m].numpy()
        return real_images.labelled_as("targets", config, source, rows)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """SGD on X_s, in the normalised space, Y_s, and alpha [1]."""
        settings = config.distill
        values = {"x_syn": torch.from_numpy(start.x_syn), "y_syn": torch.from_numpy(start.y_syn),
                  "alpha": torch.tensor([settings.teacher_lr])}
        return Outer(values, lr={"x_syn": settings.lr_x, "y_syn": settings.lr_y, "alpha": settings.lr_alpha},
                     optimizer=lambda groups: torch.optim.SGD(groups, momentum=settings.momentum))


METHOD = MKDT()

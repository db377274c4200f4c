"""MTT: matching training trajectories (Cazenavette et al., 2022; BASELINES 5).

Experts and students classify, with DSA's augmentation. The last images are kept; the authors keep those that did best on the test set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from krrst_dist.artifacts import DistilledSet
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import Config, MethodSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import check_network
from krrst_dist.methods.common.protocol import Read
from krrst_dist.methods.common.source import Source
from krrst_dist.methods.common.trajectories import TrajectoryMethod, TrajectorySettings


class MTTSettings(TrajectorySettings):
    """The published values for CIFAR-100, 10 images a class; TinyImageNet's are in its preset. Images are normalised by the source's own
    statistics; the authors took CIFAR-10's for CIFAR-100 and ImageNet's for TinyImageNet, and one lr_x was a smaller step in pixels."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 5000
    """outer steps"""


class MTT(TrajectoryMethod):
    """Trajectory matching on classes."""

    title, purpose = "MTT", "MTT"
    settings = MTTSettings
    loss, view = staticmethod(F.cross_entropy), staticmethod(diff_augment)

    def needs_labels(self, settings: MethodSettings) -> bool:
        """Experts and students classify."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, two classes, a network that takes the resolution, float32. Raises ConfigError."""
        real_images.check_enough(config, training, classes)
        real_images.check_several_classes(config, classes, self.title)
        check_network(config, self.title)

    def outputs(self, source: Source) -> int:
        """Classes."""
        return len(source.classes)

    def labels(self, source: Source, rows: np.ndarray) -> Tensor:
        """Classes, int64 [n]."""
        return torch.from_numpy(source.labels[rows])

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images of each class."""
        return real_images.random_labels(config, source)

    def result(self, start: DistilledSet, values: Sequence[Tensor]) -> DistilledSet:
        """X_s; alpha was for the student alone."""
        return super().result(start, values[:1])


METHOD = MTT()

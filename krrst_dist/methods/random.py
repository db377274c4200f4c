"""Random: real images as they are, what every method has to be better than (METHOD 5, BASELINES 1)."""

from __future__ import annotations

from typing import Literal

from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, MethodSettings
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method, Read
from krrst_dist.methods.common.source import Source


class RandomSettings(MethodSettings):
    """Nothing to tune."""

    labels: Literal["class", "targets"] = "class"
    """what the images are trained on with: their classes, or target representations, which an unlabeled source has, too"""


class Random(Method):
    """m training images; the same number of each class, where the source has classes."""

    title = "Random"
    settings = RandomSettings

    def needs_labels(self, settings: RandomSettings) -> bool:
        """As labels only; they are used for balance where they exist."""
        return settings.labels == "class"

    def needs_targets(self, settings: RandomSettings) -> bool:
        """As labels."""
        return settings.labels == "targets"

    def check(self, config: Config, *, training: int, classes: list[int] | None) -> None:
        """Are there enough images, of every class? Raises ConfigError."""
        real_images.check_enough(config, training, classes)

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """The images."""
        return real_images.labelled_as(config.distill.labels, config, source, real_images.balanced(config, source))


METHOD = Random()

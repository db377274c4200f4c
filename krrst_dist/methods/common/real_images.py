"""Real images as sets to train on: where the methods with labels start, and what every distilled set is compared with.

As many images as a run distils, with their labels; or the whole training part with its target representations, the
ceiling of what m images can teach. Knows files and settings; not who uses the sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from krrst_dist import seeds
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError
from krrst_dist.methods.common.source import Source
from krrst_dist.recipes import PRETRAIN

LOSSES = {"class": "cross-entropy", "soft": "half squared error, summed over classes", "none": "Barlow Twins, on two views of each image"}
"""by the kind of a set's labels, for readers without this package"""


def shares(m: int, classes: int, seed: int) -> np.ndarray:
    """How many of m images are of each class, int64 [classes]: equally many; where m is no multiple, some classes have one more."""
    share = np.full(classes, m // classes)
    share[seeds.numpy_rng(seed, "larger classes").permutation(classes)[: m % classes]] += 1
    return share


def check_several_classes(config: Config, classes: Sequence[int] | None, title: str) -> None:
    """For a method whose loss says nothing about a single class. Raises ConfigError."""
    if classes is not None and len(classes) < 2:
        raise ConfigError(f"source.dataset = {config.source.dataset!r}: it has a single class, and {title}'s loss compares classes; take "
                          f"another source")


def check_enough(config: Config, training: int, classes: list[int] | None) -> None:
    """Has the source m training images, and every class its share? classes: images of each, None where they are not known.

    Raises ConfigError.
    """
    m = config.distill.m
    if m > training:
        raise ConfigError(f"distill.m = {m}: there are {training} training images; lower it")
    for label, (there, wanted) in enumerate(zip(classes or (), shares(m, len(classes or ()) or 1, config.seed), strict=False)):
        if there < wanted:
            raise ConfigError(f"distill.m = {m}: class {label} has {there} training images, and {wanted} are wanted of it; lower it")


def balanced(config: Config, source: Source) -> np.ndarray:
    """m random rows of the training part, int64 [m]: the same number of each class, class after class, where there are classes."""
    m, seed = config.distill.m, config.seed
    if not source.classes:
        return seeds.numpy_rng(seed, "start").permutation(len(source.training))[:m]
    return np.concatenate([seeds.numpy_rng(seed, "random of class", label).permutation(members)[:wanted] for label, (members, wanted)
                           in enumerate(zip(source.classes, shares(m, len(source.classes), seed), strict=True))])


def labelled_as(labels: Literal["class", "targets"], config: Config, source: Source, rows: np.ndarray) -> DistilledSet:
    """These images of the training part, with their classes and the published recipe for those, or with their target representations."""
    x = source.training_images(rows).contiguous().numpy()
    if labels == "class":
        return DistilledSet(x, source.labels[rows], "class", recipe("class", config), source.space, source.class_names)
    y = source.targets.look_up(source.training[rows]).numpy()
    return DistilledSet(x, y, "features", config.evaluate.pretrain.recipe(), source.space, source.class_names)


def random_labels(config: Config, source: Source) -> DistilledSet:
    """m random training images with their labels, class after class: where the methods with labels start."""
    return labelled_as("class", config, source, balanced(config, source))


def random_unlabelled(config: Config, source: Source) -> DistilledSet:
    """m random training images alone, drawn without a look at classes: where self-supervised methods start."""
    rows = seeds.numpy_rng(config.seed, "start").permutation(len(source.training))[:config.distill.m]
    x = source.training_images(rows).contiguous().numpy()
    return DistilledSet(x, np.zeros((len(x), 0), np.float32), "none", recipe("none", config), source.space)


def all_targets(config: Config, source: Source) -> DistilledSet:
    """Every training image with its target representation, and the run's own recipe."""
    return labelled_as("targets", config, source, np.arange(len(source.training)))


def recipe(kind: Literal["class", "none"], config: Config) -> dict[str, Any]:
    """The published recipe for sets with classes, or ours for sets without labels, as it is stored with a set; steps and images a step are
    the run's own."""
    own = {"steps": config.evaluate.pretrain.steps, "batch": config.evaluate.pretrain.batch}
    return PRETRAIN[kind].model_copy(update=own).recipe(LOSSES[kind])


def soft_recipe(steps: int) -> dict[str, Any]:
    """The published recipe for sets with soft labels, of so many steps; the learning rate rises in 500 of them, at most half."""
    published = PRETRAIN["soft"]
    changes = {"steps": steps, "warmup_steps": min(published.warmup_steps, steps // 2)}
    return published.model_copy(update=changes).recipe(LOSSES["soft"])

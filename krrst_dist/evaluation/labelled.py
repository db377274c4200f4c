"""A labelled data set in memory: what networks are fine-tuned, probed and tested on.

Knows nothing of files or of how a network was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from krrst_dist import seeds


@dataclass(frozen=True)
class LabelledImages:
    """uint8 images [n, C, H, W] and int64 labels [n] of the two splits, the channel statistics over the training pixels in
    [0, 1], and the number of classes. Raises ValueError for an empty split, one class, or labels outside the classes."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"the data set has {self.classes} class(es): telling classes apart takes at least 2; check its labels")
        for name, labels in (("training", self.train_labels), ("test", self.test_labels)):
            if len(labels) == 0:
                raise ValueError(f"the {name} split holds no images; it must hold at least one")
            check_labels(labels, self.classes, name)

    def validation(self, fraction: float = 0.1) -> LabelledImages:
        """The training split cut in two: `fraction` of every class, always the same images, takes the test split's place."""
        chosen = few_label_subset(self.train_labels, fraction, seed=0)
        rest = torch.ones(len(self.train_labels), dtype=torch.bool)
        rest[chosen] = False
        return replace(self, train_images=self.train_images[rest], train_labels=self.train_labels[rest],
                       test_images=self.train_images[chosen], test_labels=self.train_labels[chosen])

    def with_few_labels(self, fraction: float, seed: int) -> LabelledImages:
        """The same with a part of the training split, see `few_label_subset`."""
        if fraction == 1:
            return self
        chosen = few_label_subset(self.train_labels, fraction, seed)
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen])


def check_labels(labels: Tensor, classes: int, name: str) -> None:
    """Raises ValueError for labels outside 0 .. classes - 1."""
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"{name} labels run from {int(labels.min())} to {int(labels.max())}, but there are "
                         f"{classes} classes: labels must lie in 0 .. {classes - 1}; check the data set's labels")


def few_label_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices (int64, ascending) of a random subset with `fraction` of each class, at least one image a class.

    A smaller fraction of the same seed is a part of a larger one; 1 gives every index.
    """
    labels = labels.numpy()  # [n]
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        members = seeds.numpy_rng(seed, "few labels", label).permutation(members)
        chosen.append(members[:max(1, round(fraction * len(members)))])
    return torch.from_numpy(np.sort(np.concatenate(chosen)))

"""K-means: the real images nearest to the centres of clusters in an embedding (BASELINES 2).

The embedding is that of the self-supervised target network g_phi, whose representations of all images are there
already. Per class where the source has classes, over all images where it has none. Which embedding, rule and seed the
paper used is not known; these are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from krrst_dist import seeds
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, MethodSettings, Positive
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method, Read
from krrst_dist.methods.common.source import Source


class KMeansSettings(MethodSettings):
    """scikit-learn's MiniBatchKMeans; its settings are ours."""

    labels: Literal["class", "targets"] = "class"
    """what the images are trained on with: their classes, or target representations, which an unlabeled source has, too"""
    batch: Positive = 1024
    """images of a mini-batch"""
    starts: Positive = 3
    """random starts, of which the best is taken"""


def nearest_to_centres(features: np.ndarray, clusters: int, *, batch: int, starts: int, seed: int) -> np.ndarray:
    """Rows of `features` [n, d], int64 [clusters], all different: for one centre after the other the nearest row that is left."""
    found = MiniBatchKMeans(clusters, batch_size=batch, n_init=starts, random_state=seed % 2**32).fit(features)
    distance = ((features**2).sum(1)[:, None] - 2 * features @ found.cluster_centers_.T)  # [n, clusters], but for a constant of each centre
    chosen = np.empty(clusters, np.int64)
    for centre in range(clusters):
        chosen[centre] = distance[:, centre].argmin()
        distance[chosen[centre]] = np.inf
    return chosen


class KMeans(Method):
    """One chore a class, so that the classes can be clustered side by side."""

    title = "K-means"
    settings = KMeansSettings

    def needs_labels(self, settings: KMeansSettings) -> bool:
        """As labels only; the source is clustered class by class where it has classes."""
        return settings.labels == "class"

    def needs_targets(self, settings: KMeansSettings) -> bool:
        """As the embedding."""
        return True

    def measured(self, settings: KMeansSettings) -> bool:
        """As labels."""
        return settings.labels == "targets"

    def check(self, config: Config, *, training: int, classes: list[int] | None) -> None:
        """Are there enough images, of every class? Raises ConfigError."""
        real_images.check_enough(config, training, classes)

    def chores(self, config: Config, source: Source) -> Sequence[str]:
        """One a class."""
        return [f"seed-{config.seed}-class-{label}" for label in range(max(1, len(source.classes)))]

    def do(self, config: Config, source: Source, chore: str, *, device: torch.device, alive: Callable[[], None]) -> Mapping[str, Tensor]:
        """Rows of the training part that were chosen of a class, int64."""
        settings, label = config.distill, int(chore.rpartition("-")[2])
        members = source.classes[label] if source.classes else np.arange(len(source.training))
        wanted = int(real_images.shares(settings.m, max(1, len(source.classes)), config.seed)[label])
        if not wanted:
            return {"rows": torch.empty(0, dtype=torch.int64)}
        features = source.targets.look_up(source.training[members]).numpy()  # [n, k]
        chosen = nearest_to_centres(features, wanted, batch=settings.batch, starts=settings.starts,
                                    seed=seeds.derive(config.seed, "k-means", label))
        return {"rows": torch.from_numpy(members[chosen])}

    def start(self, config: Config, source: Source, read: Read) -> DistilledSet:
        """The images, class after class."""
        rows = np.concatenate([read(chore)["rows"].numpy() for chore in self.chores(config, source)])
        return real_images.labelled_as(config.distill.labels, config, source, rows)


METHOD = KMeans()

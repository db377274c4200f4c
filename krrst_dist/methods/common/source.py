"""The source that a method distils: its images, with their classes or target representations where it has them.

Knows files; no method.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from krrst_dist import seeds
from krrst_dist.artifacts import Space
from krrst_dist.config import Config
from krrst_dist.data.normalise import normalise
from krrst_dist.data.order import shard_indices
from krrst_dist.data.prefetch import Prefetcher
from krrst_dist.data.prepared import Prepared, held_out_split
from krrst_dist.data.reader import BetonReader, read_all
from krrst_dist.data.stream import Batches, ClassBatches, TargetedBatches
from krrst_dist.data.targets import TargetFile


@dataclass(frozen=True)
class Source:
    """Images, split into a training and a held-out part; `targets` for methods that need them."""

    prepared: Prepared
    targets: TargetFile | None
    training: np.ndarray  # int64 [n - h], places in the prepared data set
    held_out: np.ndarray  # int64 [h]

    @classmethod
    def open(cls, config: Config, manifest: Path, targets: Path | None) -> Source:
        """Open a prepared data set and, if there is one, its target side file. Raises DataError."""
        return cls.of(config, Prepared.open(manifest), targets)

    @classmethod
    def of(cls, config: Config, prepared: Prepared, targets: Path | None) -> Source:
        """The same of one that is open."""
        training, held_out = held_out_split(prepared.count, config.source.held_out, config.source.split_seed)
        return cls(prepared, targets and TargetFile.open(targets, prepared), training, held_out)

    def images(self, indices: np.ndarray) -> Tensor:
        """Normalised images [n, C, H, W] float32 at these places."""
        return normalise(read_all(self.prepared, indices)[0], self.prepared.mean, self.prepared.std)

    @property
    def space(self) -> Space:
        """The normalised space that its images live in."""
        return Space("normalised", self.prepared.mean, self.prepared.std)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of a labelled source."""
        return self.prepared.class_names or None

    @cached_property
    def labels(self) -> np.ndarray:
        """Of every training image, int64 [n - h]."""
        return self._in_memory[1]

    @cached_property
    def classes(self) -> tuple[np.ndarray, ...]:
        """The places of each class's training images within the training part, int64; empty for a source without labels."""
        if not self.prepared.labelled:
            return ()
        return tuple(np.flatnonzero(self.labels == label) for label in range(len(self.prepared.class_names)))

    def training_images(self, rows: np.ndarray) -> Tensor:
        """Normalised images [n, C, H, W] float32 of the training part, by their place in it. All of them are then kept, as bytes."""
        pixels = self._in_memory[0][torch.from_numpy(np.asarray(rows))]
        return normalise(pixels, self.prepared.mean, self.prepared.std)

    def some_of_class(self, label: int, count: int, *, seed: int, purpose: str, step: int) -> Tensor:
        """`count` different training images of a class, normalised [count, C, H, W]; all of them, where there are fewer."""
        members = self.classes[label]
        chosen = seeds.numpy_rng(seed, purpose, label, step).permutation(len(members))[:count]
        return self.training_images(members[chosen])

    def batches(self, labels: Literal["class", "targets"], config: Config, index: int, *, device: torch.device | str) -> Batches:
        """The real batches of logical shard `index` with their classes or target representations: distill.batch / distill.shards images
        each, of its own part of the training images. Needs those two settings."""
        settings, seed = config.distill, config.seed
        reader = Prefetcher(BetonReader(self.prepared, shard_indices(self.training, index, settings.shards, seed),
                                        batch=settings.batch // settings.shards, seed=seed, purpose_index=index,
                                        threads=config.engine.threads))
        if labels == "class":
            return ClassBatches(reader, self.prepared, device=device)
        return TargetedBatches(reader, self.targets, self.prepared, view_seed=config.source.split_seed, device=device)

    @cached_property
    def _in_memory(self) -> tuple[Tensor, np.ndarray]:
        return read_all(self.prepared, self.training)

"""What the meta-gradient reads: (X_b, Y_b), normalised images with their stored target representations, or with their classes.

Puts a reader and a target file together. The teacher does not run here. Knows nothing of the algorithm.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from krrst_dist.augment.views import crop_flip
from krrst_dist.config import ConfigError
from krrst_dist.data.normalise import normalise
from krrst_dist.data.order import State
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import Reader
from krrst_dist.data.targets import TargetFile


class Batches:
    """The endless sequence of a reader's batches; its position is the reader's."""

    def __init__(self, reader: Reader, prepared: Prepared, *, device: torch.device | str = "cpu") -> None:
        """device: where images are normalised and batches handed out: pixels travel as bytes."""
        self._reader, self._prepared, self._device = reader, prepared, device

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 [b, C, H, W] -> float32 on the device."""
        return normalise(images.to(self._device), self._prepared.mean, self._prepared.std)

    def state(self) -> State:
        return self._reader.state()

    def restore(self, state: State) -> None:
        self._reader.restore(state)

    def close(self) -> None:
        self._reader.close()


class ClassBatches(Batches):
    """Images with their classes, centred."""

    def next(self) -> tuple[Tensor, Tensor]:
        """X_b float32 [b, C, H, W], normalised, channels_last; Y_b float32 [b, classes], `centred`."""
        batch = self._reader.next()
        y = torch.from_numpy(centred(batch.labels, len(self._prepared.class_names)))
        return self.normalised(batch.images), y.to(self._device)


def centred(labels: np.ndarray, classes: int) -> np.ndarray:
    """One-hot - 1 / classes: [n] -> [n, classes] float32."""
    return np.eye(classes, dtype=np.float32)[labels] - np.float32(1 / classes)


class TargetedBatches(Batches):
    """Images with their target representations.

    Where views are stored, image i is seen in view (i + e) mod views in epoch e: all of them in turn.
    """

    def __init__(self, reader: Reader, targets: TargetFile, prepared: Prepared, *, view_seed: int,
                 device: torch.device | str = "cpu") -> None:
        """Raises ConfigError when the targets' views were made with another seed."""
        if targets.views and targets.view_seed != view_seed:
            raise ConfigError(f"view_seed = {view_seed}: the views in {targets.path} were made with {targets.view_seed}; use that")
        super().__init__(reader, prepared, device=device)
        self._targets = targets

    def next(self) -> tuple[Tensor, Tensor]:
        """X_b float32 [b, C, H, W], normalised, channels_last; Y_b float32 [b, k]."""
        epoch = self._reader.state()["epoch"]
        batch = self._reader.next()
        images, view = batch.images, None
        if self._targets.views:
            view = (batch.index + epoch) % self._targets.views  # int64 [b]
            images = crop_flip(images, torch.from_numpy(batch.index), torch.from_numpy(view), seed=self._targets.view_seed)
        y = self._targets.look_up(batch.index, view)
        return self.normalised(images), y.to(self._device)

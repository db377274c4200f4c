"""Gaussian: noise instead of images, the control of data-free knowledge distillation (METHOD 4, BASELINES 1).

The paper's row draws new noise for every batch and does not pre-train, which the grid does by itself where there is no
set (`make: nothing`). This one is a fixed set of noise images, for whatever else takes a distilled set.
"""

from __future__ import annotations

import numpy as np

from krrst_dist import seeds
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, MethodSettings
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method, Read
from krrst_dist.methods.common.source import Source


class GaussianSettings(MethodSettings):
    """Nothing to tune."""


class Gaussian(Method):
    """m images of N(0, 1) noise in the source's normalised space, with soft labels that tell nothing."""

    title = "Gaussian"
    settings = GaussianSettings

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """The noise; each label is 0 for every class, centred as KIP's and FRePo's are."""
        m, side = config.distill.m, source.prepared.resolution
        x = seeds.numpy_rng(config.seed, "Gaussian images").standard_normal((m, 3, side, side), dtype=np.float32)
        y = np.zeros((m, max(1, len(source.class_names or ()))), np.float32)
        return DistilledSet(x, y, "soft", real_images.soft_recipe(config.evaluate.pretrain.steps), source.space, source.class_names)


METHOD = Gaussian()

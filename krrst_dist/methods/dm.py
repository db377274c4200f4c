"""DM: distribution matching (Zhao and Bilen, 2023; BASELINES 4).

In every step a fresh random network psi, whose weights are never trained, embeds real and synthetic images of each
class; their mean embeddings are to be equal.
"""

from __future__ import annotations

from typing import Annotated

import torch
import tyro
from pydantic import Field
from torch import Tensor

from krrst_dist import seeds
from krrst_dist.config import Positive
from krrst_dist.methods.common.class_wise import ClassWise, ClassWisePart, ClassWiseSettings, network_of


class DMSettings(ClassWiseSettings):
    """The published values for CIFAR-100, 10 images a class."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 20_000
    """outer steps, each with a network of its own"""
    lr_x: Annotated[float, Field(gt=0)] = 1.0
    """SGD's learning rate for X_s, in the normalised space"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5


def mean_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """|| mean of real [n, d] - mean of synthetic [n', d] ||^2, a scalar."""
    return (real.mean(0) - synthetic.mean(0)).square().sum()


class DMPart(ClassWisePart):
    """Some classes, under each step's network. Nothing is left between steps."""

    def begin(self, step: int) -> None:
        """The step's network, the same one in every shard."""
        with seeds.seeded(self.config.seed, "DM network", step):
            self._psi = network_of(self.config).to(self.device).requires_grad_(False)

    def term(self, label: int, synthetic: Tensor, real: Tensor) -> Tensor:
        """Squared distance of mean embeddings."""
        with torch.no_grad():
            embedded = self._psi(real)
        return mean_distance(self._psi(synthetic), embedded)


class DM(ClassWise):
    """Distribution matching."""

    title = "DM"
    settings = DMSettings
    shard = DMPart


METHOD = DM()

"""What one meta-update computes, moves and holds, counted from a preset's networks and sizes. Nothing is run: tensors have shapes only.

An operation is half a multiply-add, as in `measure.operations`; bytes are of float32. L is what a pool model's layers keep for the
way back. What the engine adds is not counted but measured (`overhead.py`); `Overhead` is what is learnt from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from krrst_dist import networks
from krrst_dist.bench import measure
from krrst_dist.config import Config

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Cost:
    """Of one shard's part of an update, S shards in all.

    train: the pool model's step, which is not shared by slices. real, synthetic: features of b / S images, and features and
    vector-Jacobian products of m. ridge: the head and its gradient. All in operations.
    learned, weights, features: bytes of X_s and Y_s, of f_w, and of the features of the m + b / S images.
    activations: bytes that the pool model's step keeps. pool: bytes of l models with their momenta.
    """

    train: float
    real: float
    synthetic: float
    ridge: float
    learned: int
    weights: int
    features: int
    activations: int
    pool: int

    @property
    def operations(self) -> float:
        """Of the whole update."""
        return self.train + self.real + self.synthetic + self.ridge

    @classmethod
    def of(cls, config: Config, *, shards: int) -> Cost:
        """Of KRR-ST with a preset's sizes."""
        settings, resolution = config.distill, config.source.resolution
        m, b = settings.m, settings.batch / shards
        with torch.device("meta"):
            network, k = _build(config), _target_width(config)
            model = networks.with_head(network, k)
        d = network.feature_dim + 1
        forward = measure.operations(lambda: network(_images(1, resolution)))
        train = measure.operations(lambda: model(_images(2, resolution)).sum().backward()) / 2
        back = measure.operations(lambda: _vector_jacobian(network, resolution)) - forward
        again = forward if settings.chunk_size else 0.0
        parameters = sum(value.numel() for value in model.parameters())
        return cls(
            train=m * train, real=b * forward, synthetic=m * (forward + back + again), ridge=_ridge(m, b, d, k),
            learned=m * (3 * resolution**2 + k) * FLOAT, weights=sum(value.numel() for value in network.state_dict().values()) * FLOAT,
            features=int((m + b) * (d - 1) * FLOAT), activations=int(m * _kept(model, resolution)),
            pool=settings.pool.size * 2 * parameters * FLOAT)


class Measured(Protocol):
    """Seconds that updates took beyond serial ones. size: bytes of X_s and Y_s."""

    size: int
    actors: int
    seconds: list[float]


@dataclass(frozen=True)
class Overhead:
    """What the engine adds to an update: seconds = start + actor * G + bytes * (byte + byte_actor * G), all at least 0."""

    start: float
    actor: float
    byte: float
    byte_actor: float

    def seconds(self, size: int, actors: int) -> float:
        """Of an update, for `size` bytes of X_s and Y_s."""
        return self.start + self.actor * actors + size * (self.byte + self.byte_actor * actors)

    @classmethod
    def fit(cls, measured: Sequence[Measured]) -> Overhead:
        """Least squares of relative deviations."""
        median = np.array([np.median(one.seconds) for one in measured])
        columns = np.array([[1, one.actors, one.size, one.size * one.actors] for one in measured], np.float64)
        found, _ = nnls(columns / median[:, None], np.ones(len(median)))
        return cls(*(float(value) for value in found))


def _ridge(m: float, b: float, d: int, k: int) -> float:
    """K and its factor, A and V, W and the error, G, and the three products of dL/dF."""
    n = min(m, d)
    return 2 * n * m * d + n**3 / 3 + 2 * 2 * n**2 * k + 2 * m * d * k + 2 * 2 * b * d * k + 2 * m * d * k + 3 * 2 * m * d * k


def _kept(model: nn.Module, resolution: int) -> float:
    """Bytes an image that a training step keeps for the way back, parameters left out."""
    own = {value.untyped_storage()._cdata for value in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage()._cdata not in own:
            kept[value.untyped_storage()._cdata] = value
        return value

    images = 2
    with saved_tensors_hooks(keep, lambda value: value):
        model.train()(_images(images, resolution))
    return sum(value.untyped_storage().nbytes() for value in kept.values()) / images


def _vector_jacobian(network: nn.Module, resolution: int) -> None:
    leaf = _images(1, resolution).requires_grad_()
    out = network.requires_grad_(False).eval()(leaf)
    torch.autograd.grad(out, leaf, torch.empty_like(out))
    network.requires_grad_(True)


def _images(n: int, resolution: int) -> torch.Tensor:
    return torch.empty(n, 3, resolution, resolution, device="meta")


def _build(config: Config) -> nn.Module:
    settings = config.distill.pool.network
    return networks.build(settings.name, resolution=config.source.resolution, **settings.options())


def _target_width(config: Config) -> int:
    settings = config.target.network
    return networks.build(settings.name, resolution=config.source.resolution, **settings.options()).feature_dim

"""One shard's meta-gradient shared by P processes: the same numbers as the shard's own `contribute` with slices = P, in three acts.

    features     each slice: its rows of X_s and X_b through the drawn model  ->  f_syn, f_real
    solve        the shard: all rows' features  ->  loss, dL/dfeatures, dL/dY_s
    pull back    each slice: its rows of dL/dfeatures  ->  its rows of dL/dX_s

The process of the shard keeps the pool, trains it, and does slice 0 (`SlicedShard`); a further `Slice` has a network to put the drawn
model's weights into, and reads the shard's batches for itself. Knows nothing of how weights and features travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from krrst_dist.algorithm.meta_gradient import Pullable, cut, head_gradient, real_features
from krrst_dist.algorithm.pool import DivergedError, State
from krrst_dist.algorithm.precision import Precision, arithmetic
from krrst_dist.algorithm.shard import RealBatches, Shard, on_device

Features = tuple[Tensor, Tensor]
"""f_syn [about m / P, d] and f_real [about b / P, d] of one slice"""


@dataclass(frozen=True)
class Solved:
    """A shard's contribution but for dL/dX_s [m, C, H, W], for which each slice needs its part of dL/dfeatures."""

    loss: float
    y: Tensor  # dL/dY_s [m, k]
    images: int
    retries: int
    g_features: tuple[Tensor, ...]  # P of about [m / P, d]


class _Rows:
    """Slice number p of P: what every slice does with a network."""

    def __init__(self, p: int, slices: int, *, chunk_size: int | None, precision: Precision, device: torch.device) -> None:
        self._p, self._slices, self._chunk_size = p, slices, chunk_size
        self._precision, self._device = precision, device
        self._pullable: Pullable | None = None

    def features(self, extractor: nn.Module, x_syn: Tensor, x_real: Tensor) -> Features:
        with arithmetic(self._precision, self._device):
            self._pullable = Pullable(extractor, self._mine(x_syn), self._chunk_size)
            return self._pullable.features, real_features(extractor, self._mine(x_real), chunk_size=self._chunk_size)

    def pull_back(self, g_features: Tensor) -> Tensor:
        pullable, self._pullable = self._pullable, None
        with arithmetic(self._precision, self._device):
            g = pullable.pull_back(g_features.to(self._device))
        if not torch.isfinite(g).all():
            raise DivergedError("the gradient of X_s is not finite; a learning rate is too high (distill.lr_x, distill.lr_y, "
                                "distill.pool.lr)")
        return g

    def _mine(self, rows: Tensor) -> Tensor:
        parts = cut(rows, self._slices)
        return parts[self._p] if self._p < len(parts) else rows[:0]


class Slice:
    """Slice p > 0 of a shard. network: f_w, whatever its weights; batches: the shard's own, read here once more."""

    def __init__(self, p: int, slices: int, network: nn.Module, batches: RealBatches, *, chunk_size: int | None = None,
                 precision: Precision = "float32", device: torch.device | str = "cpu") -> None:
        self._network, self.batches, self._device = network, batches, torch.device(device)
        self._rows = _Rows(p, slices, chunk_size=chunk_size, precision=precision, device=self._device)

    def features(self, weights: State, x_syn: Tensor) -> Features:
        """Features of its rows under the drawn model; the next batch is read. weights: as `SlicedShard.weights` gives them."""
        self._network.load_state_dict(weights)
        x_real, _ = self.batches.next()
        return self._rows.features(self._network, on_device(x_syn, self._device), on_device(x_real, self._device))

    def pull_back(self, g_features: Tensor) -> Tensor:
        """Its rows of dL/dX_s. Raises DivergedError when they are not finite."""
        return self._rows.pull_back(g_features)


class SlicedShard:
    """A shard whose meta-gradients are shared: it does slice 0, and what is not shared."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._rows = _Rows(0, shard.slices, chunk_size=shard.chunk_size, precision=shard.precision, device=shard.device)

    def weights(self, step: int) -> State:
        """Of the model drawn for the update: parameters and statistics of f_w."""
        return {name: value.detach() for name, value in self._shard.extractor(step).state_dict().items()}

    def features(self, step: int, x_syn: Tensor) -> Features:
        """Features of slice 0; the next batch is read."""
        shard = self._shard
        x_real, self._y_real, _ = shard.real_batch(step)
        return self._rows.features(shard.extractor(step), shard.images(x_syn), x_real)

    def solve(self, step: int, y_syn: Tensor, features: Sequence[Features]) -> Solved:
        """The ridge head and its gradients. y_syn: Y_s [m, k]; features: of all P slices, in order.

        Raises DivergedError when something is not finite, RidgeError when the ridge system cannot be factorised.
        """
        shard, y_real = self._shard, self._y_real
        f_syn, f_real = (torch.cat([rows.to(shard.device) for rows in parts]) for parts in zip(*features, strict=True))
        with shard.named(f"update {step}"):
            loss, g, g_y, retries = head_gradient(f_syn, y_syn.to(shard.device), f_real, y_real, shard.ridge, shard.objective)
            shard.check_finite(step, loss.item(), g, g_y)
        parts = cut(g, shard.slices)
        return Solved(loss.item(), g_y, len(y_real), retries, (*parts, *(g[:0] for _ in range(shard.slices - len(parts)))))

    def pull_back(self, step: int, g_features: Tensor) -> Tensor:
        """Slice 0's rows of dL/dX_s. Raises DivergedError when they are not finite."""
        with self._shard.named(f"update {step}"):
            return self._rows.pull_back(g_features)

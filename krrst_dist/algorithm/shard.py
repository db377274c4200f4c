"""One logical shard: its pool, its real batches, and its part of a meta-update.

The same object serves the serial loop and a Ray worker; it knows neither how many shards there are nor where it
runs. Everything it draws is a pure function of (seed, shard, step), so its state is its pool and its reader's position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from krrst_dist.algorithm.contribution import Contribution
from krrst_dist.algorithm.meta_gradient import Objective, meta_gradient, real_features
from krrst_dist.algorithm.pool import DivergedError, ModelPool, State
from krrst_dist.algorithm.precision import Precision, arithmetic
from krrst_dist.algorithm.ridge import FeaturesError, RidgeError


class RealBatches(Protocol):
    """An endless stream of real images with their target representations that can be saved and restored."""

    def next(self) -> tuple[Tensor, Tensor]:
        """x_real [b, C, H, W] and y_real [b, k]."""

    def state(self) -> dict[str, int]:
        """The position of the next batch."""

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a position."""


@dataclass(frozen=True)
class _Ahead:
    """The real batch of an update that is still to come, and the position from which it was read. f_real: where it could be known."""

    step: int
    position: dict[str, int]
    x_real: Tensor
    y_real: Tensor
    f_real: Tensor | None


def on_device(images: Tensor, device: torch.device) -> Tensor:
    """Images [n, C, H, W] as networks take them."""
    return images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)


class Shard:
    """Pool and batches of one logical shard on one device.

    slices: P, parts that the images pass a network in; as many processes can share the work of a meta-gradient (`slices.py`).
    """

    def __init__(self, index: int, pool: ModelPool, batches: RealBatches, *, ridge: float = 1e-6, chunk_size: int | None = None,
                 slices: int = 1, precision: Precision = "float32", device: torch.device | str = "cpu",
                 objective: Objective | None = None) -> None:
        self.index, self.pool, self.batches, self.slices = index, pool, batches, slices
        self.ridge, self.chunk_size, self.device = ridge, chunk_size, torch.device(device)
        self.precision, self.objective = precision, objective
        self._ahead: _Ahead | None = None

    def warm_up(self, x_syn: Tensor, y_syn: Tensor) -> None:
        """Train the pool's members to their starting ages on (X_s, Y_s). Raises DivergedError."""
        with arithmetic(self.precision, self.device), self.named("warm-up"):
            self.pool.warm_up(self.images(x_syn), y_syn.to(self.device))

    def contribute(self, step: int, x_syn: Tensor, y_syn: Tensor) -> Contribution:
        """The meta-gradient of meta-update `step` on this shard's model and next real batch.

        Raises DivergedError when it is not finite, RidgeError when the ridge system cannot be factorised.
        """
        x_real, y_real, f_real = self.real_batch(step)
        with arithmetic(self.precision, self.device), self.named(f"update {step}"):
            g = meta_gradient(self.extractor(step), self.images(x_syn), y_syn.to(self.device), x_real, y_real, ridge=self.ridge,
                              chunk_size=self.chunk_size, slices=self.slices, f_real=f_real, objective=self.objective)
            loss = g.loss.item()
            self.check_finite(step, loss, g.x, g.y)
            return Contribution(loss, (g.x, g.y), len(x_real), g.retries)

    def look_ahead(self, step: int) -> None:
        """Do what of `contribute(step)` does not depend on what step - 1 changes: read, and compute the real images' features, unless
        their network is the one that is about to be trained."""
        position = self.batches.state()
        x_real, y_real = self._read()
        f_real = None
        if step and self.pool.draw(step) != self.pool.draw(step - 1):
            with arithmetic(self.precision, self.device):
                f_real = real_features(self.extractor(step), x_real, chunk_size=self.chunk_size, slices=self.slices)
        self._ahead = _Ahead(step, position, x_real, y_real, f_real)

    def real_batch(self, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """X_b [b, C, H, W], Y_b [b, k] of the update, and the features of X_b where they are known already."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return *self._read(), None
        if ahead.step != step:
            raise ValueError(f"shard {self.index} was to look ahead at update {ahead.step} and is asked for {step}")
        return ahead.x_real, ahead.y_real, ahead.f_real

    def extractor(self, step: int) -> nn.Module:
        """f_w of the update: images [n, C, H, W] -> features [n, d]."""
        return self.pool.members[self.pool.draw(step)].extractor

    def check_finite(self, step: int, loss: float, *gradients: Tensor) -> None:
        """Raise DivergedError when the loss of an update, or a gradient, is not finite."""
        if not (math.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)):
            raise DivergedError(f"loss {loss:g} on pool member {self.pool.draw(step)}, or its gradient, is not finite; a learning rate is "
                                f"too high (distill.lr_x, distill.lr_y, distill.pool.lr), or the target representations are not finite")

    def advance(self, step: int, x_syn: Tensor, y_syn: Tensor) -> None:
        """Age the model that was used at `step`, on the updated (X_s, Y_s). Raises DivergedError."""
        with arithmetic(self.precision, self.device), self.named(f"update {step}"):
            self.pool.advance(self.pool.draw(step), self.images(x_syn), y_syn.to(self.device))

    def check(self, step: int | None) -> None:
        """Raise DivergedError where the pool, after update `step` (None: after its warm-up), cannot be gone on with."""
        with self.named("warm-up" if step is None else f"update {step}"):
            self.pool.check()

    def signs(self) -> int:
        """Training steps that the pool's members have had."""
        return sum(member.steps for member in self.pool.members)

    def state_dict(self) -> tuple[State, dict[str, int]]:
        """The pool's tensors and the reader's position."""
        return self.pool.state_dict(), self._ahead.position if self._ahead else self.batches.state()

    def load_state_dict(self, pool: State, position: dict[str, int]) -> None:
        """Go on exactly where `state_dict()` was taken."""
        self.pool.load_state_dict(pool)
        self.batches.restore(position)
        self._ahead = None

    def images(self, x: Tensor) -> Tensor:
        """Images as the networks take them."""
        return on_device(x, self.device)

    def _read(self) -> tuple[Tensor, Tensor]:
        x_real, y_real = self.batches.next()
        return self.images(x_real), y_real.to(self.device)

    @contextmanager
    def named(self, when: str) -> Iterator[None]:
        """What goes wrong inside says when and in which shard."""
        try:
            yield
        except (DivergedError, RidgeError) as error:
            rates = " (distill.pool.lr for networks, distill.lr_x and distill.lr_y for images)" if isinstance(error, FeaturesError) else ""
            raise type(error)(f"{when}, shard {self.index}: {error}{rates}") from None

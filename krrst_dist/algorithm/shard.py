"""One logical shard: its pool, its real batches, and its part of a meta-update.

The same object serves the serial loop and a Ray worker; it knows neither how many shards there are nor where it
runs. Everything it draws is a pure function of (seed, shard, step), so its state is its pool and its reader's position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor

from krrst_dist.algorithm.contribution import Contribution
from krrst_dist.algorithm.meta_gradient import Objective, meta_gradient
from krrst_dist.algorithm.pool import DivergedError, ModelPool, State
from krrst_dist.algorithm.ridge import FeaturesError, RidgeError


class RealBatches(Protocol):
    """An endless stream of real images with their target representations that can be saved and restored."""

    def next(self) -> tuple[Tensor, Tensor]:
        """x_real [b, C, H, W] and y_real [b, k]."""

    def state(self) -> dict[str, int]:
        """The position of the next batch."""

    def restore(self, state: dict[str, int]) -> None:
        """Go on from a position."""


class Shard:
    """Pool and batches of one logical shard on one device."""

    def __init__(self, index: int, pool: ModelPool, batches: RealBatches, *, ridge: float = 1e-6, chunk_size: int | None = None,
                 precision: Literal["float32", "tf32", "bfloat16"] = "float32", device: torch.device | str = "cpu",
                 objective: Objective | None = None) -> None:
        self.index, self.pool, self.batches = index, pool, batches
        self._ridge, self._chunk_size, self._device = ridge, chunk_size, torch.device(device)
        self._precision, self._objective = precision, objective

    def warm_up(self, x_syn: Tensor, y_syn: Tensor) -> None:
        """Train the pool's members to their starting ages on (X_s, Y_s). Raises DivergedError."""
        with self._arithmetic(), self._named("warm-up"):
            self.pool.warm_up(self._images(x_syn), y_syn.to(self._device))

    def contribute(self, step: int, x_syn: Tensor, y_syn: Tensor) -> Contribution:
        """The meta-gradient of meta-update `step` on this shard's model and next real batch.

        Raises DivergedError when it is not finite, RidgeError when the ridge system cannot be factorised.
        """
        x_real, y_real = self.batches.next()
        member = self.pool.draw(step)
        with self._arithmetic(), self._named(f"update {step}"):
            g = meta_gradient(self.pool.members[member].extractor, self._images(x_syn), y_syn.to(self._device),
                              self._images(x_real), y_real.to(self._device), ridge=self._ridge, chunk_size=self._chunk_size,
                              objective=self._objective)
            loss = g.loss.item()
            if not (torch.isfinite(g.loss) and torch.isfinite(g.x).all() and torch.isfinite(g.y).all()):
                raise DivergedError(f"loss {loss:g} on pool member {member}, or its gradient, is not finite; a learning rate is too high "
                                    f"(distill.lr_x, distill.lr_y, distill.pool.lr), or the target representations are not finite")
            return Contribution(loss, (g.x, g.y), len(x_real), g.retries)

    def advance(self, step: int, x_syn: Tensor, y_syn: Tensor) -> None:
        """Age the model that was used at `step`, on the updated (X_s, Y_s). Raises DivergedError."""
        with self._arithmetic(), self._named(f"update {step}"):
            self.pool.advance(self.pool.draw(step), self._images(x_syn), y_syn.to(self._device))

    def check(self, step: int | None) -> None:
        """Raise DivergedError where the pool, after update `step` (None: after its warm-up), cannot be gone on with."""
        with self._named("warm-up" if step is None else f"update {step}"):
            self.pool.check()

    def signs(self) -> int:
        """Training steps that the pool's members have had."""
        return sum(member.steps for member in self.pool.members)

    def state_dict(self) -> tuple[State, dict[str, int]]:
        """The pool's tensors and the reader's position."""
        return self.pool.state_dict(), self.batches.state()

    def load_state_dict(self, pool: State, position: dict[str, int]) -> None:
        """Go on exactly where `state_dict()` was taken."""
        self.pool.load_state_dict(pool)
        self.batches.restore(position)

    def _images(self, x: Tensor) -> Tensor:
        return x.to(self._device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    @contextmanager
    def _named(self, when: str) -> Iterator[None]:
        """What goes wrong inside says when and in which shard."""
        try:
            yield
        except (DivergedError, RidgeError) as error:
            rates = " (distill.pool.lr for networks, distill.lr_x and distill.lr_y for images)" if isinstance(error, FeaturesError) else ""
            raise type(error)(f"{when}, shard {self.index}: {error}{rates}") from None

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The asked-for precision inside, the process's own outside. Convolutions only: ridge regression stays float32.

        Weights are cast anew at every use: they change while we are inside."""
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = self._precision == "tf32"
        try:
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision == "bfloat16", cache_enabled=False):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

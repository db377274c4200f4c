"""What one logical shard adds to an outer step, and the two ways to add up what all of them do.

Knows gradients; not what they are gradients of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Contribution:
    """A shard's part of one outer step.

    gradients: of the loss with respect to each learned tensor, like them and in their order, on the shard's device. images: real
    images that went into it. retries: ridge factorisations that failed.
    """

    loss: float
    gradients: tuple[Tensor, ...]
    images: int
    retries: int = 0


def mean(parts: Sequence[Contribution]) -> Contribution:
    """The loss is a mean over real images, of which each shard has its own: sum over s, in shard order, of (b_s / b) * part_s."""
    images = sum(part.images for part in parts)
    return _weighted(parts, [part.images / images for part in parts])


def total(parts: Sequence[Contribution]) -> Contribution:
    """The loss is a sum of which each shard has its own terms: part_s added up in shard order."""
    return _weighted(parts, [1.0] * len(parts))


def _weighted(parts: Sequence[Contribution], weights: Sequence[float]) -> Contribution:
    loss, gradients = parts[0].loss * weights[0], [g * weights[0] for g in parts[0].gradients]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        loss = loss + weight * part.loss
        gradients = [value + weight * g for value, g in zip(gradients, part.gradients, strict=True)]
    return Contribution(loss, tuple(gradients), sum(part.images for part in parts), sum(part.retries for part in parts))

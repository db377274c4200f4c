"""The neural tangent kernel of infinitely wide networks, and its gradient with respect to the images (BASELINES 7).

Two architectures: fully connected, and convolutions with average pools in between. Of a pair of images the convolutional recursion
takes pairs of pixels (p, p + d); only offsets d that some pool brings together in the end are there, [-7, 7]^2 for three pools.
A kernel matrix is computed in blocks of image pairs, and its gradient computes each block again, so that memory is bounded by a
block and not by the matrix. Knows images and matrices; no labels and no loss.

Shapes: n and n' images of [C, H, W]; R the largest offset, D = 2 R + 1 offsets along an axis; v deviations of an image. S is the
covariance of two images' pre-activations or activations, Theta their tangent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT = 2.0
"""variance of the weights, times their fan-in"""
BIAS = 0.01
"""variance of the biases"""


class Architecture(Protocol):
    """An infinitely wide network with one output."""

    def numbers(self, shape: Sequence[int]) -> int:
        """Numbers that the largest layer has for a pair of images [C, H, W]."""

    def deviations(self, x: Tensor) -> Tensor:
        """Standard deviations of each image's pre-activations in each layer with a ReLU: x [n, C, H, W] -> [n, v]."""

    def kernel(self, x: Tensor, deviations: Tensor, other: Tensor, others: Tensor) -> Tensor:
        """K [n, n'] of images x [n, C, H, W] and other [n', C, H, W], given the deviations [n, v], [n', v] of both."""


@dataclass(frozen=True)
class FullyConnected:
    """So many hidden layers with ReLU."""

    depth: int

    def numbers(self, shape: Sequence[int]) -> int:
        return 1

    def deviations(self, x: Tensor) -> Tensor:
        first = WEIGHT * x.flatten(1).square().mean(1) + BIAS  # [n]
        later = [first]
        while len(later) < self.depth:
            later.append(WEIGHT * later[-1] / 2 + BIAS)
        return torch.stack(later, 1).sqrt()

    def kernel(self, x: Tensor, deviations: Tensor, other: Tensor, others: Tensor) -> Tensor:
        s = x.flatten(1) @ other.flatten(1).T / x[0].numel()  # [n, n']
        theta = torch.zeros_like(s)
        for a, b in zip(deviations.unbind(1), others.unbind(1), strict=True):
            s, theta = _dense(s, theta)
            s, theta = _Rectified.apply(s, theta, a[:, None], b[None], torch.ones_like(b[None]))
        return _dense(s, theta)[1]


@dataclass(frozen=True)
class Convolutional:
    """3x3 convolutions with ReLU; pooled: is each one followed by a 2x2 average pool? Then a dense layer on all pixels."""

    pooled: tuple[bool, ...]

    @property
    def reach(self) -> int:
        """R, the largest offset of two input pixels that meet in the output: 0 at the end, and 2 R + 1 before every pool."""
        return 2 ** sum(self.pooled) - 1

    def numbers(self, shape: Sequence[int]) -> int:
        return shape[-2] * shape[-1] * (2 * self.reach + 1) ** 2

    def deviations(self, x: Tensor) -> Tensor:
        reach, found = self.reach, []
        s = (x[..., None, None] * _shifted(x, reach)).mean(1)  # [n, H, W, D, D], each image with itself
        for pool in self.pooled:
            s = WEIGHT * _neighbours(s) + BIAS
            a = s[..., reach, reach].sqrt()  # [n, H, W]
            found.append(a.flatten(1))
            s, _ = _Rectified.apply(s, None, a[..., None, None], _shifted(a, reach, 1.0), _inside(a, reach))
            if pool:
                s, reach = _pool(s), reach // 2
        return torch.cat(found, 1)

    def kernel(self, x: Tensor, deviations: Tensor, other: Tensor, others: Tensor) -> Tensor:
        reach, sizes = self.reach, self._sizes(*x.shape[-2:])
        s, theta = _covariance(x, _shifted(other, reach)), None  # [n, n', H, W, D, D]
        for pool, size, a, b in zip(self.pooled, sizes, *(self._maps(values, sizes) for values in (deviations, others)), strict=True):
            s = WEIGHT * _neighbours(s) + BIAS
            theta = s if theta is None else s + WEIGHT * _neighbours(theta)
            inside = _inside(x.new_empty(size), reach)
            s, theta = _Rectified.apply(s, theta, a[:, None, :, :, None, None], _shifted(b, reach, 1.0)[None], inside)
            if pool:
                s, theta, reach = _pool(s), _pool(theta), reach // 2
        return _dense(*(values.mean((2, 3, 4, 5)) for values in (s, theta)))[1]  # of each pixel with itself

    def _sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Of each layer's map."""
        pools = [sum(self.pooled[:i]) for i in range(len(self.pooled))]
        return [(height >> done, width >> done) for done in pools]

    def _maps(self, deviations: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        """[n, v] -> [n, H, W] of each layer."""
        parts = deviations.split([height * width for height, width in sizes], 1)
        return [part.unflatten(1, size) for part, size in zip(parts, sizes, strict=True)]


def ntk(architecture: Architecture, x: Tensor, other: Tensor | None = None, *, block: int = 2**20,
        alive: Callable[[], None] = lambda: None) -> Tensor:
    """K(x, other) [n, n'], or K(x, x) [n, n], of which half is computed. Not differentiable: see `ntk_pull_back`.

    x: [n, C, H, W]; other: [n', C, H, W] or None. block: numbers of a layer that are held at once, at least one pair's. alive: called
    after each block.
    """
    with torch.no_grad():
        sides = _Sides(architecture, x, other, block)
        k = x.new_zeros(len(x), len(sides.other))
        for rows, columns in sides.blocks():
            k[rows, columns] = architecture.kernel(*sides.first(rows), *sides.second(columns))
            alive()
    return k if other is not None else k.triu() + k.triu(1).T


def ntk_pull_back(architecture: Architecture, x: Tensor, g: Tensor, other: Tensor | None = None, *, block: int = 2**20,
                  alive: Callable[[], None] = lambda: None) -> Tensor:
    """From g = dL/dK(x, other) [n, n'] or dL/dK(x, x) [n, n] to dL/dx [n, C, H, W]; other is a constant. Arguments as of `ntk`."""
    sides = _Sides(architecture, x, other, block)
    g_x, g_deviations = torch.zeros_like(x), torch.zeros_like(sides.deviations)
    if other is None:
        g = torch.triu(g + g.T, 1) + torch.diag(g.diagonal())
    for rows, columns in sides.blocks():
        leaves = [value.detach().requires_grad_() for value in sides.first(rows)]
        second = [value.detach().requires_grad_(other is None) for value in sides.second(columns)]
        wanted = leaves + second if other is None else leaves
        found = torch.autograd.grad(architecture.kernel(*leaves, *second), wanted, g[rows, columns])
        for place, parts in ((rows, found[:2]), (columns, found[2:])):  # of the columns there is nothing, where they are constants
            for total, part in zip((g_x, g_deviations), parts, strict=False):
                total[place] += part
        alive()
    for rows in sides.images(x):
        leaf = x[rows].detach().requires_grad_()
        g_x[rows] += torch.autograd.grad(architecture.deviations(leaf), leaf, g_deviations[rows])[0]
    return g_x


class _Sides:
    """The two sets of images of a kernel matrix, with their deviations, and its blocks. other: None is x again."""

    def __init__(self, architecture: Architecture, x: Tensor, other: Tensor | None, block: int) -> None:
        self._architecture, self._pairs = architecture, max(1, block // architecture.numbers(x.shape[1:]))
        self._upper = other is None
        self._x, self.deviations = x, self._all_deviations(x)
        self.other, self._others = (x, self.deviations) if other is None else (other, self._all_deviations(other))

    def first(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Images and deviations of these rows."""
        return self._x[rows], self.deviations[rows]

    def second(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Images and deviations of these columns."""
        return self.other[columns], self._others[columns]

    def images(self, x: Tensor) -> Iterator[slice]:
        """As many of x at a time as there are pairs in a block."""
        return (slice(i, min(i + self._pairs, len(x))) for i in range(0, len(x), self._pairs))

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of as many pairs; of K(x, x) the upper triangle. Long columns: what is shifted is the columns' images."""
        width = max(1, self._pairs // len(self._x))
        for start in range(0, len(self.other), width):
            columns = slice(start, min(start + width, len(self.other)))
            for rows in self.images(self._x[:columns.stop] if self._upper else self._x):
                yield rows, columns

    def _all_deviations(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._architecture.deviations(x[rows]) for rows in self.images(x)])


class _Rectified(torch.autograd.Function):
    """S and Theta after ReLU. s, theta: before it (theta may be None); a, b: deviations of both sides, above 0; inside: 1, or 0 for what is
    to be 0 after it. The last three broadcast.

    With r = S / (a b) = cos t: S <- a b (sin t + (pi - t) cos t) / (2 pi), Theta <- Theta (pi - t) / (2 pi). At r = 1, where two patches
    are alike, the latter has a kink; its derivative with respect to S is taken to be 0 there, the mean of those of both sides.
    """

    @staticmethod
    def forward(ctx, s: Tensor, theta: Tensor | None, a: Tensor, b: Tensor, inside: Tensor) -> tuple[Tensor, Tensor | None]:
        turn, scale = inside / (2 * math.pi), a * b
        r = _cosine(s, scale)
        share = r.acos().neg_().add_(math.pi).mul_(turn)  # of the units that both activate
        ctx.save_for_backward(s, theta, a, b, turn, share)
        sine = torch.sqrt_(r.square_().neg_().add_(1))
        return sine.mul_(scale).mul_(turn).addcmul_(s, share), None if theta is None else theta * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_s: Tensor, g_theta: Tensor | None) -> tuple[Tensor | None, ...]:
        s, theta, a, b, turn, share = ctx.saved_tensors
        scale = a * b
        r = _cosine(s, scale)
        sine = torch.sqrt_(r.square().neg_().add_(1))
        g_scale, into = g_s * sine, g_s * share
        if theta is not None:
            bend = sine.masked_fill_(sine == 0, math.inf).mul_(scale).reciprocal_().mul_(theta).mul_(g_theta).mul_(turn)
            into.add_(bend)
            g_scale.mul_(turn).addcmul_(bend, r, value=-1)
            g_theta = g_theta * share
        else:
            g_scale.mul_(turn)
        g_a, g_b = ((g_scale * value).sum_to_size(like.shape) if needed else None for value, like, needed
                    in ((b, a, ctx.needs_input_grad[2]), (a, b, ctx.needs_input_grad[3])))
        return into, g_theta, g_a, g_b, None


def _cosine(s: Tensor, scale: Tensor) -> Tensor:
    """S / (a b) within [-1, 1]; exactly 1 where only rounding keeps it from that (angles below 2e-7 in float64)."""
    return (s / scale).mul_(1 + 64 * torch.finfo(s.dtype).eps).clamp_(-1, 1)


def _dense(s: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    s = WEIGHT * s + BIAS
    return s, s + WEIGHT * theta


def _covariance(x: Tensor, shifted: Tensor) -> Tensor:
    """Mean over channels of x_p x'_{p+d}: [n, C, H, W] and [n', C, H, W, D, D] -> [n, n', H, W, D, D]."""
    return torch.einsum("nchw,mchwde->nmhwde", x, shifted / x.shape[1]).contiguous()


def _shifted(x: Tensor, reach: int, outside: float = 0.0) -> Tensor:
    """x_{p+d} for every offset d: [..., H, W] -> [..., H, W, D, D]."""
    window = 2 * reach + 1
    return F.pad(x, [reach] * 4, value=outside).unfold(-2, window, 1).unfold(-2, window, 1).contiguous()


def _inside(x: Tensor, reach: int) -> Tensor:
    """Is p + d a pixel? [..., H, W] -> [H, W, D, D] of 1 and 0."""
    return _shifted(torch.ones_like(x.view(-1, *x.shape[-2:])[:1]), reach)[0]


def _neighbours(s: Tensor) -> Tensor:
    """What a 3x3 convolution does: mean over delta of S(p + delta, q + delta), with zeros around. [..., H, W, D, D] as it is."""
    height, width, offsets, _ = s.shape[-4:]
    maps = s.reshape(-1, height, width, offsets**2).permute(0, 3, 1, 2)  # channels_last, the offsets as channels
    return F.avg_pool2d(maps, 3, stride=1, padding=1).permute(0, 2, 3, 1).reshape(s.shape)


def _pool(s: Tensor) -> Tensor:
    """Mean over the 2x2 x 2x2 pixel pairs under a pair of pooled pixels: [..., H, W, D, D] -> [..., H/2, W/2, D', D'], D' = (D - 1) / 2."""
    for pixels, offsets in ((-4, -2), (-3, -1)):
        even, odd = s.unflatten(pixels, (-1, 2)).unbind(pixels)
        s = (_every_other(even, 1, offsets) + _every_other(odd, 1, offsets)  # both even, both odd
             + _every_other(even, 2, offsets) + _every_other(odd, 0, offsets)) / 4  # even with odd, odd with even
    return s


def _every_other(s: Tensor, first: int, axis: int) -> Tensor:
    """Offsets first, first + 2, ...: as many as there are with first = 1."""
    return s.narrow(axis, first, s.shape[axis] - 2).index_select(axis, torch.arange(0, s.shape[axis] - 2, 2, device=s.device))

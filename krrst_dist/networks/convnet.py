"""The ConvNet of data set distillation: the pool's networks, and those of most compared methods.

Block: 3x3 convolution -> norm -> ReLU -> 2x2 average pool; the features are the flattened last map. Batch norm and
widths 128-256-512 are KRR-ST's at 32 px (METHOD 5); instance norm and width 128 throughout are DC, DSA, DM and MTT's
(BASELINES 0); batch norm before each convolution but the first is FRePo's (BASELINES 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist.config import ConfigError
from krrst_dist.networks.base import Network, require_one_of, require_resolution

_NORMS = {
    "batch": nn.BatchNorm2d,
    "instance": lambda width: nn.GroupNorm(width, width),  # with a gain and a bias of each channel
    "none": None,
}


class ConvNet(Network):
    """One block a width; each halves the resolution, which must be a multiple of 2^depth."""

    def __init__(self, *, resolution: int, channels: int = 3, widths: Sequence[int] = (128, 256, 512), norm: str = "batch",
                 norm_before: bool = False) -> None:
        super().__init__()
        require_one_of("norm", norm, tuple(_NORMS))
        if not widths or min(widths) < 1:
            raise ConfigError(f"widths = {tuple(widths)}: a ConvNet needs one positive width for each block; take e.g. (128, 256, 512)")
        require_resolution(f"a ConvNet of {len(widths)} blocks", resolution, multiple=2 ** len(widths), least=2 ** len(widths))
        make_norm = _NORMS[norm]
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise([channels, *widths])):
            if make_norm and norm_before and i > 0:
                layers.append(make_norm(before))
            layers.append(nn.Conv2d(before, width, 3, padding=1))
            if make_norm and not norm_before:
                layers.append(make_norm(width))
            layers += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.layers = nn.Sequential(*layers)
        self.feature_dim = widths[-1] * (resolution // 2 ** len(widths)) ** 2

    def features(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d) and self._folds:
                x = _convolve_and_norm(layer, next(layers), x)
            elif isinstance(layer, nn.ReLU) and x.requires_grad and _is_channels_last(x):
                x = _ReluAndPool.apply(x)[1]
                next(layers)
            elif isinstance(layer, nn.AvgPool2d) and not x.requires_grad:
                x = average_pool(x)
            else:
                x = layer(x)
        return x.flatten(1)

    @property
    def _folds(self) -> bool:
        """Is each convolution followed by a batch norm with fixed statistics?"""
        return isinstance(self.layers[1], nn.BatchNorm2d) and not self.layers[1].training


def _convolve_and_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(convolution(x)) in eval mode as one convolution: less to compute, and nothing to remember in between."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)  # [width]
    bias = norm.bias + (convolution.bias - norm.running_mean) * scale
    return F.conv2d(x, convolution.weight * scale[:, None, None, None], bias, padding=convolution.padding)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def average_pool(x: Tensor) -> Tensor:
    """2x2 average pool of [n, C, H, W] with even H and W, not differentiated.

    Of channels_last maps on a GPU, torch's own is slow (half of a whole meta-update in bfloat16); halving by bilinear
    interpolation takes the mean of the same four pixels.
    """
    if x.is_cuda and _is_channels_last(x):
        return halve(x)
    return F.avg_pool2d(x, 2)


def halve(x: Tensor) -> Tensor:
    """Bilinear interpolation to half the size: [n, C, H, W] -> [n, C, H / 2, W / 2], the mean of each 2x2 square."""
    return F.interpolate(x, scale_factor=0.5, mode="bilinear")


class _ReluAndPool(torch.autograd.Function):
    """ReLU, in place, and 2x2 average pool of [n, C, H, W]: the same numbers as torch's own, with less memory.

    It remembers where x was positive, in a byte, and not ReLU's output; backward makes one map of x's size, not two.
    For channels_last maps.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x > 0)
        ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)  # x goes nowhere but to the pool
        return x.relu_(), average_pool(x)

    @staticmethod
    def backward(ctx, _: None, g: Tensor | None) -> Tensor | None:
        if g is None:
            return None
        (positive,) = ctx.saved_tensors
        quarter = (g / 4).contiguous(memory_format=torch.channels_last)
        g_x = positive.to(g.dtype)
        g_x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mul_(quarter[:, :, :, None, :, None])
        return g_x

"""MobileNet of the published comparison: v2's inverted residual blocks with expansion 2 and a stride-1 stem (METHOD 5)."""

from __future__ import annotations

from torch import Tensor, nn

from krrst_dist.networks.base import Network, require_resolution

_STAGES = (  # expansion, width, blocks, stride of the first
    (1, 16, 1, 1),
    (2, 24, 2, 1),
    (2, 32, 3, 2),
    (2, 64, 4, 2),
    (2, 96, 3, 1),
    (2, 160, 3, 2),
    (2, 320, 1, 1),
)


class MobileNet(Network):
    """Features are the average over the last map: d = 1280."""

    feature_dim = 1280

    def __init__(self, *, resolution: int, channels: int = 3) -> None:
        super().__init__()
        require_resolution("mobilenet", resolution, multiple=1, least=8)
        layers: list[nn.Module] = _convolution(channels, 32, kernel=3)
        before = 32
        for expansion, width, blocks, stride in _STAGES:
            for i in range(blocks):
                layers.append(InvertedResidual(before, width, expansion=expansion, stride=stride if i == 0 else 1))
                before = width
        layers += _convolution(before, self.feature_dim, kernel=1)
        self.layers = nn.Sequential(*layers)

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow. A block of stride 1 always has a shortcut (1x1 where the widths differ)."""

    def __init__(self, before: int, width: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = expansion * before
        self.layers = nn.Sequential(
            *_convolution(before, inner, kernel=1),
            *_convolution(inner, inner, kernel=3, stride=stride, groups=inner),
            *_convolution(inner, width, kernel=1, relu=False),
        )
        self.shortcut = None
        if stride == 1:
            self.shortcut = nn.Identity() if before == width else nn.Sequential(*_convolution(before, width, kernel=1, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if self.shortcut is None else self.layers(x) + self.shortcut(x)


def _convolution(before: int, width: int, *, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> list[nn.Module]:
    convolution = nn.Conv2d(before, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)] + ([nn.ReLU(inplace=True)] if relu else [])

"""AlexNet for small images, with batch norm (METHOD 5): five stride-1 convolutions, features are the flattened last map."""

from __future__ import annotations

from torch import Tensor, nn

from krrst_dist.networks.base import Network, require_resolution


class AlexNet(Network):
    """Convolution -> batch norm -> ReLU five times, with a 2x2 max-pool after the 1st, 2nd and 5th; d = 192 (resolution / 8)^2."""

    def __init__(self, *, resolution: int, channels: int = 3) -> None:
        super().__init__()
        require_resolution("alexnet", resolution, multiple=8, least=8)
        self.layers = nn.Sequential(
            *_convolution(channels, 128, kernel=5), nn.MaxPool2d(2),
            *_convolution(128, 192, kernel=5), nn.MaxPool2d(2),
            *_convolution(192, 256, kernel=3),
            *_convolution(256, 192, kernel=3),
            *_convolution(192, 192, kernel=3), nn.MaxPool2d(2),
        )
        self.feature_dim = 192 * (resolution // 8) ** 2

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)


def _convolution(before: int, width: int, *, kernel: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

"""VGG-11 with batch norm, for architecture generalisation (METHOD 5): convolutions only, features are the flattened last map."""

from __future__ import annotations

from torch import Tensor, nn

from krrst_dist.networks.base import Network, require_resolution

_STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(Network):
    """Five stages of 3x3 convolution -> batch norm -> ReLU, each followed by a 2x2 max-pool; d = 512 (resolution / 32)^2."""

    def __init__(self, *, resolution: int, channels: int = 3) -> None:
        super().__init__()
        require_resolution("vgg11", resolution, multiple=32, least=32)
        layers: list[nn.Module] = []
        before = channels
        for widths in _STAGES:
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        self.feature_dim = 512 * (resolution // 32) ** 2

    def features(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1)

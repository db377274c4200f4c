"""ResNets: 10 and 18 with the stem for small images (the target model at 32 and 64 px), 50 as torchvision has it (224 px).

The blocks are torchvision's, and so are the names in the state dict: a checkpoint of torchvision's layout loads as it
is, less its `fc`. Features are the average over the last map, after its ReLU, hence >= 0 (REFERENCE 4).
"""

from __future__ import annotations

from torch import Tensor, nn

from krrst_dist.networks.base import Network, require_one_of, require_resolution


class ResNet(Network):
    """torchvision's four stages behind a given stem (a convolution to 64 channels, then a pool)."""

    def __init__(self, block: str, blocks: tuple[int, int, int, int], *, stem: nn.Conv2d, pool: nn.Module,
                 zero_init_residual: bool = False) -> None:
        super().__init__()
        from krrst_dist.torchvision_ops import torchvision  # here, because it takes seconds and no other network needs it

        parts = torchvision.models.resnet
        whole = parts.ResNet(getattr(parts, block), list(blocks), zero_init_residual=zero_init_residual)
        self.conv1, self.bn1, self.relu, self.maxpool = stem, whole.bn1, whole.relu, pool
        self.layer1, self.layer2, self.layer3, self.layer4 = whole.layer1, whole.layer2, whole.layer3, whole.layer4
        self.feature_dim = whole.fc.in_features

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [n, d, h, w]
        return x.mean((2, 3))


def resnet10(*, resolution: int, channels: int = 3, stem_padding: int = 1) -> ResNet:
    """One basic block a stage, the last gain of each starting at 0; d = 512."""
    require_resolution("resnet10", resolution, multiple=1, least=8)
    return ResNet("BasicBlock", (1, 1, 1, 1), stem=_small_stem(channels, stem_padding), pool=nn.Identity(), zero_init_residual=True)


def resnet18(*, resolution: int, channels: int = 3, stem_padding: int = 1) -> ResNet:
    """Two basic blocks a stage; d = 512."""
    require_resolution("resnet18", resolution, multiple=1, least=8)
    return ResNet("BasicBlock", (2, 2, 2, 2), stem=_small_stem(channels, stem_padding), pool=nn.Identity())


def resnet50(*, resolution: int, channels: int = 3) -> ResNet:
    """torchvision's ResNet-50, 7x7 stem and max-pool included; d = 2048."""
    require_resolution("resnet50", resolution, multiple=1, least=32)
    stem = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision starts it
    return ResNet("Bottleneck", (3, 4, 6, 3), stem=stem, pool=nn.MaxPool2d(3, stride=2, padding=1))


def _small_stem(channels: int, padding: int) -> nn.Conv2d:
    """3x3, stride 1. Padding 2 is the authors' (maps of 34-17-9-5 at 32 px), which their checkpoints were trained with."""
    require_one_of("stem_padding", padding, (1, 2))
    return nn.Conv2d(channels, 64, 3, padding=padding, bias=False)

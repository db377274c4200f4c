"""Networks by name: one file an architecture, one entry each in the registry below.

Knows nothing of data, training or devices. A network starts from torch's global random generator.

    network = build("convnet", resolution=32, widths=(128, 256, 512))
    network.features(x)                    # [n, C, H, W] -> [n, network.feature_dim]
    model = with_head(network, 512)        # model(x): [n, C, H, W] -> [n, 512]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from krrst_dist.config import ConfigError, nearest
from krrst_dist.networks.alexnet import AlexNet
from krrst_dist.networks.base import Headed, Network
from krrst_dist.networks.convnet import ConvNet
from krrst_dist.networks.mobilenet import MobileNet
from krrst_dist.networks.resnet import resnet10, resnet18, resnet50
from krrst_dist.networks.vgg import VGG11

__all__ = ["Headed", "Network", "build", "names", "with_head"]

_REGISTRY: dict[str, Callable[..., Network]] = {
    "convnet": ConvNet,
    "resnet10": resnet10,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg11": VGG11,
    "alexnet": AlexNet,
    "mobilenet": MobileNet,
}


def names() -> list[str]:
    """The registered networks."""
    return list(_REGISTRY)


def build(name: str, *, resolution: int, channels: int = 3, **options: Any) -> Network:
    """A freshly initialised network for images [n, channels, resolution, resolution].

    Options that a network does not list keep to others: widths, norm ("batch", "instance", "none") and norm_before
    (bool) are the ConvNet's; stem_padding (1, 2) is ResNet-10's and ResNet-18's.

    Raises:
        ConfigError: unknown network or option (with the nearest name), an option out of range, or a resolution that
            the network cannot take.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"network.name = {name!r}: no such network; {nearest(name, names())}")
    known = [option for option in inspect.signature(_REGISTRY[name]).parameters if option not in ("resolution", "channels")]
    for option, value in options.items():
        if option not in known:
            remedy = nearest(option, known) if known else "it has none; leave it out"
            raise ConfigError(f"network.{option} = {value!r}: {name} has no such option; {remedy}")
    return _REGISTRY[name](resolution=resolution, channels=channels, **options)


def with_head(network: Network, out: int) -> Headed:
    """`network` with a fresh linear head of `out` outputs."""
    return Headed(network, out)

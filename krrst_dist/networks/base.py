"""What every network offers: features of an image, their width, and a linear head on top.

Knows no architecture and no training. n images, C channels, H x W pixels, d features, k outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from krrst_dist.config import ConfigError


class Network(nn.Module):
    """A feature extractor f_w: images [n, C, H, W] -> [n, d].

    In eval mode it treats each image on its own. Takes any float type and memory format.
    """

    feature_dim: int
    """d"""

    def features(self, x: Tensor) -> Tensor:
        """Images [n, C, H, W] -> features [n, feature_dim]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Headed(nn.Module):
    """A network with a linear head h: `headed(x)` is h(f_w(x)), [n, C, H, W] -> [n, k]."""

    def __init__(self, network: Network, out: int) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(network.feature_dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network.features(x))


def require_resolution(name: str, resolution: int, *, multiple: int, least: int) -> None:
    """Raises ConfigError unless `name` can take images of `resolution` pixels a side."""
    if resolution < least or resolution % multiple:
        fitting = max(least, multiple * round(resolution / multiple))
        rule = f"a multiple of {multiple}, at least {least}" if multiple > 1 else f"at least {least}"
        raise ConfigError(f"resolution = {resolution}: {name} needs {rule}; take resolution = {fitting}, or another network")


def require_one_of(option: str, value: object, known: tuple) -> None:
    """Raises ConfigError unless `value` is among the `known` ones."""
    if value not in known:
        raise ConfigError(f"{option} = {value!r}: no such choice; take one of {', '.join(map(repr, known))}")

"""The held-out ridge loss: the number that shows whether distillation works (DESIGN, Spaces).

A network is pre-trained on (X_s, Y_s); the ridge head on its features of the same set predicts the target
representations of real images that nothing was trained on. Each network is a task of its own
(`held_out_of_network`), so that they can be computed anywhere; `HeldOut` puts the numbers together.

Letters: m synthetic and h held-out images [C, H, W], k target dimensions, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from krrst_dist.algorithm import ridge_head, with_bias
from krrst_dist.config import NetworkSettings, PretrainSettings
from krrst_dist.evaluation.pretrain import pretrain
from krrst_dist.networks import Network


@dataclass(frozen=True)
class HeldOut:
    """The losses of the single networks, and that of a constant prediction."""

    per_network: tuple[float, ...]
    of_mean: float

    @property
    def loss(self) -> float:
        """Mean squared error per image and target dimension, averaged over the networks."""
        return fmean(self.per_network)

    @property
    def fraction(self) -> float:
        """The loss over that of predicting the mean: 0 is perfect, 1 is no better than a constant; 1 - R^2."""
        return self.loss / self.of_mean


def held_out_loss(network: NetworkSettings, x_syn: Tensor, y_syn: Tensor, x_held: Tensor, y_held: Tensor, *,
                  recipe: PretrainSettings, ridge: float, networks: int = 5,
                  device: torch.device | str = "cpu") -> HeldOut:
    """`held_out_of_network` for the initial seeds 0 .. networks - 1, one after the other."""
    losses = [held_out_of_network(seed, network, x_syn, y_syn, x_held, y_held, recipe=recipe, ridge=ridge,
                                  device=device) for seed in range(networks)]
    return HeldOut(tuple(losses), loss_of_mean(y_held))


def held_out_of_network(seed: int, network: NetworkSettings, x_syn: Tensor, y_syn: Tensor, x_held: Tensor,
                        y_held: Tensor, *, recipe: PretrainSettings, ridge: float,
                        device: torch.device | str = "cpu") -> float:
    """Pre-train the network with this initial seed on (X_s, Y_s), and take its ridge loss on the held-out images.

    x_syn: [m, C, H, W] as stored. x_held: [h, C, H, W] normalised with the source's statistics. y_syn [m, k],
    y_held [h, k]. ridge: lambda over trace(K).
    """
    trained = pretrain(network, x_syn, y_syn, recipe, seed=seed, device=device)
    return ridge_loss(trained, x_syn, y_syn, x_held, y_held, ridge=ridge)


@torch.no_grad()
def ridge_loss(network: Network, x_syn: Tensor, y_syn: Tensor, x_held: Tensor, y_held: Tensor, *, ridge: float,
               chunk: int = 512) -> float:
    """Mean squared error on (x_held, y_held) of the ridge head on the network's features of (x_syn, y_syn).

    The network is used as it is, on the device it is on: put it in eval mode first. Shapes as in
    `held_out_of_network`. The ridge regression is float64: a measurement should not add its own rounding.
    """
    if y_syn.shape[1:] != y_held.shape[1:]:
        raise ValueError(f"y_syn has {y_syn.shape[1]} dimensions but the held-out targets have {y_held.shape[1]}: "
                         f"both must come from the same target model; distil again, or give that model")
    device = next(network.parameters()).device

    def features(x: Tensor) -> Tensor:
        return with_bias(network.features(x.to(device, memory_format=torch.channels_last)).double())  # [b, d+1]

    f_syn = torch.cat([features(part) for part in x_syn.split(chunk)])
    head = ridge_head(f_syn, y_syn.to(device).double(), ridge=ridge)  # [d+1, k]
    squares = sum((features(x) @ head - y.to(device)).square().sum()
                  for x, y in zip(x_held.split(chunk), y_held.split(chunk), strict=True))
    return float(squares) / y_held.numel()


def loss_of_mean(y_held: Tensor) -> float:
    """The loss of the best constant prediction, the held-out targets' own mean: their variance, averaged over the
    k dimensions. It depends on the held-out images and the target model alone, so fractions of one run compare."""
    y = y_held.double()
    return float((y - y.mean(0)).square().mean())

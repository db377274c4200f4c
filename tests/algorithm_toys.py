"""Small problems for the algorithm's tests, and the meta-gradient as a textbook would compute it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist import networks, seeds

RESOLUTION = 8
FEATURES = 24  # d of the toy network: 6 channels of 2 x 2
OUTPUTS = 5  # k


def problem(*, m: int = 10, b: int = 16, k: int = OUTPUTS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random x_syn [m, 3, 8, 8], y_syn [m, k], x_real [b, 3, 8, 8], y_real [b, k]."""
    generator = seeds.torch_rng(0, "toy problem")
    x, y = (torch.randn(m + b, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, RESOLUTION, RESOLUTION), (k,)))
    return x[:m], y[:m], x[m:], y[m:]


def headed(*, dtype: torch.dtype = torch.float64, k: int = OUTPUTS) -> nn.Module:
    """A ConvNet of two blocks with batch norm and a head, freshly initialised from the global generator."""
    return networks.with_head(networks.build("convnet", resolution=RESOLUTION, widths=(4, FEATURES // 4)), k).to(dtype)


def extractor(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The toy ConvNet after a few passes in train mode, so that its batch norm has statistics of its own; in train mode."""
    with seeds.seeded(seed, "toy network"):
        network = headed(dtype=dtype).network
        for _ in range(3):
            network(1 + 2 * torch.randn(12, 3, RESOLUTION, RESOLUTION, dtype=dtype))
    return network


def textbook_loss(features, x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor, *, ridge: float = 1e-6,
                  primal: bool = False) -> Tensor:
    """The outer loss as METHOD 2 states it, differentiable, by an LU solve: in the dual system, or in the primal one."""
    f_syn, f_real = (torch.cat([f, f.new_ones(len(f), 1)], 1) for f in (features(x_syn), features(x_real)))
    gram = f_syn.T @ f_syn if primal else f_syn @ f_syn.T
    system = gram + ridge * gram.trace().detach() * torch.eye(len(gram), dtype=gram.dtype)
    w = torch.linalg.solve(system, f_syn.T @ y_syn) if primal else f_syn.T @ torch.linalg.solve(system, y_syn)
    return F.mse_loss(f_real @ w, y_real)


def textbook_gradient(network: nn.Module, x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor,
                      **settings) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dL/dX_s and dL/dY_s by plain autograd, through the network in eval mode."""
    network.eval()
    x_syn, y_syn = x_syn.clone().requires_grad_(), y_syn.clone().requires_grad_()
    loss = textbook_loss(network, x_syn, y_syn, x_real, y_real, **settings)
    return loss.detach(), *torch.autograd.grad(loss, (x_syn, y_syn))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest entry."""
    return ((value.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


class Batches:
    """A cycle of real batches with a position."""

    def __init__(self, *batches: tuple[Tensor, Tensor]) -> None:
        self._batches, self._position = batches, 0

    def next(self) -> tuple[Tensor, Tensor]:
        batch = self._batches[self._position % len(self._batches)]
        self._position += 1
        return batch

    def state(self) -> dict[str, int]:
        return {"batch": self._position}

    def restore(self, state: dict[str, int]) -> None:
        self._position = state["batch"]

"""A network as a function of one vector of weights, so that training steps can be differentiated through.

Knows no loss and no data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatNetwork:
    """(theta [p], images [n, C, H, W]) -> outputs [n, k], in the mode that `network` is in.

    In train mode batch norm takes the batch's own statistics; its running ones are kept from one call to the next by nobody.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._shapes = {name: value.shape for name, value in network.named_parameters()}
        self.start = torch.cat([value.detach().flatten() for value in network.parameters()])
        """the network's own weights, as theta"""

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        values = theta.split([shape.numel() for shape in self._shapes.values()])
        state = {name: value.view(shape) for (name, shape), value in zip(self._shapes.items(), values, strict=True)}
        state |= {name: value.clone() for name, value in self._network.named_buffers()}
        return torch.func.functional_call(self._network, state, (x,))


def plain_step(loss: Tensor, theta: Tensor, rate: Tensor | float) -> Tensor:
    """theta after a gradient step on `loss`, a scalar, differentiable."""
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    return theta - rate * gradient

"""The gradient of a loss through many training steps, with memory for one of them.

Forward, only the weights between steps are kept; backward, each step is computed again from them. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[..., Tensor]
"""(i, theta [p], *inputs) -> theta after step i [p], differentiable"""


def through_steps(step: Step, steps: int, theta: Tensor, inputs: Sequence[Tensor], loss: Callable[[Tensor], Tensor], *,
                  alive: Callable[[], None] = lambda: None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """loss(theta after `steps` steps), and its gradient with respect to each input.

    theta: [p] start, of which no gradient is taken. inputs: what all steps depend on. alive: called after every step, both ways.
    """
    inputs = [value.detach().requires_grad_() for value in inputs]
    kept = [theta.detach()]
    for i in range(steps):
        kept.append(step(i, kept[-1].requires_grad_(), *inputs).detach())
        alive()
    last = kept.pop().requires_grad_()
    value = loss(last)
    (adjoint,) = torch.autograd.grad(value, last)
    gradients = [torch.zeros_like(x) for x in inputs]
    for i in reversed(range(steps)):
        before = kept.pop().requires_grad_()
        adjoint, *parts = torch.autograd.grad(step(i, before, *inputs), [before, *inputs], adjoint, allow_unused=True)
        gradients = [g if part is None else g + part for g, part in zip(gradients, parts, strict=True)]
        alive()
    return value.detach(), tuple(gradients)

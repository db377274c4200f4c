"""LAMB (You et al., 2020): Adam whose step on each tensor is as long as the tensor, times the learning rate. FRePo's outer optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """value <- value - lr * (|value| / |u|) * u, with u Adam's direction; the quotient is 1 where either norm is 0. No weight decay.

    Norms are of a whole tensor. eps is added to the root of the second moment, as in optax.
    """

    def __init__(self, params: Iterable[Any], lr: float = 3e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step on every tensor that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
                state["step"] += 1
                state["exp_avg"].lerp_(value.grad, 1 - first)
                state["exp_avg_sq"].lerp_(value.grad.square(), 1 - second)
                t = state["step"].item()
                u = state["exp_avg"] / (1 - first**t) / ((state["exp_avg_sq"] / (1 - second**t)).sqrt() + group["eps"])
                lengths = value.norm(), u.norm()
                trust = lengths[0] / lengths[1] if all(lengths) else 1.0
                value -= group["lr"] * trust * u

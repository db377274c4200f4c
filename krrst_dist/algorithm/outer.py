"""The outer optimiser: what a method learns, and the steps that learn it.

`Outer` holds any learned tensors and steps them by one of torch's optimisers; `OuterOptimizer` is KRR-ST's: AdamW on
X_s and Y_s, learning rate falling linearly to 1e-3 of its start. X_s may live in a normalised space while published
learning rates are in pixel units; a tensor is therefore stepped as value * scale, for X_s with `scale` the channels'
std (METHOD 2, step 7; DESIGN, Spaces).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-3  # the learning rate's last value over its first


class Outer:
    """Learned tensors, by name and in a fixed order, under one optimiser.

    values: the start, copied. lr: of each, by name. optimizer: parameter groups -> a torch optimiser. schedule: step -> factor on
    every lr, a pure function. scale: by name, units that the optimiser steps in for one unit of the tensor; 1 where not given.
    """

    def __init__(self, values: Mapping[str, Tensor], *, lr: Mapping[str, float],
                 optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], schedule: Callable[[int], float] = lambda step: 1.0,
                 scale: Mapping[str, Tensor | float] | None = None) -> None:
        scales = {name: (scale or {}).get(name, 1.0) for name in values}
        self._scale = {name: torch.as_tensor(scales[name], dtype=value.dtype, device=value.device) for name, value in values.items()}
        self._stepped = {name: (value.detach() * self._scale[name]).contiguous() for name, value in values.items()}
        self._start_lr, self._schedule = [lr[name] for name in values], schedule
        self._optimizer = optimizer([{"params": [value], "lr": lr[name]} for name, value in self._stepped.items()])
        self.steps = 0

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The learned tensors as they are now, new tensors."""
        return tuple(value / self._scale[name] for name, value in self._stepped.items())

    @property
    def lr(self) -> float:
        """The next step's learning rate of the first tensor."""
        return self._start_lr[0] * self.lr_factor

    @property
    def lr_factor(self) -> float:
        """The next step's learning rate over the first's."""
        return self._schedule(self.steps)

    def step(self, *gradients: Tensor) -> None:
        """One step with the gradient of each tensor, in their order."""
        for group, lr in zip(self._optimizer.param_groups, self._start_lr, strict=True):
            group["lr"] = lr * self.lr_factor
        for (name, value), gradient in zip(self._stepped.items(), gradients, strict=True):
            value.grad = (gradient / self._scale[name]).contiguous()  # with respect to value * scale
        self._optimizer.step()
        self.steps += 1

    def to(self, device: torch.device | str) -> Outer:
        """An equal one on a device."""
        moved = copy.deepcopy(self)
        moved._scale = {name: value.to(device) for name, value in self._scale.items()}
        moved._stepped = {name: value.to(device) for name, value in moved._stepped.items()}
        for group, value in zip(moved._optimizer.param_groups, moved._stepped.values(), strict=True):
            group["params"] = [value]
        moved._optimizer.state.clear()
        moved.load_state_dict(self.state_dict())
        return moved

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors (times their scale), the optimiser's moments and the step count, as flat tensors."""
        state = {"steps": torch.tensor(self.steps)}
        for name, value in self._stepped.items():
            state[name] = value
            moments = self._optimizer.state[value].items()
            state |= {f"{name}.{moment}": torch.as_tensor(held) for moment, held in moments if held is not None}
        return {name: value.detach().clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on exactly where `state_dict()` was taken."""
        self.steps = int(state["steps"])
        for name, value in self._stepped.items():
            value.copy_(state[name])
            moments = {key.removeprefix(f"{name}."): held for key, held in state.items() if key.startswith(f"{name}.")}
            self._optimizer.state[value] = {key: held.to(value.device, copy=True) if held.ndim else held.clone()
                                            for key, held in moments.items()}


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without weight decay."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def falling(decay_updates: int) -> Callable[[int], float]:
    """The schedule that falls linearly from 1 to FLOOR over so many steps, and stays there."""
    return lambda step: 1 - (1 - FLOOR) * min(step, decay_updates) / decay_updates


class OuterOptimizer(Outer):
    """AdamW without weight decay on (X_s, Y_s).

    x_syn: [m, C, H, W] start; y_syn: [m, k] start; both are copied. lr_x: in pixel units; lr_y: in target units.
    decay_updates: updates over which the learning rate falls; later ones stay at the floor.
    scale: [C, 1, 1] pixel units of one unit of X_s (the channels' std; 1 for raw pixels).
    """

    def __init__(self, x_syn: Tensor, y_syn: Tensor, *, lr_x: float, lr_y: float, decay_updates: int, scale: Tensor | float = 1.0) -> None:
        super().__init__({"x_syn": x_syn, "y_syn": y_syn}, lr={"x_syn": lr_x, "y_syn": lr_y}, scale={"x_syn": scale},
                         optimizer=adamw, schedule=falling(decay_updates))

    @property
    def x_syn(self) -> Tensor:
        """X_s [m, C, H, W], a new tensor."""
        return self.values[0]

    @property
    def y_syn(self) -> Tensor:
        """Y_s [m, k], a new tensor."""
        return self.values[1]

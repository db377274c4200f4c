"""One plain training loop, for every network that evaluation trains: batches in, optimiser steps done.

Knows no data set, no labels and no method. A run that diverges is noticed where somebody watches.

Letters: m images, b of them in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from krrst_dist import seeds
from krrst_dist.algorithm import DivergedError
from krrst_dist.config import PretrainSettings

Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [b, k], labels [b, ...]) -> scalar"""
Watch = Callable[[int, float], None]
"""(optimiser steps done, loss of the last one): called every WATCH_EVERY steps and after the last"""
WATCH_EVERY = 50


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], loss: Loss, optimizer: Optimizer,
          schedule: LRScheduler | None = None, *, watch: Watch | None = None) -> None:
    """One optimiser step a batch, in train mode; the learning rate follows `schedule`, step by step.

    Raises DivergedError where a loss that is watched is not finite.
    """
    model.train()
    watched = step = 0
    for step, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if watch and step % WATCH_EVERY == 0:
            _look(watch, step, value.item())
            watched = step
    if watch and step > watched:
        _look(watch, step, value.item())


def shuffled_batches(x: Tensor, y: Tensor, *, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless mini-batches of (x, y): all of it once an epoch, each epoch in a new order.

    The short batch at an epoch's end is used as it is; a single item left over joins the batch before it, because
    batch norm cannot be trained on one item. A set of at most one batch is given whole, in its own order.
    """
    for epoch in count():
        for part in epoch_parts(len(x), batch=batch, seed=seed, epoch=epoch):
            yield (x, y) if part is None else (x[part.to(x.device)], y[part.to(y.device)])


def epoch_parts(m: int, *, batch: int, seed: int, epoch: int) -> list[Tensor | None]:
    """The batches of one epoch, as indices int64 [b]; None for all m in their own order. See `shuffled_batches`."""
    if m <= batch:
        return [None]
    parts = list(torch.randperm(m, generator=seeds.torch_rng(seed, "training order", epoch)).split(batch))
    if len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def optimizer_of(model: nn.Module, recipe: PretrainSettings) -> tuple[Optimizer, LRScheduler]:
    """The optimiser and schedule that a recipe asks for."""
    parameters, common = model.parameters(), {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW(parameters, **common) if recipe.optimizer == "adamw" \
        else torch.optim.SGD(parameters, momentum=recipe.momentum, **common)
    warmup, steps = recipe.warmup_steps, recipe.steps

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if recipe.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
        return 0.1 if recipe.schedule == "halfway" and 2 * step >= steps else 1.0

    return optimizer, LambdaLR(optimizer, factor)


def _look(watch: Watch, step: int, loss: float) -> None:
    watch(step, loss)
    if not math.isfinite(loss):
        raise DivergedError(f"the training loss is {loss} at step {step}: lower the learning rate")

"""The pool of models f_w whose features the outer loss is measured in (3.2, Algorithm 1).

A member is a network with a linear head that has taken 0..T full-batch steps on (X_s, Y_s). Which one is drawn
at a meta-update, and every member's first weights, are pure functions of (seed, shard, ...), so that a pool's
state is weights, momenta and two counters a member. Knows nothing of the outer loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist import seeds

State = dict[str, Tensor]
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(h(f_w(X)) [n, k], Y [n, k]) -> scalar"""


_SAVED_AS = {"momentum_buffer": "momentum"}  # names of an optimiser's moments in a saved state, where they are others
_MOMENTS = {saved: name for name, saved in _SAVED_AS.items()}


class DivergedError(ArithmeticError):
    """A loss, gradient or weight is NaN or infinite; says at which step and in which shard."""


class PoolMember:
    """One model with its optimiser, step count and number of births.

    factory: () -> a freshly initialised module with `.network` (images to features) and forward to [n, k],
    on the device where it is to live. Its weights are those of (seed, shard, index, birth).
    optimizer: of the module's parameters; default: SGD with lr, momentum and weight_decay. loss: what it trains on.
    batch: random synthetic images of a training step, where there are more than that; None: all of them.
    """

    def __init__(self, factory: Callable[[], nn.Module], *, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-3,
                 optimizer: Optimizer | None = None, loss: Loss = F.mse_loss, batch: int | None = None, seed: int = 0, shard: int = 0,
                 index: int = 0) -> None:
        self._factory, self._loss, self._batch = factory, loss, batch
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self._seed, self._place = seed, (shard, index)
        self.births = 0
        self.reborn()

    def reborn(self) -> None:
        """Take a fresh network and a fresh optimiser; the step count returns to 0."""
        with seeds.seeded(self._seed, "pool member", *self._place, self.births):
            self.model = self._factory()
        self.optimizer = self._optimizer(self.model.parameters())
        self.births += 1
        self.steps = 0

    @property
    def extractor(self) -> nn.Module:
        """f_w: images [n, C, H, W] -> features [n, d]."""
        return self.model.network

    def train_step(self, x_syn: Tensor, y_syn: Tensor) -> Tensor:
        """One step on the loss, by default mean((h(f_w(X_s)) - Y_s)^2), in train mode. Returns that loss before the step, a scalar."""
        self.model.train()
        if self._batch is not None and self._batch < len(x_syn):
            order = torch.randperm(len(x_syn), generator=seeds.torch_rng(self._seed, "pool batch", *self._place, self.births, self.steps))
            rows = order[:self._batch].to(x_syn.device)
            x_syn, y_syn = x_syn[rows], y_syn[rows]
        loss = self._loss(self.model(x_syn).to(y_syn.dtype), y_syn)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # now, not before the next step: l members would hold l gradients
        self.steps += 1
        return loss.detach()

    def is_finite(self) -> bool:
        """Can weights, statistics and momenta be computed with? Not where one is NaN, or so large that its square is infinite."""
        norms = [value.norm() for value in self.state_dict().values() if value.is_floating_point() and value.ndim]
        return bool(torch.stack(norms).isfinite().all())

    def state_dict(self) -> State:
        """Weights, the optimiser's moments and counters as flat, detached tensors; they are the member's own, not copies."""
        state = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for i, parameter in enumerate(self.model.parameters()):
            moments = self.optimizer.state[parameter].items()
            state |= {f"{_SAVED_AS.get(name, name)}.{i}": torch.as_tensor(held) for name, held in moments if held is not None}
        return state | {"steps": torch.tensor(self.steps), "births": torch.tensor(self.births)}

    def load_state_dict(self, state: State) -> None:
        """Go on exactly where `state_dict()` was taken."""
        self.reborn()
        prefix = "model."
        self.model.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
        parameters = list(self.model.parameters())
        for name, value in state.items():
            if name.startswith(prefix) or "." not in name:
                continue
            moment, _, i = name.rpartition(".")
            parameter = parameters[int(i)]
            held = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()
            self.optimizer.state[parameter][_MOMENTS.get(moment, moment)] = held
        self.steps, self.births = int(state["steps"]), int(state["births"])


class ModelPool:
    """l members of one shard, the rule that draws one and the rule that ages it.

    ages "random": members start with 1..T-1 training steps, as many as is drawn. ages "counted": member i starts untrained, with a count
    of i T / l, so that replacements are spread (FRePo). optimizer, loss, batch: of a `PoolMember`.
    reset "paper": a member that has had T steps is replaced by a fresh one, whose count starts at 0.
    reset "released": the count stays at T, so the slot gets an untrained network each time it is used (the authors' code).
    """

    def __init__(self, factory: Callable[[], nn.Module], *, size: int = 10, max_steps: int = 1000, lr: float = 0.1, momentum: float = 0.9,
                 weight_decay: float = 1e-3, optimizer: Optimizer | None = None, loss: Loss = F.mse_loss, batch: int | None = None,
                 ages: Literal["random", "counted"] = "random", reset: Literal["paper", "released"] = "paper", seed: int = 0,
                 shard: int = 0) -> None:
        self.members = [PoolMember(factory, lr=lr, momentum=momentum, weight_decay=weight_decay, optimizer=optimizer, loss=loss,
                                   batch=batch, seed=seed, shard=shard, index=i) for i in range(size)]
        self.max_steps, self.ages, self.reset, self.seed, self.shard = max_steps, ages, reset, seed, shard

    def warm_up(self, x_syn: Tensor, y_syn: Tensor) -> None:
        """Bring the members to their starting ages: train each for t steps, t uniform in 1..T-1, or only count. Raises DivergedError."""
        for i, member in enumerate(self.members):
            if self.ages == "counted":
                member.steps = i * self.max_steps // len(self.members)
                continue
            for _ in range(int(seeds.numpy_rng(self.seed, "pool age", self.shard, i).integers(1, self.max_steps))):
                self._train(i, x_syn, y_syn)

    def draw(self, step: int) -> int:
        """The member used at meta-update `step`, uniform over the pool."""
        return int(seeds.numpy_rng(self.seed, "pool draw", self.shard, step).integers(len(self.members)))

    def advance(self, index: int, x_syn: Tensor, y_syn: Tensor) -> None:
        """Age the member just used: one training step, or a fresh start for one that has had T of them. Raises DivergedError."""
        member = self.members[index]
        if member.steps < self.max_steps:
            self._train(index, x_syn, y_syn)
            return
        member.reborn()
        if self.reset == "released":
            member.steps = self.max_steps

    def check(self) -> None:
        """Raise DivergedError for a member that cannot be gone on with."""
        for i, member in enumerate(self.members):
            if not member.is_finite():
                raise DivergedError(f"pool member {i} has weights that are not finite, or too large to compute with, after {member.steps} "
                                    f"training steps; its learning rate (distill.pool.lr) is too high, or X_s and Y_s have become too "
                                    f"large (distill.lr_x, distill.lr_y)")

    def _train(self, index: int, x_syn: Tensor, y_syn: Tensor) -> None:
        """One training step of a member."""
        member = self.members[index]
        loss = member.train_step(x_syn, y_syn)
        if not torch.isfinite(loss):
            raise DivergedError(f"pool member {index} has a training loss of {loss.item():g} in its training step {member.steps}; its "
                                f"learning rate (distill.pool.lr) is too high, or X_s and Y_s have become too large (distill.lr_x, "
                                f"distill.lr_y)")

    def state_dict(self) -> State:
        """Every member's state, names prefixed `member.<index>.`; its own tensors, to be written before the next step."""
        return {f"member.{i}.{name}": value for i, member in enumerate(self.members) for name, value in member.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        """Go on exactly where `state_dict()` was taken."""
        for i, member in enumerate(self.members):
            prefix = f"member.{i}."
            member.load_state_dict({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})

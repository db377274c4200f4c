"""What a distillation method is: one file, with its settings and a `Method` called METHOD.

Two kinds share the protocol. One learns: an `Outer` holds what is learned, S logical shards contribute gradients, and the
engine asks for one outer step after the other. The other one selects: it has no outer steps (`updates` = 0), and its
start is its result. Nothing here knows who runs a method, or where: all that is random is a pure function of
(seed, shard, step), so that any process can do any part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from krrst_dist.algorithm.contribution import Contribution, total
from krrst_dist.algorithm.outer import Outer
from krrst_dist.algorithm.slices import Slice
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, MethodSettings, NetworkSettings
from krrst_dist.methods.common.source import Source

Tensors = dict[str, Tensor]
Read = Callable[[str], Tensors]
"""name of a chore -> what it made"""


class Part(Protocol):
    """One logical shard of a method. `values` are the learned tensors, in the order of its `Outer`, on the CPU."""

    index: int

    def warm_up(self, *values: Tensor) -> None:
        """What precedes outer step 0."""

    def contribute(self, step: int, *values: Tensor) -> Contribution:
        """Its part of outer step `step`. Raises DivergedError when that is not finite."""

    def look_ahead(self, step: int) -> None:
        """Do what of `contribute(step)` does not depend on how outer step `step` - 1 ends. Called after that one's `contribute`, or not."""

    def advance(self, step: int, *values: Tensor) -> None:
        """What follows outer step `step`, with what is learned by then."""

    def check(self, step: int | None) -> None:
        """Raise DivergedError where it cannot be gone on with after outer step `step` (None: after warm_up)."""

    def signs(self) -> int:
        """Grows while a long call works: a sign of life. Read by another thread."""

    def state_dict(self) -> tuple[Tensors, dict[str, int]]:
        """Tensors and whole numbers from which `load_state_dict` goes on exactly."""

    def load_state_dict(self, tensors: Tensors, numbers: dict[str, int]) -> None: ...


class Stateless:
    """A `Part` of which nothing is left between outer steps."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._signs = 0

    def warm_up(self, *values: Tensor) -> None:
        pass

    def look_ahead(self, step: int) -> None:
        pass

    def advance(self, step: int, *values: Tensor) -> None:
        pass

    def check(self, step: int | None) -> None:
        pass

    def signs(self) -> int:
        return self._signs

    def alive(self) -> None:
        """Give a sign of life."""
        self._signs += 1

    def state_dict(self) -> tuple[Tensors, dict[str, int]]:
        return {}, {}

    def load_state_dict(self, tensors: Tensors, numbers: dict[str, int]) -> None:
        pass


class Method:
    """Base of the methods. An instance has no state; its attributes say what it is."""

    title: ClassVar[str]
    """the row's name in tables"""
    settings: ClassVar[type[MethodSettings]]
    """what `distill` holds in a run of it"""
    chores_read: ClassVar[tuple[str, ...]] = ("",)
    """beginnings of the dotted names of the settings that its chores depend on, the run's seed excepted; "": all of them"""
    combine: Callable[[Sequence[Contribution]], Contribution] = staticmethod(total)
    """how the shards' parts make one step"""

    def needs_labels(self, settings: MethodSettings) -> bool:
        """Does it need the source's class labels?"""
        return False

    def needs_targets(self, settings: MethodSettings) -> bool:
        """Does it need the representations of a self-supervised target model?"""
        return False

    def measured(self, settings: MethodSettings) -> bool:
        """Are the labels of its set representations, so that the held-out ridge loss of the set can be measured?"""
        return self.needs_targets(settings)

    @property
    def learns(self) -> bool:
        """Has it outer steps? A method that selects images has no part of its own in any."""
        return type(self).part is not Method.part

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Do the settings fit? training: images to distil from; classes: how many of each class, None where that is not known.

        Raises ConfigError.
        """

    def start(self, config: Config, source: Source, read: Read) -> DistilledSet:
        """Where distillation starts, which is the control that the result is compared with. It does not depend on the shards."""
        raise NotImplementedError

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """The learned tensors and how they are stepped; here none is. horizon: outer steps of a schedule, as the run was begun."""
        return Outer({"x_syn": torch.from_numpy(start.x_syn)}, lr={"x_syn": 0.0}, optimizer=torch.optim.SGD)

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read, device: torch.device) -> Part:
        """Logical shard `index`."""
        return Stateless(index)

    def slice(self, config: Config, source: Source, shard: int, p: int, *, device: torch.device) -> Slice:
        """Slice p > 0 of logical shard `shard`, for methods whose settings have `slices`."""
        raise NotImplementedError

    def result(self, start: DistilledSet, values: Sequence[Tensor]) -> DistilledSet:
        """The distilled set of the learned tensors; here X_s alone, or X_s and Y_s."""
        learned = dict(zip(("x_syn", "y_syn"), (value.numpy() for value in values), strict=False))
        return replace(start, **learned)

    def chores(self, config: Config, source: Source) -> Sequence[str]:
        """Names of what has to be computed before the first step, in parts that do not need each other: file names without an ending."""
        return ()

    def do(self, config: Config, source: Source, chore: str, *, device: torch.device, alive: Callable[[], None]) -> Mapping[str, Tensor]:
        """Compute one of them. alive: to be called now and then."""
        raise NotImplementedError

    def warm_up_steps(self, config: Config) -> int:
        """About how many signs of life the shards' warm-up gives; 0: there is none."""
        return 0

    def network(self, config: Config) -> NetworkSettings:
        """The network that quick checks of the set are made with: the one it is distilled with, where there is one."""
        return getattr(config.distill, "network", NetworkSettings(widths=(128, 256, 512)))

"""What a grid computes, as data: networks to train once, and cells that use them.

Travels to the processes that do the work. Knows nothing of how it was planned.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from krrst_dist.config import ConfigError, NetworkSettings, Settings
from krrst_dist.data.prepared import Prepared
from krrst_dist.results import Cell


@dataclass(frozen=True)
class Target:
    """A labelled data set: the manifests of its prepared splits, and whether a part of the training split is tested on instead."""

    name: str
    train: Path
    test: Path
    classes: int
    fingerprint: str
    validation: bool

    @classmethod
    def of(cls, name: str, train: Prepared, test: Prepared, *, validation: bool) -> Target:
        """Raises ConfigError for splits without labels, of one class, or of different classes."""
        for split, part in (("training", train), ("test", test)):
            if not part.labelled or len(part.class_names) < 2:
                raise ConfigError(f"targets: {name!r} has {len(part.class_names) if part.labelled else 'no'} class(es) in its {split} "
                                  f"split; a target needs labels of at least two classes in both splits")
        for i, (one, other) in enumerate(zip_longest(train.class_names, test.class_names)):
            if one != other:
                raise ConfigError(f"targets: {name!r}: class {i} is {one!r} in its training split and {other!r} in its test split; both "
                                  f"need the same classes in the same order")
        parts = [train.fingerprint, test.fingerprint, "validation" if validation else "test"]
        return cls(name, train.path, test.path, len(train.class_names), digest(parts), validation)

    @property
    def title(self) -> str:
        """The name, with what is tested on where that is not the test split."""
        return f"{self.name} (validation)" if self.validation else self.name


@dataclass(frozen=True)
class Model:
    """A network that is trained once: on a distilled set (an encoder), or on a target (a teacher)."""

    uri: str
    """of its weights"""
    network: NetworkSettings
    seed: int
    recipe: Settings | None = None
    """None: it is not trained"""
    set_path: str | None = None
    target: Target | None = None
    title: str = ""

    @property
    def trained(self) -> bool:
        return self.recipe is not None


@dataclass(frozen=True)
class Planned:
    """A cell with all that a trial needs to compute it."""

    cell: Cell
    recipe: Settings
    encoder: Model | None = None
    teacher: Model | None = None
    set_path: str | None = None
    target: Target | None = None
    source: Path | None = None
    models: tuple[Model, ...] = field(init=False)
    """that have to be trained before"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(m for m in (self.encoder, self.teacher) if m and m.trained))

    @property
    def title(self) -> str:
        """For people."""
        c = self.cell
        seeds = f"seed {c.evaluation_seed}" if c.distillation_seed is None else f"seeds {c.distillation_seed}/{c.evaluation_seed}"
        share = "" if c.label_fraction == 1 else f", {100 * c.label_fraction:g}% of labels"
        return f"{c.method}, {c.architecture}, {c.target}, {c.task}{share}, {seeds}"


def digest(values: Any) -> str:
    """32 hex digits that name what JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]

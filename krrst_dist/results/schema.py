"""What a row of a results file says, column by column, and how one evaluated cell becomes rows: one row a metric.

The schema is written down once, here; every file carries its version and its descriptions, so that a file can be read
years later without this code. Knows nothing of where files lie or how they are summarised.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib import metadata
from numbers import Integral, Real
from typing import Any

import pyarrow as pa

from krrst_dist.provenance import Revision

VERSION = "2"
VERSION_KEY = b"krrst_results"
"""of the version, in a file's schema metadata"""
STATUSES = ("failed", "diverged", "ok")
"""from the worst to the best"""
NO_METRIC = ""
"""the metric of an attempt that has no numbers"""
UNKNOWN = "{}"
"""the distillation of a set whose file does not say it, and of results from before it was asked for"""
PACKAGES = ("krrst_dist", "torch", "torchvision", "ray", "ffcv", "numpy", "scipy", "scikit-learn", "pyarrow")


class ResultsError(ValueError):
    """Results that cannot be written or read: says where, what is wrong and what to do."""


def _column(name: str, kind: pa.DataType, description: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": description})


_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
SCHEMA = pa.schema([
    _column("cell", _TEXT, "hash of what the numbers depend on (Cell.key); one cell may have been attempted several times"),
    _column("attempt", _TEXT, "32 hex digits, new for every attempt; all rows of an attempt share it"),
    _column("finished", pa.timestamp("us", "UTC"), "when the attempt ended, by the clock of the machine that did it"),
    _column("status", _TEXT, "ok; diverged: the last numbers before it did; failed: no numbers"),
    _column("error", _TEXT, "why it failed or diverged; empty otherwise"),
    _column("method", _TEXT, "row of the paper's tables, e.g. 'KRR-ST' or 'from scratch'"),
    _column("source", _TEXT, "data set that was distilled; empty where nothing was"),
    _column("source_fingerprint", _TEXT, "of the source's prepared images"),
    _column("set_fingerprint", _TEXT, "of the distilled set; empty where there is none, and so nothing depends on the source"),
    _column("distillation_seed", _INT, "seed of the distillation; null where nothing was distilled or it is unknown", nullable=True),
    _column("distillation", _TEXT, "how the set was made: all settings but the seed, as canonical JSON; {} if unknown or nothing was"),
    _column("target", _TEXT, "data set that was tested on"),
    _column("target_fingerprint", _TEXT, "of the target's prepared images and labels"),
    _column("task", _TEXT, "finetune, probe, knn, kd, fid or another task's name"),
    _column("architecture", _TEXT, "network that was evaluated; for fid, the one whose features are compared"),
    _column("resolution", _INT, "pixels a side"),
    _column("label_fraction", _FLOAT, "share of the target's training labels that was used, in (0, 1]"),
    _column("evaluation_seed", _INT, "seed of pre-training and of all that follows"),
    _column("hyperparameters", _TEXT, "the recipe: all hyper-parameters as canonical JSON"),
    _column("metric", _TEXT, "what was measured; empty where there are no numbers. 'accuracy' is a fraction, not a percentage"),
    _column("value", _FLOAT, "the number; null where it is not finite, larger than 1e150, or there is none", nullable=True),
    _column("n_test", _INT, "test examples it was measured on", nullable=True),
    _column("steps", _INT, "optimiser steps that were done", nullable=True),
    _column("seconds", _FLOAT, "wall-clock time", nullable=True),
    _column("device", _TEXT, "what computed it, e.g. 'cpu' or the name of a GPU"),
    _column("peak_memory", _INT, "bytes, of the device", nullable=True),
    _column("trial_path", _TEXT, "where the trial left its logs"),
    _column("commit", _TEXT, "of the code: 40 hex digits, or 'unknown'"),
    _column("dirty", pa.bool_(), "had the code changes that the commit does not hold?"),
    _column("package_versions", _TEXT, "JSON: package to version"),
], metadata={VERSION_KEY: VERSION})
LARGEST = 1e150
"""of a number: a mean of larger ones, or a square, would not be finite"""
SCHEMAS = {"1": SCHEMA.remove(SCHEMA.get_field_index("distillation")), VERSION: SCHEMA}
"""by version, all that can be read"""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is evaluated, and on what; the fields are columns of SCHEMA. hyperparameters, distillation: anything that JSON can hold."""

    method: str
    source: str
    source_fingerprint: str
    target: str
    target_fingerprint: str
    task: str
    architecture: str
    resolution: int
    evaluation_seed: int
    label_fraction: float = 1.0
    distillation_seed: int | None = None
    set_fingerprint: str = ""
    distillation: dict[str, Any] = field(default_factory=dict)
    hyperparameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("method", "task"):
            if not getattr(self, name):
                raise ResultsError(f"{name} = '': a result without it stands in no table; name it")
        if not (isinstance(self.label_fraction, Real) and 0 < self.label_fraction <= 1):
            raise ResultsError(f"label_fraction = {self.label_fraction!r}: must be in (0, 1]; 0.01 is one percent of the labels")
        for name in ("resolution", "evaluation_seed", "distillation_seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "distillation_seed" and value is None):
                raise ResultsError(f"{name} = {value!r}: must be a whole number")
        self.recipe, self.canonical("distillation")  # noqa: B018  (refused now rather than when the cell has been computed)

    @property
    def recipe(self) -> str:
        """The hyper-parameters as canonical JSON."""
        return self.canonical("hyperparameters")

    def canonical(self, name: str) -> str:
        """A dict of the cell as JSON: keys sorted, no spaces. 1 and 1.0 differ, as they may for the code. Raises ResultsError."""
        value = getattr(self, name)
        try:
            return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ResultsError(f"{name} = {value!r}: not JSON ({error}); give finite numbers, texts, lists and dicts") from None

    @property
    def key(self) -> str:
        """Hash of all that the numbers depend on, and of nothing else: 64 hex digits."""
        identity = [self.set_fingerprint, self.architecture, self.target_fingerprint, self.task, self.recipe, float(self.label_fraction),
                    int(self.evaluation_seed)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt at a cell ended; the fields are columns of SCHEMA, None is unknown. metrics: name to number.

    ok: at least one metric is finite. diverged: the last numbers, if there are any. failed: an error, and no numbers.
    """

    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    n_test: int | None = None
    steps: int | None = None
    seconds: float | None = None
    device: str = ""
    peak_memory: int | None = None
    trial_path: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ResultsError(f"status = {self.status!r}: must be one of {', '.join(STATUSES)}")
        wrong = {name: value for name, value in self.metrics.items() if not (isinstance(name, str) and name and isinstance(value, Real))}
        if wrong:
            raise ResultsError(f"metrics = {wrong!r}: must be numbers by name; convert tensors with .item()")
        if self.status == "ok" and not any(map(math.isfinite, self.metrics.values())):
            raise ResultsError(f"metrics = {self.metrics!r}: status ok needs a finite one; say 'diverged' instead")
        if self.status == "failed" and (self.metrics or not self.error):
            raise ResultsError(f"error = {self.error!r}, metrics = {self.metrics!r}: status failed needs an error and no metrics; "
                               f"say 'diverged' where there are last numbers")


def rows(cell: Cell, outcome: Outcome, *, attempt: str, finished: datetime, revision: Revision, versions: dict[str, str]) -> pa.Table:
    """One attempt as a table: a row a metric, or one without a number. finished: with its time zone."""
    shared = {name: value for name, value in (vars(cell) | vars(outcome)).items() if name in SCHEMA.names} | {
        "cell": cell.key, "attempt": attempt, "finished": finished, "hyperparameters": cell.recipe,
        "distillation": cell.canonical("distillation"), "commit": revision.commit,
        "dirty": revision.dirty, "package_versions": json.dumps(versions, sort_keys=True)}
    shared = {name: _storable(value) if isinstance(value, str) else value for name, value in shared.items()}
    numbers = {_storable(name): float(value) if abs(float(value)) <= LARGEST else None for name, value in outcome.metrics.items()}
    return pa.Table.from_pylist([shared | {"metric": name, "value": value} for name, value in (numbers or {NO_METRIC: None}).items()],
                                schema=SCHEMA)


def upgrade(table: pa.Table) -> pa.Table:
    """The rows of a file of any of SCHEMAS, as SCHEMA has them."""
    if "distillation" not in table.column_names:
        place = SCHEMA.get_field_index("distillation")
        table = table.add_column(place, SCHEMA.field(place), pa.array([UNKNOWN] * len(table), pa.string()))
    return table.replace_schema_metadata(SCHEMA.metadata)


@cache
def package_versions() -> dict[str, str]:
    """Versions of the packages that numbers may depend on, as far as they are installed; imports none of them."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _storable(text: str) -> str:
    """Text as UTF-8 can hold it: an error about a file with an odd name must not keep the error from being stored."""
    return text.encode("utf-8", "replace").decode("utf-8")

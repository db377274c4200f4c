"""Trials: the attempts behind a place of a table, one of them in full, and what Ray Tune is doing now. Writes no HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from krrst_dist.explorer.library import Library
from krrst_dist.explorer.overview import Query, named
from krrst_dist.explorer.tune_records import Experiment
from krrst_dist.results.tables import PaperTable
from krrst_dist.setting_names import flatten
from krrst_dist.storage import StorageError

PAGE = 100
"""attempts on a page"""
IDENTITY = ("method", "source", "target", "task", "architecture", "label_fraction", "distillation_seed", "evaluation_seed")
COLUMNS = 8
"""settings that differ, at most, that have a column where trials do not stand in one place"""
OVERLAID = 20
"""attempts at most whose learning curves are laid over each other"""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell. values: by metric. settings: the recipe and how the set was made, by dotted name."""

    about: dict[str, Any]
    values: dict[str, float | None]
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return self.about["attempt"]

    @property
    def resources(self) -> list[str]:
        """What it took, as far as it is known."""
        about, memory = self.about, self.about["peak_memory"]
        known = {"": about["device"], "s": about["seconds"] and f"{about['seconds']:.4g}", "steps": about["steps"],
                 "test images": about["n_test"], "MiB": memory and f"{memory / 2**20:,.0f}"}
        return [f"{value} {unit}".strip() for unit, value in known.items() if value]


def at_place(tables: Sequence[PaperTable], query: Query) -> tuple[PaperTable | None, set[str]]:
    """The table and the cells that a place of it stands for (`overview.Place.query`); (None, set()) where there is no such place."""
    table = named(tables, query.get("table", ""))
    there = table.places.get((query.get("row", ""), query.get("column", ""))) if table else None
    return (table, {run.about["cell"] for run in there}) if there else (None, set())


def keys(everything: pa.Table, cells: set[str] | None) -> list[str]:
    """The attempts at some cells (None: at all), the newest first. everything: the oldest first."""
    attempts = everything["attempt"]
    if cells is not None:
        attempts = attempts.filter(pc.is_in(everything["cell"], pa.array(sorted(cells), pa.string())))
    return attempts.unique().to_pylist()[::-1]


def attempts(everything: pa.Table, wanted: Sequence[str]) -> list[Attempt]:
    """Those of these keys that there are, in the order of the keys."""
    found: dict[str, Attempt] = {}
    for row in everything.filter(pc.is_in(everything["attempt"], pa.array(wanted, pa.string()))).to_pylist():
        if row["attempt"] not in found:
            settings = flatten({"hyperparameters": json.loads(row["hyperparameters"]), "distillation": json.loads(row["distillation"])})
            found[row["attempt"]] = Attempt(row, {}, settings)
        if row["metric"]:
            found[row["attempt"]].values[row["metric"]] = row["value"]
    return [found[key] for key in wanted if key in found]


def one(everything: pa.Table, key: str) -> Attempt | None:
    """The attempt of that key."""
    return next(iter(attempts(everything, [key])), None)


def differing(found: Sequence[Attempt]) -> list[str]:
    """The settings in which attempts differ."""
    names = sorted({name for each in found for name in each.settings})
    return [name for name in names if len({json.dumps(each.settings.get(name)) for each in found}) > 1]


def telling(found: Sequence[Attempt]) -> list[str]:
    """The columns of IDENTITY in which attempts differ; all of them for a single one."""
    return [name for name in IDENTITY if len(found) < 2 or len({each.about[name] for each in found}) > 1]


def curves(library: Library, found: Sequence[Attempt]) -> list[tuple[str, list[tuple[float, float]]]]:
    """(title, (step, loss) points) of those attempts whose trials can be found."""
    made = []
    for each in found:
        points = [(line["step"], line["loss"]) for line in library.tune.curve(each.about["trial_path"])
                  if all(isinstance(line.get(name), int | float) and abs(line[name]) < 1e300 for name in ("step", "loss"))]
        if points:
            about = each.about
            seeds = "".join(f", {name} {about[column]}" for name, column in (("set", "distillation_seed"), ("seed", "evaluation_seed"))
                            if about[column] is not None)
            made.append((f"{about['method']}, {about['target']}{seeds}", points))
    return made


def experiments(library: Library, most: int = 6) -> list[Experiment]:
    """The newest of those that can be read."""
    found = []
    for name in library.tune.experiments()[:most]:
        with suppress(StorageError):
            found.append(library.tune.experiment(name))
    return found

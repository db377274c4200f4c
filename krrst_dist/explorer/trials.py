"""Trials: the attempts behind a place of a table, one of them in full, and what Ray Tune is doing now. Writes no HTML."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from krrst_dist.config import flatten
from krrst_dist.explorer.library import Library, Trial
from krrst_dist.explorer.overview import Query, chosen, named, tables
from krrst_dist.results import layout
from krrst_dist.results.tables import PaperTable, Run

PAGE = 100
"""attempts on a page"""
IDENTITY = ("method", "source", "target", "task", "architecture", "label_fraction", "distillation_seed", "evaluation_seed")
RESOURCES = ("device", "seconds", "steps", "n_test", "peak_memory")


@dataclass(frozen=True)
class Attempt:
    """One attempt at a cell. values: by metric. settings: the recipe and how the set was made, by dotted name."""

    about: dict[str, Any]
    values: dict[str, float | None]
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        return self.about["attempt"]


def at_place(runs: Sequence[Run], query: Query) -> tuple[PaperTable | None, set[str]]:
    """The table and the cells that a place of it stands for (`overview.Place.query`); (None, set()) where there is no such place."""
    left = chosen(runs, query)
    table, method, column = named(tables(left, query), query.get("table", "")), query.get("row", ""), query.get("column", "")
    if table is None:
        return None, set()
    return table, {run.about["cell"] for run in in_column(left, table, column) if run.about["method"] == method}


def in_column(runs: Sequence[Run], table: PaperTable, column: str) -> list[Run]:
    """The runs that stand in a column of a table."""
    across = layout.across(table.subject.task)
    return [run for run in runs if run.about[across] == column and _fits(run, table)]


def _fits(run: Run, table: PaperTable) -> bool:
    """Does a run stand in this table? Where nothing was distilled, its source does not matter."""
    own, subject = layout.Subject.of(run.about), table.subject
    if not run.about["set_fingerprint"] and run.about["task"] != "fid":
        own, subject = own._replace(source=""), subject._replace(source="")
    return own == subject


def attempts(everything: pa.Table, cells: set[str] | None) -> list[Attempt]:
    """All attempts at some cells (None: at all), the newest first."""
    if cells is not None:
        everything = everything.filter(pc.is_in(everything["cell"], pa.array(sorted(cells), pa.string())))
    found: dict[str, Attempt] = {}
    for row in everything.to_pylist():
        if row["attempt"] not in found:
            settings = flatten({"hyperparameters": json.loads(row["hyperparameters"]), "distillation": json.loads(row["distillation"])})
            found[row["attempt"]] = Attempt(row, {}, settings)
        if row["metric"]:
            found[row["attempt"]].values[row["metric"]] = row["value"]
    return list(reversed(found.values()))


def one(everything: pa.Table, key: str) -> Attempt | None:
    """The attempt of that key."""
    found = attempts(everything.filter(pc.equal(everything["attempt"], key)), None)
    return found[0] if found else None


def differing(found: Sequence[Attempt]) -> list[str]:
    """The settings in which attempts differ."""
    names = sorted({name for each in found for name in each.settings})
    return [name for name in names if len({json.dumps(each.settings.get(name)) for each in found}) > 1]


def curves(library: Library, found: Sequence[Attempt]) -> list[tuple[str, list[tuple[float, float]]]]:
    """(title, (step, loss) points) of those attempts whose trials can be found."""
    made = []
    for each in found:
        points = [(line["step"], line["loss"]) for line in library.curve(each.about["trial_path"])
                  if isinstance(line.get("step"), int) and isinstance(line.get("loss"), int | float)]
        if points:
            about = each.about
            seeds = "".join(f", {name} {about[column]}" for name, column in (("set", "distillation_seed"), ("seed", "evaluation_seed"))
                            if about[column] is not None)
            made.append((f"{about['method']}, {about['target']}{seeds}", points))
    return made


@dataclass(frozen=True)
class Experiment:
    """One of Ray Tune's, as it is now."""

    name: str
    trials: list[Trial]

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state."""
        return dict(Counter(trial.state for trial in self.trials))


def experiments(library: Library, most: int = 6) -> list[Experiment]:
    """The newest."""
    return [Experiment(name, library.trials(name)) for name in library.experiments()[:most]]

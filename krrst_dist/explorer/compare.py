"""Comparing methods in one table: bars with error bars, every run as a point, Welch's test, and what settings do. Writes no HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from krrst_dist.explorer import charts
from krrst_dist.explorer.charts import Format
from krrst_dist.results import render
from krrst_dist.results.tables import PaperTable, Run
from krrst_dist.setting_names import flatten

SHOWN = 40
"""methods in a chart: drawing is slow, and nobody tells more of them apart"""
MOST, LINES = 6, 300
"""settings that parallel coordinates show, and runs"""


@dataclass(frozen=True)
class Welch:
    """Two-sided: is one method's mean another's? n: seeds of the two. p is None where either has fewer than two, or no spread."""

    column: str
    first: str
    second: str
    n: tuple[int, int]
    difference: float
    p: float | None


def unit(table: PaperTable) -> str:
    """What its numbers are, for an axis."""
    return f"{table.metric} [%]" if "accuracy" in table.metric else table.metric


def scale(table: PaperTable) -> float:
    """Factor on stored numbers for people."""
    return 100.0 if "accuracy" in table.metric else 1.0


def methods(table: PaperTable, asked: Sequence[str]) -> list[str]:
    """Those of a table that were asked for; all, where none was; SHOWN at most."""
    return ([method for method in table.methods if method in asked] or list(table.methods))[:SHOWN]


def bars(table: PaperTable, chosen: Sequence[str], format: Format = "svg") -> bytes:
    """Means and population standard deviations."""
    def numbers(name: str) -> np.ndarray:
        found = [[getattr(table.entry(method, column), name) for column in table.columns] for method in chosen]
        return scale(table) * np.array([[np.nan if value is None else value for value in row] for row in found], float)

    return charts.bars(render.title(table), chosen, table.columns, numbers("mean"), numbers("std"), unit(table), format)


def scatter(table: PaperTable, column: str, chosen: Sequence[str], format: Format = "svg") -> bytes:
    """Every run in one column."""
    values = [[scale(table) * value for value in table.entry(method, column).values] for method in chosen]
    return charts.scatter(f"{column}: every run", chosen, values, unit(table), format)


def tests(table: PaperTable, chosen: Sequence[str]) -> list[Welch]:
    """The best of the chosen methods against each other one, column by column; over distillation seeds, as runs of one set are not
    independent."""
    from scipy.stats import ttest_ind  # slow to import

    table, found = replace(table, over="distillation"), []
    for column in table.columns:
        ranked = [method for method in table.ranking(column) if method in chosen]
        for other in ranked[1:]:
            best, rest = table.entry(ranked[0], column), table.entry(other, column)
            possible = min(best.n, rest.n) > 1 and bool(best.std or rest.std)
            p = float(ttest_ind(best.values, rest.values, equal_var=False).pvalue) if possible else None
            found.append(Welch(column, ranked[0], other, (best.n, rest.n), scale(table) * (best.mean - rest.mean), p))
    return found


def differing(table: PaperTable, chosen: Sequence[str]) -> list[str]:
    """The settings in which the chosen methods' runs of a table's first column differ that have a number, those with the fewest values
    first; at most MOST."""
    return _names(_given(_with_numbers(table, chosen)))


def settings(table: PaperTable, chosen: Sequence[str], format: Format = "svg") -> bytes | None:
    """Parallel coordinates of those runs: the settings in which they differ, then the number; of LINES of them at most, evenly chosen.
    None where they differ in none."""
    if not (names := differing(table, chosen)):
        return None
    there = _with_numbers(table, chosen)
    there = there[::-(-len(there) // LINES) or 1]
    given = _given(there)
    rows = [[_coordinate(each.get(name), [other.get(name) for other in given]) for name in names] for each in given]
    values = [scale(table) * run.values[table.metric] for run in there]
    return charts.parallel(f"{table.columns[0]}: settings and {table.metric}", names, rows, values, unit(table), format)


def _with_numbers(table: PaperTable, chosen: Sequence[str]) -> list[Run]:
    in_first = [run for method in chosen for run in table.places.get((method, table.columns[0]), ())]
    return [run for run in in_first if run.values.get(table.metric) is not None and run.about["status"] == "ok"]


def _given(there: Sequence[Run]) -> list[dict[str, object]]:
    """The settings of each run, by dotted name; many runs have the same ones."""
    known: dict[tuple[str, ...], dict[str, object]] = {}
    found = []
    for run in there:
        key = run.about["distillation"], run.about["hyperparameters"], run.about["method"]
        if key not in known:
            known[key] = flatten({"set": json.loads(key[0]), "recipe": json.loads(key[1])}) | {"method": key[2]}
        found.append(known[key])
    return found


def _names(given: Sequence[dict[str, object]]) -> list[str]:
    given = list({id(each): each for each in given}.values())  # equal ones once
    names = {name for each in given for name in each if sum(each.get(name) is not None for each in given) > len(given) / 2}
    counts = {name: len({json.dumps(each.get(name)) for each in given}) for name in names}
    names = [name for name, count in counts.items() if count > 1]
    return sorted(names, key=lambda name: (name != "method", counts[name], name))[:MOST]


def _coordinate(value: object, all_of_it: Sequence[object]) -> str | float:
    """A number where all are numbers, else text."""
    if all(isinstance(each, int | float) and not isinstance(each, bool) for each in all_of_it):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value)

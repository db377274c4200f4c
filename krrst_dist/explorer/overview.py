"""The first page: the paper's tables as the results fill them, narrowed down by filters. Works out what stands where; writes no HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from krrst_dist.results import render
from krrst_dist.results.tables import PaperTable, Run, paper_tables

FILTERS = {"source": "source", "task": "task", "target": "target", "architecture": "architecture", "label_fraction": "share of labels",
           "method": "method", "distillation_seed": "distillation seed", "evaluation_seed": "evaluation seed", "commit": "commit"}
"""columns that can be filtered by, and what they are called"""
SPREADS: Mapping[str, str] = {"": "as usual", "evaluation": "all runs", "distillation": "distillation seeds"}
"""what the spread can be over; as usual: what `paper_tables` takes where nothing is said"""
PAGE = 12
"""tables on a page"""
Query = Mapping[str, str]
"""what a page was asked for: names and values of its address"""


@dataclass(frozen=True)
class Place:
    """One place of a table. query: of the page with its trials."""

    text: str
    state: str
    best: bool
    advantage: str
    query: dict[str, str]


@dataclass(frozen=True)
class Shown:
    """A table as it is shown. title: also its name in the addresses of other pages. p: of each column, where tests are asked for."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Place]]]
    p: Sequence[str]
    notes: Sequence[str]
    table: PaperTable


def as_shown(value: Any, column: str) -> str:
    """A run's value as a filter shows it; '' where it has none."""
    if value is None:
        return ""
    return str(value)[:12] if column == "commit" else f"{value:g}" if isinstance(value, float) else str(value)


def chosen(runs: Sequence[Run], query: Query) -> list[Run]:
    """The runs that all filters let through.

    Those without a set stand in the tables of every source and distillation seed, and those of the baseline beside every method.
    """
    always = {"source": "", "distillation_seed": "", "method": query.get("against")}
    wanted = {name: (query[name], always.get(name)) for name in FILTERS if query.get(name)}
    return [run for run in runs if all(as_shown(run.about[name], name) in values for name, values in wanted.items())]


def options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Per filter, the values there are; filters that would change nothing are left out."""
    there = {name: {run.about[name] for run in runs} for name in FILTERS}
    found = {name: sorted({as_shown(value, name) for value in values} - {""}, key=_by_number) for name, values in there.items()}
    return {name: values for name, values in found.items() if len(values) > 1}


def asked(query: Query) -> tuple[tuple[str, str], ...]:
    """The part of a query that the tables depend on."""
    return tuple((name, query[name]) for name in (*FILTERS, "over", "against") if query.get(name))


def tables(runs: Sequence[Run], query: Query) -> list[PaperTable]:
    """The tables that a query asks for."""
    left = chosen(runs, query)
    over, against = query.get("over"), query.get("against", "")
    compared = any(run.about["method"] == against for run in left)
    return paper_tables(left, over=over if over in SPREADS else None, against=against if compared else "")


def shown(found: Sequence[PaperTable]) -> list[Shown]:
    """As people see them."""
    return [_shown(table) for table in found]


def named(found: Sequence[PaperTable], title: str) -> PaperTable | None:
    """The table of that title."""
    return next((table for table in found if render.title(table) == title), None)


def _shown(table: PaperTable) -> Shown:
    best = {column: table.best(column) for column in table.columns}
    rows = [(method, [_place(table, method, column, method in best[column]) for column in table.columns])
            for method in table.methods]
    return Shown(render.title(table), table.columns, rows, render.p_values(table), render.notes(table), table)


def _place(table: PaperTable, method: str, column: str, best: bool) -> Place:
    return Place(render.place(table, method, column), table.entry(method, column).state, best, render.advantage(table, method, column),
                 {"table": render.title(table), "row": method, "column": column})


def _by_number(text: str) -> tuple[Any, ...]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text.casefold()

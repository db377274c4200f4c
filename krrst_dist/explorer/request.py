"""What a page is asked for, and what it may answer.

Whatever is asked for by name is looked for among what was listed, so that nothing outside the library can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from krrst_dist.explorer import overview, pages, trials
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.results import render
from krrst_dist.results.tables import PaperTable


@dataclass(frozen=True)
class File:
    """What is not a page."""

    body: bytes
    kind: str
    name: str = ""
    """to be saved under; '' for what a page shows"""


class NotThere(LookupError):
    """Says what is not there."""


Answer = str | File
Page = Callable[["Request"], Answer]


@dataclass(frozen=True)
class Request:
    """What a page is asked for."""

    library: Library
    query: dict[str, str]
    methods: list[str]
    part: str
    """the changing part of the address"""

    @property
    def tables(self) -> list[PaperTable]:
        """Those that are asked for."""
        return self.library.once(overview.asked(self.query), lambda runs: overview.tables(runs, self.query))

    def page(self, template: str, here: str, title: str, **values: Any) -> str:
        """A page of ours."""
        return pages.render(template, here=here, title=title, uri=self.library.uri, problem=values.pop("problem", self.library.problem),
                            query=self.query, kept=dict(overview.asked(self.query)), **values)

    @property
    def table(self) -> PaperTable | None:
        """The one that is asked for by its title."""
        return overview.named(self.tables, self.query.get("table", ""))

    @property
    def files(self) -> SetFiles:
        """Those of the distillation run that is asked for. Raises NotThere."""
        place = self.library.set_place(self.query.get("name", ""))
        if place is None:
            raise NotThere("there is no distillation run of that name")
        return SetFiles(place)

    def cells(self) -> tuple[set[str] | None, str]:
        """The cells whose trials are asked for, None for all, and the place of a table that they stand in, '' where it is none. Raises
        NotThere."""
        if "table" in self.query:
            table, cells = trials.at_place(self.tables, self.query)
            if table is None:
                raise NotThere("there is no such place in the tables any more; go back to the overview")
            return cells, f"{self.query.get('row')}, {self.query.get('column')}: {render.title(table)}."
        if any(self.query.get(name) for name in overview.FILTERS):
            return {run.about["cell"] for run in overview.chosen(self.library.runs, self.query)}, ""
        return None, ""

    def attempts(self, cells: set[str] | None) -> tuple[list[trials.Attempt], int, int]:
        """The attempts at these cells on the page of them that is asked for, which page that is, and how many there are."""
        everything = self.library.attempts
        keys = trials.keys(everything, cells)
        page, last, part = self.place(len(keys), trials.PAGE)
        return trials.attempts(everything, keys[part]), page, last

    def place(self, count: int, size: int) -> tuple[int, int, slice]:
        """Of a list of so many that is shown `size` at a time: the page that is asked for, how many there are, what is on it."""
        last = -(-count // size)
        page = min(self.number("page", 0), max(0, last - 1))
        return page, last, slice(page * size, (page + 1) * size)

    def number(self, name: str, otherwise: int) -> int:
        """A whole number of the address."""
        text = self.query.get(name, "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else otherwise


def encoded(text: str) -> bytes:
    """A result may hold what no text may: half a character."""
    return text.encode("utf-8", "replace")

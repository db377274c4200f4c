"""The same tables, charts and images as one HTML file that opens anywhere, without a server or a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources

from krrst_dist.artifacts import ArtifactError
from krrst_dist.explorer import compare, overview, pages, pictures
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.overview import Query
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.results.tables import PaperTable
from krrst_dist.storage import StorageError

IMAGES = 100
"""of each set"""


def html(library: Library, tables: Sequence[PaperTable], query: Query) -> str:
    """The report. query: that let these tables through."""
    found = overview.shown(tables)
    charts = [pages.picture(compare.bars(one.table, compare.methods(one.table, ())), f"bars: {one.title}")
              for one in found if one.table.ranked]
    style = resources.files(__package__).joinpath("static", "style.css").read_text()
    return pages.render("report.html", title="Results", uri=library.uri, problem=library.problem, query=query, tables=found, links=False,
                        charts=charts, sheets=_sheets(library), style=pages.Markup(style), date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")


def _sheets(library: Library) -> list[tuple[str, str]]:
    """(name, data address) of the images of each set that can be read."""
    found = []
    for place in library.sets():
        try:
            held = SetFiles(place).load("distilled")
            made = f"{held.metadata['method']}: {place.name}" if "method" in held.metadata else place.name
            sheet = pictures.overview(held, columns=20, zoom=max(1, round(48 / max(1, held.x_syn.shape[-1]))), most=IMAGES)
        except (FileNotFoundError, ArtifactError, StorageError):
            continue
        found.append((made, "data:image/png;base64," + base64.b64encode(sheet).decode()))
    return found

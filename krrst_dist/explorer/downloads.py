"""What a page shows or offers as a file: images, charts, tables, sets."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from krrst_dist import storage
from krrst_dist.explorer import charts, compare, overview, pictures, report, trials
from krrst_dist.explorer.request import Answer, File, NotThere, Request, encoded
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.explorer.torch_export import as_pt
from krrst_dist.results import render
from krrst_dist.results.commands import FORMATS
from krrst_dist.results.tables import PaperTable

CHARTS = {"svg": "image/svg+xml", "png": "image/png"}
CURVES = "learning curves"
_TEXT = {"csv": "text/csv", "tex": "application/x-tex", "md": "text/markdown"}
HISTORIES: dict[str, tuple[str, Callable[[SetFiles, charts.Format], bytes | None]]] = {
    "losses": ("Losses", pictures.losses), "learning_rate": ("Learning rate", pictures.learning_rate)}
"""charts of a distillation run"""
COMPARISONS: dict[str, Callable[[PaperTable, list[str], str, charts.Format], bytes | None]] = {
    "bars": lambda table, chosen, column, kind: compare.bars(table, chosen, kind),
    "scatter": lambda table, chosen, column, kind: compare.scatter(table, column, chosen, kind) if column in table.columns else None,
    "settings": lambda table, chosen, column, kind: compare.settings(table, chosen, kind)}
"""charts of a table"""


def show_image(request: Request) -> Answer:
    """One image of a set, or a real one of its feature map, as PNG."""
    try:
        images = request.files.images(request.query.get("which", "distilled"))
        return File(pictures.png(images, int(request.query.get("index", ""))), "image/png")
    except (ValueError, LookupError, FileNotFoundError):
        raise NotThere("there is no such image") from None


def show_points(request: Request) -> Answer:
    """A set's feature map, as JSON."""
    found = request.files.feature_map
    if found is None:
        raise NotThere("there is no feature map of that run")
    return File(pictures.points(found), "application/json")


def download(request: Request) -> Answer:
    """Tables, charts, sets."""
    library, (name, _, kind) = request.library, request.part.partition(".")
    if name == "results" and kind == "parquet":
        cells = sorted({run.about["cell"] for run in overview.chosen(library.runs, request.query)})
        rows = library.results
        return File(FORMATS["parquet"](rows.filter(pc.is_in(rows["cell"], pa.array(cells, pa.string())))),
                    "application/vnd.apache.parquet", "results.parquet")
    if name == "results" and kind in _TEXT:
        write = {"csv": render.to_csv, "tex": render.to_latex, "md": render.to_markdown}[kind]
        return File(encoded(write(request.tables)), _TEXT[kind], request.part)
    if request.part == "report.html":
        return File(encoded(report.html(library, request.tables, request.query)), "text/html", "report.html")
    if name in COMPARISONS and kind in CHARTS and (table := request.table):
        if drawn := COMPARISONS[name](table, compare.methods(table, request.methods), request.query.get("column", ""), kind):
            return File(drawn, CHARTS[kind], request.part)
    if request.part == "set.zip":
        return File(pictures.archive(request.files.load("distilled")), "application/zip", "set.zip")
    if request.part in ("set.safetensors", "set-pt.zip"):
        files = request.files
        files.load("distilled")  # nothing else is sent
        uri = storage.join(files.place.uri, "distilled.safetensors")
        return (File(as_pt(uri), "application/zip", request.part) if kind == "zip" else
                File(storage.read_whole(uri), "application/octet-stream", "distilled.safetensors"))
    if name == "features" and kind in CHARTS and (found := request.files.feature_map):
        return File(pictures.feature_chart(found, kind), CHARTS[kind], request.part)
    if name in HISTORIES and kind in CHARTS and (drawn := HISTORIES[name][1](request.files, kind)):
        return File(drawn, CHARTS[kind], request.part)
    if name == "curves" and kind in CHARTS and (found := trials.curves(library, _overlaid(request))):
        return File(charts.lines(CURVES, found, "step", "training loss", kind), CHARTS[kind], request.part)
    raise NotThere("there is nothing of that name to download")


def _overlaid(request: Request) -> list[trials.Attempt]:
    """The attempts whose learning curves are asked for: a single one, or those that a page of trials lays over each other."""
    if "trial" in request.query:
        return trials.attempts(request.library.attempts, [request.query["trial"]])
    return request.attempts(request.cells()[0])[0][:trials.OVERLAID]

"""Sends the pages: which address shows what, and who may ask. Every question is a GET, and nothing of what is shown is ever
written to or run.

It listens on loopback unless told otherwise, and then answers only to names of this machine, so that a page elsewhere cannot read it
through the user's browser. Reading and drawing are done in threads, so that one slow storage does not stop the others' pages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from aiohttp import web

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError
from krrst_dist.explorer import charts, compare, overview, pages, pictures, report, trials
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.explorer.set_list import listed, made_with
from krrst_dist.explorer.set_page import Seen, title
from krrst_dist.explorer.torch_export import as_pt
from krrst_dist.results import render
from krrst_dist.results.commands import FORMATS
from krrst_dist.results.tables import PaperTable

POLICY = ("default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
log = logging.getLogger(__name__)
CHARTS = {"svg": "image/svg+xml", "png": "image/png"}
CURVES = "learning curves"
_TEXT = {"csv": "text/csv", "tex": "application/x-tex", "md": "text/markdown"}


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


def show_overview(request: Request) -> Answer:
    """The tables."""
    shown, page, last = _tables(request)
    return request.page("overview.html", "/", "Overview", tables=shown, links=True, path="/", page=page, pages=last, tabular=True,
                        **_filters(request.library))


def show_tables(request: Request) -> Answer:
    """The part of the first page that is refreshed."""
    return pages.render("tables.html", tables=_tables(request)[0], links=True, query=request.query)


def _tables(request: Request) -> tuple[list[overview.Shown], int, int]:
    """The tables on a page of them, which page that is, and how many there are."""
    found = request.tables
    last = -(-len(found) // overview.PAGE)
    page = _page(request, last)
    return overview.shown(found[page * overview.PAGE:(page + 1) * overview.PAGE]), page, last


def _filters(library: Library) -> dict[str, Any]:
    """What the form of filters shows."""
    return {"options": library.once("options", overview.options), "filters": overview.FILTERS, "spreads": overview.SPREADS,
            "methods": library.once("methods", lambda runs: sorted({run.about["method"] for run in runs}))}


def show_trials(request: Request) -> Answer:
    """Attempts: all of them, those that filters let through, or those behind a place of a table."""
    library = request.library
    cells, place = _cells(request)
    there, page, last = _attempts(request, cells)
    curves = trials.curves(library, there[:trials.OVERLAID]) if cells is not None else []
    differing = trials.differing(there)
    return request.page("trials.html", "/trials", "Trials", attempts=there, identity=trials.telling(there), place=place, path="/trials",
                        differing=differing if place or len(differing) <= trials.COLUMNS else [], unlike=len(differing), page=page,
                        pages=last, overlaid=cells is not None,
                        experiments=[] if place else trials.experiments(library), chart=_learning_curves(curves), most=trials.OVERLAID,
                        tabular=False, **_filters(library))


def _cells(request: Request) -> tuple[set[str] | None, str]:
    """The cells that trials are asked for of, None for all, and the place of a table that they stand in, '' where it is none."""
    if "table" in request.query:
        table, cells = trials.at_place(request.tables, request.query)
        if table is None:
            raise NotThere("there is no such place in the tables any more; go back to the overview")
        return cells, f"{request.query.get('row')}, {request.query.get('column')}: {render.title(table)}."
    if any(request.query.get(name) for name in overview.FILTERS):
        return {run.about["cell"] for run in overview.chosen(request.library.runs, request.query)}, ""
    return None, ""


def _attempts(request: Request, cells: set[str] | None) -> tuple[list[trials.Attempt], int, int]:
    """The attempts on a page of them, which page that is, and how many there are."""
    everything = request.library.attempts
    keys = trials.keys(everything, cells)
    last = -(-len(keys) // trials.PAGE)
    page = _page(request, last)
    return trials.attempts(everything, keys[page * trials.PAGE:(page + 1) * trials.PAGE]), page, last


def show_experiments(request: Request) -> Answer:
    """What Ray Tune is doing: the part of the page that is refreshed."""
    return pages.render("experiments.html", experiments=trials.experiments(request.library))


def show_trial(request: Request) -> Answer:
    """One attempt."""
    library = request.library
    one = trials.one(library.attempts, request.part)
    if one is None:
        raise NotThere("there is no such trial")
    others = trials.attempts(library.attempts, trials.keys(library.attempts, {one.about["cell"]}))
    made = made_with(library.sets(), one.about["distillation"], one.about["distillation_seed"])
    return request.page("trial.html", "/trials", f"Trial {one.key[:8]}", one=one, others=others, identity=trials.IDENTITY, set=made,
                        chart=_learning_curves(trials.curves(library, [one])), error=library.tune.error(one.about["trial_path"]),
                        log=library.tune.log(one.about["trial_path"]))


def show_compare(request: Request) -> Answer:
    """Methods side by side."""
    found = request.tables
    if not found:
        return request.page("compare.html", "/compare", "Compare", tables=[])
    one = overview.named(found, request.query.get("table", "")) or found[0]
    chosen, title = compare.methods(one, request.methods), render.title(one)
    return request.page(
        "compare.html", "/compare", "Compare", tables=[render.title(each) for each in found], one=one, this=title, chosen=chosen,
        welch=compare.tests(one, chosen), unit=compare.unit(one),
        settings_differ=bool(compare.differing(one, chosen)), charts=request.query | {"table": title, "method_": request.methods})


def show_sets(request: Request) -> Answer:
    """All distillation runs."""
    return request.page("sets.html", "/sets", "Distilled sets", sets=listed(request.library.sets()))


def show_set(request: Request) -> Answer:
    """One distillation run."""
    files = _files(request)
    seen = Seen.of(files)
    last = -(-seen.count // pictures.PAGE)
    page = _page(request, last)
    curves = [(name, title, pages.picture(drawn, f"{title} by meta-update")) for name, (title, draw) in HISTORIES.items()
              if (drawn := draw(files, "svg"))]
    return request.page(
        "set.html", "/sets", seen.title, note=seen.note, problem=" ".join(seen.problems), held=seen.held, map=seen.map, labels=seen.labels,
        zooms=pictures.ZOOMS, zoom=next((each for each in pictures.ZOOMS if str(each) == request.query.get("zoom")), 96), path="/set",
        page=page, pages=last, indices=range(page * pictures.PAGE, min((page + 1) * pictures.PAGE, seen.count)),
        moments=[(moment, title(moment)) for moment in seen.moments],
        at=min(_number(request, "at", len(seen.moments)), len(seen.moments) - 1), where=files.place.uri,
        started="start" in request.query and "start.safetensors" in files.names,
        nearest="nearest" in request.query and seen.map is not None,
        charts=curves, about=pictures.about(seen.held) if seen.held else None)


def show_image(request: Request) -> Answer:
    """One image of a set, or a real one of its feature map, as PNG."""
    try:
        images = _files(request).images(request.query.get("which", "distilled"))
        return File(pictures.png(images, int(request.query.get("index", ""))), "image/png")
    except (ValueError, LookupError, FileNotFoundError):
        raise NotThere("there is no such image") from None


HISTORIES: dict[str, tuple[str, Callable[[SetFiles, charts.Format], bytes | None]]] = {
    "losses": ("Losses", pictures.losses), "learning_rate": ("Learning rate", pictures.learning_rate)}
"""charts of a distillation run"""
COMPARISONS: dict[str, Callable[[PaperTable, list[str], str, charts.Format], bytes | None]] = {
    "bars": lambda table, chosen, column, kind: compare.bars(table, chosen, kind),
    "scatter": lambda table, chosen, column, kind: compare.scatter(table, column, chosen, kind) if column in table.columns else None,
    "settings": lambda table, chosen, column, kind: compare.settings(table, chosen, kind)}
"""charts of a table"""


def show_points(request: Request) -> Answer:
    """A set's feature map, as JSON."""
    found = _files(request).feature_map
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
        return File(_encoded(write(request.tables)), _TEXT[kind], request.part)
    if request.part == "report.html":
        return File(_encoded(report.html(library, request.tables, request.query)), "text/html", "report.html")
    if name in COMPARISONS and kind in CHARTS and (table := _table(request)):
        if drawn := COMPARISONS[name](table, compare.methods(table, request.methods), request.query.get("column", ""), kind):
            return File(drawn, CHARTS[kind], request.part)
    if request.part == "set.zip":
        return File(pictures.archive(_files(request).load("distilled")), "application/zip", "set.zip")
    if request.part == "set.safetensors":
        files = _files(request)
        files.load("distilled")  # nothing else is sent
        return File(storage.read_whole(storage.join(files.place.uri, "distilled.safetensors")), "application/octet-stream",
                    "distilled.safetensors")
    if request.part == "set-pt.zip":
        files = _files(request)
        files.load("distilled")
        return File(as_pt(storage.join(files.place.uri, "distilled.safetensors")), "application/zip", request.part)
    if name == "features" and kind in CHARTS and (found := _files(request).feature_map):
        return File(pictures.feature_chart(found, kind), CHARTS[kind], request.part)
    if name in HISTORIES and kind in CHARTS and (drawn := HISTORIES[name][1](_files(request), kind)):
        return File(drawn, CHARTS[kind], request.part)
    if name == "curves" and kind in CHARTS and (found := trials.curves(library, _overlaid(request))):
        return File(charts.lines(CURVES, found, "step", "training loss", kind), CHARTS[kind], request.part)
    raise NotThere("there is nothing of that name to download")


def show_nothing(request: Request) -> Answer:
    """Every other address."""
    raise NotThere("there is no page of that address")


PAGES: dict[str, Page] = {"/": show_overview, "/tables": show_tables, "/trials": show_trials, "/experiments": show_experiments,
                          "/trial/{part}": show_trial, "/compare": show_compare, "/sets": show_sets, "/set": show_set,
                          "/image.png": show_image, "/points.json": show_points, "/download/{part}": download}


def application(library: Library, *, hosts: frozenset[str] | None) -> web.Application:
    """The web application. hosts: names that it answers to; None: all."""
    app = web.Application(middlewares=[_guard(hosts)])
    for path, page in PAGES.items():
        app.router.add_get(path, _handler(library, page))
    app.router.add_get("/static/{part}", _static)
    app.router.add_get("/{part:.*}", _handler(library, show_nothing))
    return app


def hosts_of(address: str) -> frozenset[str] | None:
    """The names that a server at an address answers to: those of loopback for loopback, else all."""
    loopback = address == "localhost" or (_is_ip(address) and ipaddress.ip_address(address).is_loopback)
    return frozenset({"localhost", "127.0.0.1", "[::1]", address}) if loopback else None


def _handler(library: Library, page: Page) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    def answer(request: Request) -> tuple[int, Answer]:
        if page is not show_image:
            library.refresh()
        try:
            return 200, page(request)
        except NotThere as error:
            return 404, request.page("base.html", "", "Not there", problem=f"{error}.")
        except FileNotFoundError:
            return 404, request.page("base.html", "", "Not there", problem="It was there when this page was made, and has gone since.")
        except (ArtifactError, storage.StorageError) as error:
            return 422, request.page("base.html", "", "Cannot be read", problem=str(error))
        except Exception as error:
            log.exception("%s", request)
            return 500, request.page("base.html", "", "An error of ours", problem=f"{type(error).__name__}: {error}; its traceback is on "
                                     f"the explorer's terminal, please report it.")

    async def handle(asked: web.Request) -> web.StreamResponse:
        request = Request(library, {name: value for name, value in asked.query.items() if name != "method_"},
                          asked.query.getall("method_", []), asked.match_info.get("part", ""))
        status, found = await asyncio.to_thread(answer, request)
        if isinstance(found, str):
            return web.Response(body=_encoded(found), status=status, content_type="text/html", charset="utf-8",
                                headers={"Cache-Control": "no-store"})
        saved = {"Content-Disposition": f'attachment; filename="{found.name}"'} if found.name else {"Cache-Control": "max-age=60"}
        return web.Response(body=found.body, content_type=found.kind, headers=saved)

    return handle


def _encoded(text: str) -> bytes:
    """A result may hold what no text may: half a character."""
    return text.encode("utf-8", "replace")


def _guard(hosts: frozenset[str] | None) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if hosts is not None and request.host.rpartition(":")[0] not in hosts and request.host not in hosts:
            raise web.HTTPForbidden(text=f"This server answers to {', '.join(sorted(hosts))} only.\n")
        response = await handler(request)
        response.headers.update({"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        return response

    return guard


async def _static(request: web.Request) -> web.StreamResponse:
    kinds = {"style.css": "text/css", "live.js": "text/javascript", "set.js": "text/javascript"}
    name = request.match_info["part"]
    if name not in kinds:
        raise web.HTTPNotFound
    return web.Response(text=static(name), content_type=kinds[name], headers={"Cache-Control": "max-age=60"})


def static(name: str) -> str:
    """A file of ours that pages refer to."""
    return resources.files(__package__).joinpath("static", name).read_text()


def _files(request: Request) -> SetFiles:
    place = request.library.set_place(request.query.get("name", ""))
    if place is None:
        raise NotThere("there is no distillation run of that name")
    return SetFiles(place)


def _learning_curves(curves: list[tuple[str, list[tuple[float, float]]]]) -> Any:
    said = f"training loss by step of {len(curves)} trial(s)"
    return pages.picture(charts.lines(CURVES, curves, "step", "training loss"), said) if curves else None


def _overlaid(request: Request) -> list[trials.Attempt]:
    """The attempts whose learning curves are asked for: a single one, or those that a page of trials lays over each other."""
    if "trial" in request.query:
        return trials.attempts(request.library.attempts, [request.query["trial"]])
    return _attempts(request, _cells(request)[0])[0][:trials.OVERLAID]


def _table(request: Request) -> PaperTable | None:
    return overview.named(request.tables, request.query.get("table", ""))


def _page(request: Request, pages_there: int) -> int:
    return min(_number(request, "page", 0), max(0, pages_there - 1))


def _number(request: Request, name: str, otherwise: int) -> int:
    """A whole number of the address."""
    text = request.query.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else otherwise


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True

"""What each page shows: it asks the other modules and fills a template."""

from __future__ import annotations

from typing import Any

from krrst_dist.explorer import charts, compare, overview, pages, pictures, trials
from krrst_dist.explorer.downloads import CURVES, HISTORIES
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.request import Answer, NotThere, Request
from krrst_dist.explorer.set_list import listed, made_with
from krrst_dist.explorer.set_page import Seen, title
from krrst_dist.results import render


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
    page, last, part = request.place(len(request.tables), overview.PAGE)
    return overview.shown(request.tables[part]), page, last


def _filters(library: Library) -> dict[str, Any]:
    """What the form of filters shows."""
    return {"options": library.once("options", overview.options), "filters": overview.FILTERS, "spreads": overview.SPREADS,
            "methods": library.once("methods", lambda runs: sorted({run.about["method"] for run in runs}))}


def show_trials(request: Request) -> Answer:
    """Attempts: all of them, those that filters let through, or those behind a place of a table."""
    library = request.library
    cells, place = request.cells()
    there, page, last = request.attempts(cells)
    curves = trials.curves(library, there[:trials.OVERLAID]) if cells is not None else []
    differing = trials.differing(there)
    return request.page("trials.html", "/trials", "Trials", attempts=there, identity=trials.telling(there), place=place, path="/trials",
                        differing=differing if place or len(differing) <= trials.COLUMNS else [], unlike=len(differing), page=page,
                        pages=last, overlaid=cells is not None,
                        experiments=[] if place else trials.experiments(library), chart=_learning_curves(curves), most=trials.OVERLAID,
                        tabular=False, **_filters(library))


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
    files = request.files
    seen = Seen.of(files)
    page, last, part = request.place(seen.count, pictures.PAGE)
    curves = [(name, title, pages.picture(drawn, f"{title} by meta-update")) for name, (title, draw) in HISTORIES.items()
              if (drawn := draw(files, "svg"))]
    return request.page(
        "set.html", "/sets", seen.title, note=seen.note, problem=" ".join(seen.problems), held=seen.held, map=seen.map, labels=seen.labels,
        zooms=pictures.ZOOMS, zoom=next((each for each in pictures.ZOOMS if str(each) == request.query.get("zoom")), 96), path="/set",
        page=page, pages=last, indices=range(seen.count)[part],
        moments=[(moment, title(moment)) for moment in seen.moments],
        at=min(request.number("at", len(seen.moments)), len(seen.moments) - 1), where=files.place.uri,
        started="start" in request.query and "start.safetensors" in files.names,
        nearest="nearest" in request.query and seen.map is not None,
        charts=curves, about=pictures.about(seen.held) if seen.held else None)


def show_nothing(request: Request) -> Answer:
    """Every other address."""
    raise NotThere("there is no page of that address")


def _learning_curves(curves: list[tuple[str, list[tuple[float, float]]]]) -> Any:
    said = f"training loss by step of {len(curves)} trial(s)"
    return pages.picture(charts.lines(CURVES, curves, "step", "training loss"), said) if curves else None

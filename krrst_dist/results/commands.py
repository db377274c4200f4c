"""What is typed about results: `krrst results merge | show | export` and `krrst report`.

Reads a store, narrows it down, and hands it to the tables or to a file. Computes nothing itself.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import tyro

from krrst_dist import parquet, storage
from krrst_dist.results import render
from krrst_dist.results.schema import SCHEMA, ResultsError
from krrst_dist.results.store import ResultStore
from krrst_dist.results.tables import Over, PaperTable, paper_tables
from krrst_dist.setting_names import flatten, nearest

Uri = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI", help="the store: a folder or a URI (s3://...)")]
Where = Annotated[tuple[str, ...], tyro.conf.arg(
    metavar="COLUMN=VALUE", help="only rows with this value; the same column twice: one or the other; no value: null or empty. "
                                 "One setting: hyperparameters.NAME of the evaluation, distillation.NAME of the set")]

SHOWN = ("method", "source", "target", "task", "architecture", "label_fraction", "distillation_seed", "evaluation_seed", "metric", "value",
         "status", "error")
"""columns of SCHEMA that fit a screen"""
JSON_COLUMNS = ("hyperparameters", "distillation", "package_versions")


@dataclass(frozen=True)
class Report:
    """Print the paper's tables of what is in a store: mean and population std, best marked, missing cells as such."""

    uri: Uri
    where: Where = ()
    over: Over | None = None
    """what the spread is over: all runs of a method (the default), or its distillation seeds, each the mean of its evaluation seeds (the
    default where methods are compared: runs of one set are not independent)"""
    significance: bool = False
    """Welch's t-test of the best against the runner-up, in each column"""
    against: str = ""
    """a method that the others are compared with, seed by seed where two or more are in common: mean difference and its 95 % interval"""
    out: str | None = None
    """folder or URI for report.md, report.csv and report.tex"""
    html: str | None = None
    """file or URI to write them to as one page instead, with charts and images; it opens without a server or a network"""

    def tables(self, stored: pa.Table) -> list[PaperTable]:
        """The tables that are asked for, of a store's best attempts. Raises ResultsError where no row fits."""
        metrics = {condition.removeprefix("metric=") for condition in self.where if condition.startswith("metric=")}
        others = [condition for condition in self.where if not condition.startswith("metric=")]
        chosen = select(stored, others)
        if len(stored) and not len(chosen):
            raise ResultsError(f"--where {' '.join(others)}: none of the {len(stored)} rows fits; `krrst results show {self.uri}` lists "
                               f"them")
        found = paper_tables(chosen, over=self.over, significance=self.significance, against=self.against)
        return [table for table in found if not metrics or table.metric in metrics]  # after: a failed cell has none, and must show


def results_main(arguments: list[str]) -> None:
    """`krrst results merge|show|export URI [--options]`."""
    tyro.extras.subcommand_cli_from_dict({"merge": merge, "show": show, "export": export}, args=_gathered(arguments), prog="krrst results")


def report_main(arguments: list[str]) -> None:
    """`krrst report URI [--options]`, without --html: that is the explorer's."""
    report(asked_report(arguments))


def _gathered(arguments: list[str]) -> list[str]:
    """`--where a --where b` as `--where a b`: of a repeated flag the last alone would count, and a table would hold what was ruled out."""
    others, conditions, inside = [], [], False
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("--"):
            inside = flag == "--where"
        if not inside:
            others.append(argument)
        elif argument.startswith("--"):
            conditions += [value] if equals else []
        else:
            conditions.append(argument)
    return [*others, "--where", *conditions] if conditions else others


def asked_report(arguments: list[str]) -> Report:
    """What `krrst report URI [--options]` asks for. Raises ResultsError for options that exclude each other."""
    asked = tyro.cli(Report, args=_gathered(arguments), prog="krrst report")
    if asked.html is not None and asked.out is not None:
        raise ResultsError("--html and --out are alternatives: one page with charts and images, or report.md, report.csv and report.tex; "
                           "give one of them, and call krrst report twice for both")
    return asked


def report(asked: Report) -> None:
    """Print the tables, and write them where --out says."""
    tables = asked.tables(_existing(asked.uri).read())
    print(render.to_text(tables), end="")
    if asked.out is not None:
        for name, written in {"report.md": render.to_markdown, "report.csv": render.to_csv, "report.tex": render.to_latex}.items():
            storage.write_whole(storage.join(asked.out, name), written(tables).encode())
        print(f"\nwritten: {storage.join(asked.out, 'report.md')}, report.csv and report.tex")


def merge(uri: Uri) -> None:
    """Make one file of all, so that reading is quick; safe while others write. Keeps every attempt."""
    count = _existing(uri).merge()
    print(f"{count} files merged into one" if count > 1 else f"nothing to merge: {count} file{'' if count else 's'}")


def show(uri: Uri, where: Where = (), all_attempts: bool = False) -> None:
    """Print results, a line a row.

    Args:
        all_attempts: earlier and failed attempts too, not only the best of every cell.
    """
    table = select(_existing(uri).read(all_attempts=all_attempts), where)
    if len(table):
        print("\n".join(render.aligned(_shown(table, render.one_line))))
    cells = {state: len(pc.unique(table["cell"].filter(pc.equal(table["status"], state)))) for state in ("ok", "diverged", "failed")}
    print(f"{len(table)} rows; cells: " + ", ".join(f"{count} {state}" for state, count in cells.items()))


def export(uri: Uri, where: Where = (), all_attempts: bool = False, format: Literal["csv", "json", "parquet", "md"] = "csv",
           out: str | None = None) -> None:
    """Write results in another format: all columns, or in md those that `show` shows.

    Args:
        all_attempts: earlier and failed attempts too, not only the best of every cell.
        out: file or URI to write; default: print (not parquet).
    """
    if out is None and format == "parquet":
        raise ResultsError("--out is missing: a Parquet file is not text; say where to write it")
    payload = FORMATS[format](select(_existing(uri).read(all_attempts=all_attempts), where))
    if out is None:
        sys.stdout.write(payload.decode())
    else:
        storage.write_whole(out, payload)
        print(f"written: {out}")


def select(table: pa.Table, where: tuple[str, ...] | list[str]) -> pa.Table:
    """Rows of results with the given values: "column=value", or "column.name=value" in a column of settings. Raises ResultsError."""
    wanted: dict[str, list[str]] = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise ResultsError(f"--where {condition}: must be column=value, for instance method=KRR-ST")
        wanted.setdefault(column, []).append(value)
    for column, values in wanted.items():
        group, _, name = column.partition(".")
        if group in JSON_COLUMNS and name:
            settings = {text: flatten(json.loads(text)) for text in pc.unique(table[group]).to_pylist()}
            known, literals = sorted({known for given in settings.values() for known in given}), [_literal(value) for value in values]
            if settings and name not in known:
                raise ResultsError(f"--where {column}: no {group} here have it; {nearest(name, known)}")
            fitting = [text for text, given in settings.items() if name in given and given[name] in literals]
            fits = pc.is_in(table[group], pa.array(fitting, pa.string()))
        elif column in SCHEMA.names:
            field = SCHEMA.field(column)
            fits = pc.is_in(table[column], pa.array([_parsed(field, value) for value in values], field.type))
        else:
            raise ResultsError(f"--where {column}: no such column; {nearest(column, SCHEMA.names)}")
        table = table.filter(fits)
    return table


def _parsed(field: pa.Field, text: str) -> Any:
    if pa.types.is_string(field.type):
        return text
    if not text and field.nullable:
        return None
    try:
        return pa.scalar(text).cast(field.type).as_py()
    except pa.ArrowException:
        raise ResultsError(f"--where {field.name}={text}: the column holds {field.type}; give a value of that kind") from None


def _literal(text: str) -> Any:
    """0.1, true, null and [1, 2] as JSON means them; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _existing(uri: str) -> ResultStore:
    if not storage.exists(uri):
        raise ResultsError(f"URI = {uri!r}: there is nothing; check the path (a grid's results are in the folder `results` of its --out)")
    of_grid = storage.join(uri, "results")
    return ResultStore(of_grid if storage.exists(of_grid) else uri)


def _shown(table: pa.Table, escape: Any) -> list[list[str]]:
    def text(value: Any) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else escape(str(value))

    return [[*map(escape, SHOWN)], *([text(row[name]) for name in SHOWN] for row in table.select(SHOWN).to_pylist())]


def _to_csv(table: pa.Table) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(table.column_names)
    for row in table.to_pylist():
        values = (row | {"finished": row["finished"].isoformat()}).values()
        writer.writerow([render.spreadsheet_safe(value) if isinstance(value, str) else value for value in values])
    return sink.getvalue().encode()


def _to_json(table: pa.Table) -> bytes:
    opened = [row | {"finished": row["finished"].isoformat()} | {name: json.loads(row[name]) for name in JSON_COLUMNS}
              for row in table.to_pylist()]
    return (json.dumps(opened, indent=1) + "\n").encode()


def _to_markdown(table: pa.Table) -> bytes:
    return ("\n".join(render.markdown_rows(_shown(table, render.escape_markdown))) + "\n").encode()


FORMATS = {"csv": _to_csv, "json": _to_json, "parquet": parquet.encode, "md": _to_markdown}

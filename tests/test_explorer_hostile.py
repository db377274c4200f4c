"""The explorer over folders in which somebody, or a disk, has put what does not belong there: a sentence, the rest as before, no wait."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from explorer_site import Site, cell, distilled, fill, grey, outcome

from krrst_dist import parquet
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.torch_export import as_pt
from krrst_dist.explorer.tune_records import TAIL
from krrst_dist.provenance import Revision
from krrst_dist.results import ResultStore
from krrst_dist.sheets import sheet

HALF = "\ud800"
"""of a character: JSON can say it, UTF-8 cannot"""


def header(about: object) -> bytes:
    """A .safetensors file without tensors."""
    text = json.dumps({"__metadata__": about}).encode()
    return len(text).to_bytes(8, "little") + text


def deep() -> bytes:
    """A set whose recipe is nested without end."""
    return header({"format": "krrst_dist distilled set, version 1", "label_kind": "class", "recipe": "[" * 100_000, "space": "{}",
                   "class_names": "null", "metadata": "{}"})


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    fill(folder := tmp_path_factory.mktemp("spoilt"))
    for stray in ("sets/README", "sets/dm-1/README", "tune/README", "tune/cells-2-1/README"):
        (folder / stray).write_text("not ours")
    for place in ("sets", "tune"):
        os.mkdir(os.fsencode(folder / place) + b"/\xff")
    runs = folder / "sets" / "odd-1"
    (runs / "seed-0").mkdir(parents=True)
    history = pa.table({"step": [0, 1, 2], "loss": [1.7e308, float("inf"), float("nan")], "lr": [1e308, -1e308, 0.0]})
    (runs / "seed-0" / "history.parquet").write_bytes(parquet.encode(history))
    distilled(3).save(runs / "seed-0" / "distilled.safetensors")
    (runs / "seed-1").mkdir()
    (secret := tmp_path_factory.mktemp("elsewhere") / "secret").write_text("SECRET")
    (runs / "seed-1" / "distilled.safetensors").symlink_to(secret)
    (runs / "seed-2").mkdir()
    os.mkfifo(runs / "seed-2" / "distilled.safetensors")
    for seed, payload in ((3, header(None)), (4, deep()), (5, b""), (6, b"\xff" * 8)):
        (runs / f"seed-{seed}").mkdir()
        (runs / f"seed-{seed}" / "distilled.safetensors").write_bytes(payload)
    (runs / "seed-7" / "pictures").mkdir(parents=True)
    (runs / "seed-7" / "pictures" / "step-00000000.png").write_bytes(sheet(grey(7, 9), columns=20)[:60])
    distilled(0).save(runs / "seed-8" / "distilled.safetensors")
    said = distilled(2)
    said.metadata["source"] = HALF
    said.save(runs / "seed-9" / "distilled.safetensors")
    trial = folder / "tune" / "cells-2-1" / "trial-0"
    (trial / "log.txt").write_text("first line\n" + "x" * 3 * TAIL)
    (folder / "tune" / "cells-2-1" / "trial-1" / "log.txt").unlink()
    os.mkfifo(folder / "tune" / "cells-2-1" / "trial-1" / "log.txt")
    ResultStore(folder / "results", Revision("c0ffee", False)).write(
        cell("Odd", "cifar10", 0), outcome(0.3, f"/elsewhere/tune/cells-2-1/trial-{HALF}"))
    with Site(folder) as running:
        yield running


@pytest.mark.parametrize("address", ["/", "/tables", "/trials", "/experiments", "/compare", "/sets", "/download/report.html",
                                     "/download/results.csv"])
def test_every_page_is_there(site, address):
    assert len(site.get(address)) > 100


def test_sets_and_trials_beside_what_does_not_belong_there_are_shown(site):
    assert "150 x 3 x 8 x 8" in site.page("/sets") and "1 running" in site.page("/experiments")


@pytest.mark.parametrize(("seed", "sentence"), [
    (0, "images"), (1, "This run has not ended"), (2, "it is no file"), (3, "is not a distilled set"), (4, "is damaged or was changed"),
    (5, "is truncated or no safetensors file"), (6, "is no safetensors file"), (7, "no sheet of images"), (8, "This set has no images"),
    (9, "images")])
def test_a_set_that_is_none_is_said_to_be_so(site, seed, sentence):
    page = site.page("/set", name=f"odd-1/seed-{seed}")
    assert sentence in page and "<title>An error of ours" not in page and "0x7f" not in page
    status = 404 if seed in (1, 7) else 200 if seed in (0, 8, 9) else 422
    if seed != 7:
        assert b"SECRET" not in site.get("/download/set.safetensors", status=status, name=f"odd-1/seed-{seed}")


def test_a_long_log_is_shown_from_its_end(site):
    page = site.page("/experiments")
    assert "first line" not in page and TAIL <= page.count("x") < 2 * TAIL


def changed(folder: Path, column: str, value: object) -> None:
    """One more result, with a value that our code would not have written."""
    store = ResultStore(folder, Revision("c0ffee", False))
    written = Path(store.write(cell("Bad", "cifar10", 0), outcome(0.5)))
    table = parquet.decode(written.read_bytes())
    place = table.schema.get_field_index(column)
    column_of = pa.array([value], pa.int64()).cast(table.schema.field(place).type) if column == "finished" else pa.array([value])
    written.write_bytes(parquet.encode(table.set_column(place, table.schema.field(place), column_of)))


@pytest.mark.parametrize(("column", "value", "sentence"), [
    ("hyperparameters", "{oops", "hyperparameters = '{oops'; it must be a JSON object"),
    ("distillation", "[" * 100_000, "distillation = '[["), ("hyperparameters", "3", "it must be a JSON object"),
    ("value", float("nan"), "a value that is not finite"),
    ("value", float("inf"), "a value that is not finite"), ("value", 1.5e308, "or larger than 1e+150"),
    ("finished", 9 * 10**18, "outside the years 1 to 9999")])
def test_a_row_that_cannot_be_a_result_is_named_and_the_others_stay(tmp_path, column, value, sentence):
    store = ResultStore(tmp_path / "results", Revision("c0ffee", False))
    store.write(cell("Random", "cifar10", 0), outcome(0.5))
    library = Library(str(tmp_path))
    library.refresh()
    changed(tmp_path / "results", column, value)
    library._looked = float("-inf")
    library.refresh()
    assert sentence in library.problem and "move it out of the folder" in library.problem
    assert [run.about["method"] for run in library.runs] == ["Random"]


def test_results_that_begin_after_the_explorer_are_shown(tmp_path):
    (tmp_path / "tune").mkdir()
    library = Library(str(tmp_path))
    library.refresh()
    ResultStore(tmp_path / "results", Revision("c0ffee", False)).write(cell("Random", "cifar10", 0), outcome(0.5))
    library._looked = float("-inf")
    library.refresh()
    assert len(library.runs) == 1 and library.problem == ""


def test_no_code_of_the_folder_that_one_stands_in_is_run(tmp_path, monkeypatch):
    distilled(3).save(tmp_path / "distilled.safetensors")
    (tmp_path / "tyro.py").write_text("open('executed', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # and no folder that is given by a relative path
    assert as_pt("distilled.safetensors")[:2] == b"PK"
    assert not (tmp_path / "executed").exists()

"""The explorer as it is used: `krrst explore` over a real folder, asked as a browser asks."""

from __future__ import annotations

import asyncio
import html
import http.client
import io
import json
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from explorer_site import HOSTILE, SPACE, Site, cell, distilled, feature_map, fill, outcome
from PIL import Image
from scipy.stats import ttest_ind

import krrst_dist
from krrst_dist import parquet
from krrst_dist.artifacts import DistilledSet
from krrst_dist.cli import main
from krrst_dist.explorer import compare, overview, server
from krrst_dist.explorer import library as library_module
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.server import hosts_of
from krrst_dist.feature_map import FILE
from krrst_dist.provenance import Revision
from krrst_dist.results import ResultStore, paper_tables, to_csv
from krrst_dist.results.store import Follower

TITLE = "Table 1: finetune, source cifar100, 32 px, convnet-128-256-512, accuracy [%]"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    fill(folder := tmp_path_factory.mktemp("grid"))
    with Site(folder) as running:
        yield running


def cells_of(page: str) -> dict[str, list[str]]:
    """Rows of a page's first table, by their heading."""
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page, re.S)
    return {html.unescape(re.sub("<[^>]+>", "", name)): [" ".join(re.sub("<[^>]+>", " ", each).split())
                                                         for each in re.findall(r"<td.*?>(.*?)</td>", rest, re.S)] for name, rest in rows}


def links(page: str, text: str) -> list[str]:
    """Where links with this text in them lead."""
    found = re.findall(r'<a [^>]*?href="([^"]*)"[^>]*>(.*?)</a>', page, re.S)
    return [html.unescape(address) for address, inside in found if text in inside]


def test_the_overview_has_the_papers_table_with_best_failed_and_missing_places(site):
    page = site.page("/")
    rows = cells_of(page)
    assert list(rows) == ["Random", "DM", "KRR-ST", HOSTILE]
    assert rows["KRR-ST"] == ["62.00 ± 1.63"] * 2 and rows["Random"] == ["51.00 ± 0.82"] * 2
    assert rows["DM"] == ["–", "diverged"] and rows[HOSTILE] == ["–", "failed"]
    assert page.count("<strong>62.00 ± 1.63</strong>") == 2 and "<strong>51" not in page
    assert "Table 1: finetune, source cifar100" in page and "commit c0ffee" in page


def test_a_filter_narrows_the_table_and_a_baseline_adds_paired_differences(site):
    page = site.page("/", target="cifar10", against="Random", over="distillation")
    assert cells_of(page)["KRR-ST"][0].startswith("62.00 ± 1.63 +11.00 (") and len(cells_of(page)["Random"]) == 1
    assert cells_of(site.page("/", distillation_seed="2"))["KRR-ST"] == ["64.00", "64.00"]
    assert "no results that all these filters let through" in site.page("/", target="nowhere")


def several_evaluations(folder: Path) -> Path:
    """Two methods with three sets each, of which each was evaluated twice, beside one without sets."""
    store = ResultStore(folder / "results", Revision("c0ffee", False))
    for evaluation in range(2):
        scratch = replace(cell("from scratch", "cifar10", 0), source="", source_fingerprint="", distillation_seed=None, set_fingerprint="",
                          distillation={}, evaluation_seed=evaluation)
        store.write(scratch, outcome(0.40 + 0.01 * evaluation))
        for seed in range(3):
            for method, accuracy in (("Random", 0.50 + 0.01 * seed), ("KRR-ST", 0.60 + 0.02 * seed)):
                store.write(replace(cell(method, "cifar10", seed), evaluation_seed=evaluation), outcome(accuracy + 0.002 * evaluation))
    return folder


def test_the_explorer_and_both_reports_take_the_same_spread_for_the_same_question(tmp_path, capsys):
    folder = several_evaluations(tmp_path)
    library = Library(str(folder))
    library.refresh()
    for asked, over in (({}, "evaluation"), ({"against": "Random"}, "distillation"),
                        ({"against": "Random", "over": "evaluation"}, "evaluation")):
        [one] = overview.shown(overview.tables(library.runs, asked))
        options = [word for name, value in asked.items() for word in (f"--{name}", value)]
        assert one.table.over == over
        assert main(["report", str(folder), *options]) == 0 and one.notes[0] in capsys.readouterr().out
        assert main(["report", str(folder), "--html", str(tmp_path / "report.html"), *options]) == 0
        assert one.notes[0] in html.unescape((tmp_path / "report.html").read_text())


def test_welchs_tests_are_of_independent_sets_whatever_the_tables_spread(tmp_path):
    library = Library(str(several_evaluations(tmp_path)))
    library.refresh()
    [table] = overview.tables(library.runs, {"over": "evaluation"})
    against_random, against_scratch = (each.p for each in compare.tests(table, table.methods))
    ours = [0.601, 0.621, 0.641]
    assert against_random == pytest.approx(ttest_ind(ours, [0.501, 0.511, 0.521], equal_var=False).pvalue)
    assert against_scratch == pytest.approx(ttest_ind(ours, [0.40, 0.41], equal_var=False).pvalue)


@pytest.mark.parametrize(("asked", "methods"), [
    ({"source": "cifar100"}, ("from scratch", "Random", "KRR-ST")), ({"distillation_seed": "2"}, ("from scratch", "Random", "KRR-ST")),
    ({"source": "cifar100", "method": "KRR-ST"}, ("KRR-ST",)), ({"method": "KRR-ST", "against": "Random"}, ("Random", "KRR-ST")),
    ({"method": "KRR-ST", "against": "nobody"}, ("KRR-ST",)),
])
def test_filters_leave_runs_without_a_set_and_the_baseline_where_they_stand(tmp_path, asked, methods):
    library = Library(str(several_evaluations(tmp_path)))
    library.refresh()
    [table] = overview.tables(library.runs, asked)
    assert table.methods == methods and bool(table.differences) == (asked.get("against") == "Random")


def test_a_place_of_the_table_leads_to_its_trials_and_their_curves(site):
    address, _ = links(site.page("/"), "62.00")
    page = site.page(address)
    assert len(cells_of(page)) == 3 and page.count('class="chart"') == 1
    assert all("accuracy 6" in " ".join(values) and "2.5" in values for values in cells_of(page).values())
    assert len(cells_of(site.page(links(site.page("/", distillation_seed="2"), "64.00")[0]))) == 1
    address = links(page, "")[links(page, "").index("/trials") + 1:]
    one = next(each for each in address if each.startswith("/trial/"))
    trial = site.page(one)
    assert "a CPU; 2.5 s; 100 steps; 1000 test" in " ".join(trial.split()) and "<dt>set distill.m</dt><dd>40</dd>" in trial
    assert trial.count('class="chart"') == 1 and "INFO trial " in trial


def test_a_failed_trial_shows_its_error_and_its_traceback_as_text(site):
    page = site.page(links(site.page("/"), "failed")[0])
    trial = site.page(next(each for each in links(page, "") if each.startswith("/trial/")))
    assert html.escape(f"RuntimeError: {HOSTILE}", quote=False).split("&quot;")[0][:30] in trial
    assert "Traceback (most recent call last)" in trial and 'class="chart"' not in trial


def test_attempts_that_differ_in_a_setting_have_it_in_a_column(site):
    page = site.page("/trials")
    assert "set distill.m" in page and "recipe steps" not in page
    assert len(cells_of(page)) == 14


def test_the_state_of_ray_tune_is_refreshed_without_the_page(site):
    part = site.page("/experiments")
    assert all(count in part for count in ("1 running", "1 pending", "2 done", "1 failed", "1 done"))
    assert "<html" not in part and "etc" not in part
    assert part.index("cells-2") < part.index("networks-1"), "the newest first"
    assert "trial-0 running: step 29, loss 0.03448" in part and "INFO trial 0" in part and "as Ray Tune wrote at 20" in part
    assert 'data-live="/experiments"' in site.page("/trials")


def test_methods_are_compared_by_bars_points_and_welchs_test(site):
    page = site.page("/compare")
    assert page.count('class="chart"') == 4  # bars, a scatter a target, settings
    p = ttest_ind([60, 62, 64], [50, 51, 52], equal_var=False).pvalue
    assert f"<td>KRR-ST</td><td>Random</td><td>3, 3</td><td>11</td><td>{p:.3g}</td>" in page
    drawn = site.get("/download/bars.svg", table=TITLE)
    assert drawn.count(b"-->") == drawn.count(b"<!--") and b"<script" not in re.sub(b"<!--.*?-->", b"", drawn, flags=re.S)
    fewer = site.get("/compare?method_=Random&method_=DM").decode()
    assert "There is nothing to test." in fewer


def test_the_list_of_sets_tells_what_each_is(site):
    rows = {row.partition("</a>")[0][-6:]: row for row in site.page("/sets").split("<tr>")[2:]}
    assert all(text in rows["seed-0"] for text in ("<td>dm</td>", "<td>150 x 3 x 8 x 8</td>", "<td>class</td>"))
    assert all("has not ended" in rows[name] for name in ("seed-2", "seed-3")) and len(rows) == 4


def test_a_set_is_shown_page_by_page_with_its_labels_and_losses(site):
    place = links(site.page("/sets"), "dm-1/seed-0")[0]
    first, last = site.page(place), site.page(place + "&page=2")
    assert first.count('which=distilled') == 60 and last.count("which=distilled") == 30 and "1 of 3" in first
    assert "which=start" not in first and site.page(place + "&start=1").count("which=start") == 60
    assert "cat</figcaption>" in first and first.count('class="chart"') == 3 and "<dt>fingerprint</dt>" in first
    assert 'width="160"' in site.page(place + "&zoom=160")


def test_an_image_is_the_sets_own_pixels(site):
    held = distilled(150)
    image = np.asarray(Image.open(io.BytesIO(site.get("/image.png", name="dm-1/seed-0", index="149"))))
    assert np.abs(image / 255 - np.clip(SPACE.to_pixels(held.x_syn[149]), 0, 1).transpose(1, 2, 0)).max() < 1 / 255
    for index in ("150", "-1", "x", ""):
        assert "there is no such image." in site.page("/image.png", status=404, name="dm-1/seed-0", index=index)


def test_the_images_along_the_way_are_those_of_their_moment(site):
    place = links(site.page("/sets"), "dm-1/seed-0")[0]
    page = site.page(place + "&at=1")
    assert "<output>update 40</output>" in page and page.count("which=step-00000040") == 60 and 'max="3"' in page
    assert "<output>as distilled</output>" in site.page(place) and "<output>update 0</output>" in site.page(place + "&at=0")
    image = np.asarray(Image.open(io.BytesIO(site.get("/image.png", name="dm-1/seed-0", which="step-00000040", index="149"))))
    assert image[0, 0, 0] == 149 and (image[1:] == 40).all()
    for which in ("step-00000041", "step-../../x", "names", HOSTILE):
        assert "there is no such image." in site.page("/image.png", status=404, name="dm-1/seed-0", which=which, index="0")


def test_a_run_that_goes_on_shows_what_it_has_so_far(site):
    page = site.page("/set", name="dm-1/seed-3")
    assert "This run has not ended" in page and page.count("which=step-00000000") == 7 and "/download/set.zip" not in page


def test_each_image_can_stand_beside_the_real_one_that_is_nearest(site):
    page = site.page("/set", name="dm-1/seed-0", nearest="1")
    assert page.count("which=nearest") == 60 and "2059<br>distance 1.4" in page
    image = np.asarray(Image.open(io.BytesIO(site.get("/image.png", name="dm-1/seed-0", which="nearest", index="59"))))
    assert image[0, 0, 0] == 59 and (image[1:] == 200).all()


def test_the_feature_space_is_given_as_points_and_as_a_chart(site):
    told = json.loads(site.get("/points.json", name="dm-1/seed-0"))
    assert len(told["points"]) == 180 and told["points"][0] == [0, 0, 0, 0] and told["points"][-1] == [1, 1, 2, 149]
    assert told["real"][3] == 1003 and told["nearest"][149] == 2149 and told["labels"][11] == 1
    assert site.get("/download/features.png", name="dm-1/seed-0").startswith(b"\x89PNG")
    assert "there is no feature map of that run." in site.page("/points.json", status=404, name="dm-1/seed-3")


def test_a_feature_map_of_another_set_is_not_shown(tmp_path):
    run = tmp_path / "seed-0"
    distilled(150, seed=1).save(run / "distilled.safetensors")
    feature_map(150).save(run / FILE)
    (tmp_path / "seed-1").mkdir()
    distilled(20).save(tmp_path / "seed-1" / "distilled.safetensors")
    (tmp_path / "seed-1" / FILE).write_bytes((run / FILE).read_bytes()[:500])
    with Site(tmp_path) as site:
        page = site.page("/set", name="seed-0")
        assert "The feature map belongs to another set" in page and "data-points" not in page
        page = site.page("/set", name="seed-1")
        assert "truncated" in page and page.count("which=distilled") == 20 and "krrst features" in page


def test_pt_files_are_written_by_another_process(site):
    with zipfile.ZipFile(io.BytesIO(site.get("/download/set-pt.zip", name="dm-1/seed-0"))) as found:
        assert found.namelist() == ["about.json", "x_syn.pt", "y_syn.pt"]
        x = torch.load(io.BytesIO(found.read("x_syn.pt")), weights_only=True)
    assert np.array_equal(x.numpy(), distilled(150).x_syn)
    assert "truncated or no safetensors file" in site.page("/download/set-pt.zip", status=422, name="dm-1/seed-1")


@pytest.mark.parametrize(("name", "sentence"), [("dm-1/seed-1", "truncated or no safetensors file"),
                                                ("dm-1/seed-2", "This run has not ended")])
def test_a_set_that_cannot_be_shown_is_said_to_be_so(site, name, sentence):
    assert sentence in site.page("/set", name=name)


def test_an_error_of_ours_is_a_sentence_too(tmp_path, monkeypatch):
    monkeypatch.setitem(server.PAGES, "/sets", lambda request: 1 / 0)
    fill(tmp_path)

    async def ask() -> tuple[int, str]:
        async with TestClient(TestServer(server.application(Library(str(tmp_path)), hosts=None))) as client:
            answer = await client.get("/sets")
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            return answer.status, await answer.text()

    status, page = asyncio.run(ask())
    assert status == 500 and "ZeroDivisionError: division by zero; its traceback is on" in page


def test_what_takes_long_to_read_is_read_while_the_old_is_shown(tmp_path, monkeypatch):
    """And what is worked out of it is kept until there is something new."""
    store = ResultStore(tmp_path / "results", Revision("c0ffee", False))
    store.write(cell("Random", "cifar10", 0), outcome(0.5))
    library, made = Library(str(tmp_path)), []
    library.refresh()

    def count(runs: list) -> int:
        made.append(len(runs))
        return len(runs)

    assert [library.once("count", count), library.once("count", count), made] == [1, 1, [1]]
    go_on, refresh = threading.Event(), Follower.refresh
    monkeypatch.setattr(library_module, "SECONDS", 0)
    monkeypatch.setattr(Follower, "refresh", lambda self: go_on.wait(60) and refresh(self))
    store.write(cell("DM", "cifar10", 0), outcome(0.6))
    started = time.monotonic()
    library.refresh()
    assert time.monotonic() - started < 30 and library.once("count", count) == 1 and made == [1]
    go_on.set()
    while library.once("count", count) == 1:
        assert time.monotonic() - started < 60
        library.refresh()
    assert made == [1, 2]


def test_whatever_goes_wrong_in_reading_is_told_and_mended_by_the_next_look(tmp_path, monkeypatch):
    ResultStore(tmp_path / "results", Revision("c0ffee", False)).write(cell("Random", "cifar10", 0), outcome(0.5))
    library = Library(str(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(library_module, "runs", lambda table: [][0])
        library.refresh()
    assert "the results cannot be read (IndexError: list index out of range)" in library.problem and library.runs == []
    monkeypatch.setattr(library_module, "SECONDS", 0)
    library.refresh()
    while library.problem:
        time.sleep(0.01)
        library.refresh()
    assert len(library.runs) == 1


def test_tables_of_a_large_store_come_page_by_page(tmp_path):
    store = ResultStore(tmp_path / "results", Revision("c0ffee", False))
    for i in range(15):
        store.write(replace(cell("Random", "cifar10", 0), architecture=f"convnet-{i + 1}"), outcome(0.5))
    with Site(tmp_path) as site:
        first, last = site.page("/"), site.page("/", page="1")
        assert first.count("<h2>") == 12 and last.count("<h2>") == 3 and "1 of 2" in first
        assert not [each for each in links(last, "") if each.startswith(("/trials", "/compare", "/download")) and "page=" in each]


@pytest.mark.parametrize("name", ["../../etc", "/etc", "dm-1/../dm-1/seed-0", HOSTILE, ""])
def test_nothing_outside_the_folder_can_be_asked_for(site, name):
    assert "there is no distillation run of that name." in site.page("/set", status=404, name=name)


def test_addresses_that_name_nothing_are_answered_with_a_sentence(site):
    assert "there is no such trial." in site.page("/trial/nothing", status=404)
    assert "no such place in the tables" in site.page("/trials", status=404, table="99", row="x", column="y")
    assert "nothing of that name" in site.page("/download/passwd", status=404)
    assert "62.00" in site.page("/", page="²")
    assert "as distilled" in site.page("/set", name="dm-1/seed-0", page="²", at="²")
    assert "62.00" in site.page("/", table="x", page="-1", over="nonsense", against="nobody")


def test_downloads_are_the_tables_and_the_set_and_read_back(site):
    store = ResultStore(site.folder / "results")
    assert site.get("/download/results.csv").decode() == to_csv(paper_tables(store.read()))
    table = parquet.decode(site.get("/download/results.parquet", target="cifar10"))
    assert set(table["target"].to_pylist()) == {"cifar10"} and table.schema.equals(store.read().schema)
    assert site.get("/download/results.tex").startswith(b"\\begin{table}") and site.get("/download/results.md").startswith(b"### Table 1")
    assert Image.open(io.BytesIO(site.get("/download/bars.png", table=TITLE))).width > 300
    assert b"<svg" in site.get("/download/bars.svg", table=TITLE)
    with zipfile.ZipFile(io.BytesIO(site.get("/download/set.zip", name="dm-1/seed-0"))) as file:
        assert len(file.namelist()) == 151 and json.loads(file.read("labels.json"))["y_syn"] == distilled(150).y_syn.tolist()
    copy = site.folder / "copy.safetensors"
    copy.write_bytes(site.get("/download/set.safetensors", name="dm-1/seed-0"))
    assert DistilledSet.load(copy).fingerprint == distilled(150).fingerprint


def test_the_report_opens_without_a_server(site, tmp_path, capsys):
    assert main(["report", str(site.folder), "--html", str(tmp_path / "report.html"), "--against", "Random"]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "62.00 ± 1.63" in text and 'class="chart"' in text and "data:image/png;base64," in text and "<script" not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert main(["report", str(site.folder), "--html", str(tmp_path / "x.html"), "--against", "Randon"]) != 0
    assert "did you mean 'Random'" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_an_html_report_is_narrowed_down_and_tested_as_the_printed_one(tmp_path, capsys):
    folder, page = several_evaluations(tmp_path), tmp_path / "report.html"
    options = ["--where", "evaluation_seed=1", "--significance", "--where", "method=Random", "method=KRR-ST"]
    assert main(["report", str(folder), *options]) == 0
    printed = re.findall(r"p +(\S+)\n", capsys.readouterr().out)
    assert main(["report", str(folder), "--html", str(page), *options]) == 0
    rows = cells_of(page.read_text())
    assert list(rows) == ["Random", "KRR-ST", "p"] and rows["KRR-ST"] == ["62.20 ± 1.63"] and rows["p"] == printed
    for refused, complaint in ((["--where", "method=KRR"], "none of the 14 rows fits"), (["--where", "metric"], "must be column=value"),
                               (["--out", str(tmp_path)], "--html and --out are alternatives")):
        page.unlink(missing_ok=True)
        assert main(["report", str(folder), "--html", str(page), *refused]) != 0
        assert complaint in capsys.readouterr().err and not page.exists()
    assert main(["report", str(folder), "--html", str(page), "--where", "metric=test_loss"]) == 0
    assert "There are no results yet" in page.read_text()


def test_the_help_of_the_report_lists_html(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "--html" in capsys.readouterr().out


def test_show_writes_pictures_for_people_on_a_terminal(site, tmp_path, capsys):
    assert main(["show", str(site.folder / "sets/dm-1/seed-0"), "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"images.png", "start.png", "losses.png"}
    assert Image.open(tmp_path / "images.png").size == (10 * 98 + 2, 15 * 98 + 2)
    assert main(["show", str(site.folder / "sets/dm-1/seed-0/distilled.safetensors"), "--out", str(tmp_path), "--zoom", "1"]) == 0
    assert Image.open(tmp_path / "images.png").size == (10 * 10 + 2, 15 * 10 + 2)
    for path in ("nowhere", str(site.folder / "results")):
        assert main(["show", path, "--out", str(tmp_path)]) != 0
    assert "there is nothing" in (said := capsys.readouterr().err) and "neither a distilled set nor losses" in said


def test_only_this_machines_own_names_are_answered_to_on_loopback(site):
    host, port = site.address.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    for method, name, status in (("GET", "attacker.example", 403), ("GET", f"attacker.example:{port}", 403),
                                 ("GET", f"localhost:{port}", 200), ("GET", "127.0.0.1", 200), ("POST", "127.0.0.1", 405)):
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request(method, "/sets", headers={"Host": name})
        assert connection.getresponse().status == status
    assert hosts_of("0.0.0.0") is None and "localhost" in hosts_of("::1")


def test_a_port_that_is_taken_is_one_sentence(site, capsys):
    assert main(["explore", str(site.folder), "--port", site.address.rpartition(":")[2]]) != 0
    assert "cannot listen there" in capsys.readouterr().err


def test_what_is_added_merged_damaged_or_deleted_while_it_is_open(tmp_path):
    store = ResultStore(tmp_path / "results", Revision("a" * 40, False))
    store.write(cell("Random", "cifar10", 0), outcome(0.5))
    def soon(site: Site, text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in site.page("/"):
            assert time.monotonic() < deadline, site.page("/")
            time.sleep(0.5)

    with Site(tmp_path) as site:
        soon(site, "50.00")
        store.write(cell("KRR-ST", "cifar10", 0), outcome(0.75))
        soon(site, "75.00")
        store.merge()
        store.write(cell("DM", "cifar10", 0), outcome(0.625))
        soon(site, "62.50")
        (tmp_path / "results" / "foreign.parquet").write_bytes(b"PAR1 no")
        soon(site, "foreign.parquet is truncated, damaged or no Parquet file")
        assert "75.00" in site.page("/")
        for path in (tmp_path / "results").iterdir():
            path.unlink()
        soon(site, "There are no results yet")


def test_a_place_with_nothing_in_it_is_refused(tmp_path, capsys):
    for uri in (str(tmp_path), str(tmp_path / "nowhere")):
        assert main(["explore", uri, "--port", "0"]) != 0
        assert "there is nothing; give the --out of a grid" in capsys.readouterr().err


def test_files_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    store = ResultStore(tmp_path / "results", Revision("a" * 40, False))
    store.write(cell("Random", "cifar10", 0), outcome(0.5))
    monkeypatch.setattr(library_module, "SECONDS", 0.0)
    monkeypatch.setattr(library_module, "PATIENCE", None)
    library, read = Library(str(tmp_path)), []
    monkeypatch.setattr(ResultStore, "_load", lambda self, name, load=ResultStore._load: read.append(name) or load(self, name))
    library.refresh()
    store.write(cell("DM", "cifar10", 0), outcome(0.5))
    library.refresh()
    library.refresh()
    assert len(read) == len(set(read)) == 2 and len(library.runs) == 2


def test_pages_need_neither_torch_nor_ray():
    code = "import sys, krrst_dist.explorer.server; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(krrst_dist.__file__).parents[1]).returncode == 0

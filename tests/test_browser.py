"""The explorer in a real browser, the system's Chromium: what it shows, how it is driven, that its console stays empty."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from explorer_site import HOSTILE, Site, fill, run_grid

from krrst_dist import parquet
from krrst_dist.results import ResultStore

if TYPE_CHECKING:  # `bash tests/run.sh --browser` installs it
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Site]:
    fill(folder := tmp_path_factory.mktemp("grid"))
    with Site(folder) as running:
        yield running


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Site]:
    with Site(run_grid(tmp_path_factory.mktemp("real"))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                              args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield chromium
        chromium.close()


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["wide-light", "narrow-dark"])
def page(request, browser, site) -> Iterator[Page]:
    """A page whose console must have stayed empty, and which must not have opened a dialog."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, base_url=site.address)
    page, said = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    yield page
    context.close()
    assert said == []


ADDRESSES = ("/", "/trials", "/compare", "/sets", "/set?name=dm-1/seed-0", "/set?name=dm-1/seed-1")


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_page_opens_and_fits_its_width(page, address):
    page.goto(address)
    assert page.locator("h1").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert all(page.locator("img").evaluate_all("images => images.filter(i => i.complete).map(i => i.naturalWidth > 0)"))
    assert contrast(page, "h1") > 7 and contrast(page, "nav a") > 4.5


def contrast(page: Page, selector: str) -> float:
    """WCAG's contrast of an element's text with the page behind it."""
    colours = page.locator(selector).first.evaluate(
        "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]")
    light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(value) / 255 for value in colour[colour.index("(") + 1:-1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("address", ["/", "/trials", "/compare", "/sets"])
def test_every_page_opens_on_a_real_grid(page, real, address):
    page.goto(real.address + address)
    assert page.locator("h1").is_visible() and page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.get_by_role("alert").count() == 0
    images = page.locator("img").all()
    assert len(images) >= {"/compare": 2}.get(address, 0)
    for image in images:
        image.scroll_into_view_if_needed()
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth > 0)")


def test_a_real_grids_cell_leads_to_its_trials_with_their_curves_and_logs(page, real):
    page.goto(real.address)
    assert page.locator("section", has_text="Table").or_(page.locator("section", has_text="finetune")).first.is_visible()
    page.locator("section", has_text="finetune").first.locator("tr", has_text="KRR-ST").get_by_role("link").first.click()
    assert page.locator("tbody tr").count() == 2 and page.locator("img.chart").is_visible()
    page.locator("tbody tr").first.get_by_role("link").click()
    said = page.locator("main").inner_text()
    assert "INFO done" in said and "process" in said and page.locator("img.chart").is_visible()


def test_a_real_set_is_followed_from_its_start_to_its_end(page, real):
    page.goto(f"{real.address}/sets")
    page.get_by_role("link", name="seed-0").last.click()
    slider = page.get_by_label("along the way")
    assert slider.get_attribute("max") == "21" and page.locator(".pictures figure").count() == 20
    slider.fill("0")
    first = page.locator(".pictures img.now").first
    assert "which=step-00000000" in first.get_attribute("src") and page.get_by_text("update 0", exact=True).is_visible()
    slider.press("ArrowRight")
    assert "which=step-00000002" in first.get_attribute("src")
    page.get_by_label("beside the nearest real image").check()
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**nearest=1**")
    assert page.get_by_alt_text("the real image nearest to image 0", exact=True).is_visible()
    assert "digits-0-4" in page.locator("figcaption").first.inner_text()


def test_the_feature_space_shows_the_image_under_the_pointer_and_by_the_arrow_keys(page, real):
    page.goto(f"{real.address}/sets")
    page.get_by_role("link", name="seed-0").last.click()
    cloud, seen = page.locator(".cloud canvas"), page.locator(".cloud figure")
    page.locator(".kinds label").nth(2).wait_for()
    assert page.locator(".kinds label").all_inner_texts() == ["targets of real images", "Y_s", "features of X_s"]
    assert cloud.evaluate("""canvas => {
        const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
        const seen = new Map();
        for (const pixel of pixels) if (pixel >>> 24 === 255) seen.set(pixel, (seen.get(pixel) ?? 0) + 1);
        return [...seen.values()].filter(count => count >= 16).length; }""") >= 3, "a colour for each kind of point"
    cloud.focus()
    page.keyboard.press("ArrowRight")
    assert "real image" in seen.inner_text() and seen.locator("img").is_visible()
    shown = seen.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert seen.inner_text() != shown
    page.get_by_label("targets of real images").uncheck()
    page.get_by_label("Y_s").uncheck()
    cloud.scroll_into_view_if_needed()
    box = cloud.bounding_box()
    for step in range(40):  # a sweep over the middle, which comes near some image
        page.mouse.move(box["x"] + box["width"] * (step + 1) / 41, box["y"] + box["height"] * (0.3 + 0.4 * (step % 2)))
    assert "nearest real image" in seen.inner_text()
    assert seen.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 16


def test_a_list_walked_through_by_keyboard_is_sent_when_it_is_left(page):
    page.goto("/")
    target = page.get_by_label("target")
    target.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert target.input_value() == "cifar100" and "target=" not in page.url
    page.keyboard.press("Tab")
    page.wait_for_url("**target=cifar100**")


def test_a_filter_changes_the_table_as_soon_as_it_is_chosen(page):
    page.goto("/")
    assert page.locator("thead th").all_inner_texts() == ["method", "cifar100", "cifar10"]
    page.get_by_label("target").select_option("cifar10")
    page.wait_for_url("**target=cifar10**")
    assert page.locator("thead th").all_inner_texts() == ["method", "cifar10"]
    page.get_by_label("difference to").select_option("Random")
    page.wait_for_url("**against=Random**")
    assert "+11.00" in page.locator("tr", has_text="KRR-ST").inner_text()


def test_a_place_leads_to_its_trials_and_a_trial_to_its_curve(page):
    page.goto("/")
    page.locator("tr", has_text="KRR-ST").get_by_role("link").first.click()
    assert page.locator("tbody tr").count() == 3 and page.locator("img.chart").is_visible()
    page.locator("tbody tr").first.get_by_role("link").click()
    assert "What was evaluated" in page.locator("main").inner_text() and page.locator("img.chart").is_visible()


def test_a_hostile_name_is_text(page):
    page.goto("/")
    assert HOSTILE in page.locator("tbody").inner_text()
    page.locator("tr", has_text="<script>").get_by_role("link").click()
    page.locator("tbody tr").first.get_by_role("link").click()
    assert "Traceback" in page.locator("main").inner_text() and HOSTILE in page.locator("main").inner_text()


def test_the_keyboard_alone_is_enough(page):
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare")
    assert page.evaluate("(() => { const all = [...document.querySelectorAll('a, button, select, input')];"
                         " return all.every(e => e.tabIndex >= 0); })()")


def test_pictures_are_turned_over_page_by_page(page):
    page.goto("/set?name=dm-1/seed-0")
    assert page.get_by_alt_text("image 0", exact=True).is_visible() and page.locator(".pictures figure").count() == 60
    page.get_by_role("link", name="Next").click()
    page.wait_for_url("**page=1**")
    assert page.get_by_alt_text("image 60", exact=True).is_visible()
    page.get_by_label("size").select_option("160")
    page.wait_for_url("**zoom=160**")
    assert page.get_by_alt_text("image 60", exact=True).bounding_box()["width"] == 160


def test_a_download_is_a_file_that_reads_back(page, site, tmp_path):
    page.goto("/")
    with page.expect_download() as started:
        page.get_by_role("link", name="parquet").click()
    started.value.save_as(tmp_path / "results.parquet")
    assert parquet.decode((tmp_path / "results.parquet").read_bytes()).num_rows == ResultStore(site.folder / "results").read().num_rows


def test_what_ray_tune_does_is_followed_without_loading_the_page_again(page, site):
    page.goto("/trials")
    page.evaluate("window.kept = true")
    experiment = site.folder / "tune" / "cells-2-1"
    open_now = len(list(experiment.glob("trial-new-*"))) + 1
    (experiment / f"trial-new-{open_now}").mkdir()
    page.get_by_text(f"{open_now} open").wait_for()
    assert page.evaluate("window.kept")

"""The pictures of the explorer in README: `python tests/screenshots.py URI FOLDER` (Playwright, Chromium) over a grid that is there."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from explorer_site import Site
from PIL import Image
from playwright.sync_api import sync_playwright

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = {"width": 1100, "height": 760}


def main(uri: str, folder: str) -> None:
    """A picture of each page."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with Site(Path(uri)) as site, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = chromium.new_page(viewport=SIZE, base_url=site.address)
        page.set_default_timeout(300_000)
        for name, address in (("overview", "/"), ("compare", "/compare")):
            page.goto(address)
            take(page, folder, name)
        page.goto("/")
        page.locator("tr", has_text="KRR-ST").get_by_role("link").first.click()
        take(page, folder, "trials")
        page.locator("tbody tr").first.get_by_role("link").click()
        take(page, folder, "trial")
        page.goto("/sets")
        take(page, folder, "sets")
        for address in page.locator(".sets a").evaluate_all("links => links.map(link => link.href)"):
            page.goto(f"{address}&start=1&nearest=1&zoom=64")
            if page.locator(".cloud").count():
                break
        take(page, folder, "set")
        if page.locator(".cloud").count():
            page.locator(".kinds label").first.wait_for()
            page.locator(".cloud canvas").focus()
            page.keyboard.press("ArrowRight")
            page.locator("section", has=page.locator(".cloud")).scroll_into_view_if_needed()
            take(page, folder, "features")
        chromium.close()


def take(page: Page, folder: str, name: str) -> None:
    """One picture, in few colours."""
    page.wait_for_load_state("networkidle")
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        shot.convert("RGB").quantize(128).save(Path(folder) / f"{name}.png", optimize=True)
    print(f"{folder}/{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])

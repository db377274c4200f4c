"""What is typed to get files: `krrst report URI --html FILE`, `krrst show PATH`."""

from __future__ import annotations

from typing import Annotated

import tyro

from krrst_dist import storage
from krrst_dist.artifacts import DistilledSet
from krrst_dist.explorer import pictures, report
from krrst_dist.explorer.library import Library, SetPlace
from krrst_dist.explorer.request import encoded
from krrst_dist.explorer.set_files import SetFiles
from krrst_dist.results import ResultsError
from krrst_dist.results.commands import Report, asked_report
from krrst_dist.setting_names import ConfigError

Path = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH", help="a distilled set, or a run's folder")]


def show(path: Path, out: str = ".", columns: int = 10, zoom: int | None = None) -> None:
    """Write a distilled set's images, and its run's loss curves where there are any, as PNG.

    Args:
        out: folder or URI for images.png, start.png and losses.png.
        columns: images in a row.
        zoom: pixels of the picture for one of an image; default: so that an image is about 96 wide.
    """
    if columns < 1 or (zoom is not None and zoom < 1):
        raise ConfigError(f"columns = {columns}, zoom = {zoom}: both are at least 1")
    if not storage.exists(path):
        raise ConfigError(f"path = {path!r}: there is nothing; give a distilled.safetensors or the folder of a run (seed-0)")
    written = {}
    if path.endswith(".safetensors"):
        sets = {"images.png": DistilledSet.load(path)}
    else:
        files = SetFiles(SetPlace(path, path))
        sets = {name: files.load(which) for name, which in (("images.png", "distilled"), ("start.png", "start"))
                if f"{which}.safetensors" in files.names}
        if drawn := pictures.losses(files, "png"):
            written["losses.png"] = drawn
        if not sets and not written:
            raise ConfigError(f"path = {path!r}: holds neither a distilled set nor losses; give the folder of a run (seed-0)")
    for name, held in sets.items():
        written[name] = pictures.overview(held, columns=columns, zoom=zoom or max(1, round(96 / held.x_syn.shape[-1])))
    for name, payload in written.items():
        storage.write_whole(storage.join(out, name), payload)
        print(f"written: {storage.join(out, name)}")


def write_report(asked: Report) -> None:
    """Write tables, charts and images as one HTML file that opens without a server or a network."""
    library = Library(asked.uri)
    library.refresh()
    if library.problem:
        raise ResultsError(library.problem)
    if not library.runs and not library.sets():
        raise ResultsError(f"URI = {asked.uri!r}: holds neither results nor distilled sets; give the --out of a grid or of a run")
    storage.write_whole(asked.html, encoded(report.html(library, asked.tables(library.results), {})))
    print(f"written: {asked.html}")


def report_main(arguments: list[str]) -> None:
    """`krrst report URI --html FILE [--options]`."""
    write_report(asked_report(arguments))


def show_main(arguments: list[str]) -> None:
    """`krrst show PATH [--options]`."""
    tyro.cli(show, args=arguments, prog="krrst show")

"""Room on a node's disk for prepared files: what was used least recently goes, if it can be fetched again and nobody uses it.

Only files that a manifest or the sidecar of target representations lists are ever deleted. Knows no lock but that of a file in use:
who deletes, and who fetches, is for the caller to keep apart.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from krrst_dist import storage
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import unused
from krrst_dist.data.prepared import TARGETS_OF, Prepared


def lacks(folder: Path, size: int) -> bool:
    """Are fewer bytes than that free?"""
    return shutil.disk_usage(folder).free < size


def require(folder: Path, size: int, *, doing: str) -> None:
    """Raise DataError where fewer bytes than that are free."""
    if lacks(folder, size):
        free = shutil.disk_usage(folder).free
        raise DataError(f"{socket.gethostname()}, {folder}: {storage.in_words(free)} free, but {doing} takes {storage.in_words(size)}; "
                        f"free some, or choose another --cache")


def make(folder: Path, size: int, uri: Callable[[Path], str], *, wanted: str, doing: str = "fetching") -> None:
    """Delete prepared files of other data sets, the least recently used first, until `size` bytes are free.

    uri: where a file can be fetched from. wanted: name of a file that the room is for. Raises DataError where it is not enough.
    """
    sets = [(_used(sidecar), stem, files) for sidecar, stem, files in _sets(folder) if not wanted.startswith(stem)]
    for used, stem, files in sorted(sets):
        for path in files:
            if not lacks(folder, size):
                return
            with suppress(FileNotFoundError):
                _delete(path, uri(path), f"of {stem}, last used {(time.time() - used) / 3600:.1f} h ago")
    require(folder, size, doing=doing)


def used_mark(path: Path) -> Path:
    """The hidden file whose time says when a prepared data set (its manifest's path) or a target file was last used."""
    return path.with_name(f".{path.name}.used")


def _delete(path: Path, uri: str, what: str) -> None:
    """Delete one file, if it can be had again and is not in use."""
    size = path.stat().st_size
    if storage.size(uri) != size:
        return
    with unused(path) as free:
        if free:
            path.unlink()
            print(f"krrst: {socket.gethostname()}: made room, {storage.in_words(size)}: removed {path}, {what}; it is kept at {uri}",
                  file=sys.stderr, flush=True)


def _sets(folder: Path) -> Iterator[tuple[Path, str, list[Path]]]:
    """Each prepared data set or target file in the folder: what was used, the stem of the data set, and its files."""
    for sidecar in sorted(folder.glob("*.json")):
        if sidecar.name.endswith(".npy.json") and TARGETS_OF in sidecar.name:
            yield sidecar.with_suffix(""), sidecar.name.partition(TARGETS_OF)[0], [sidecar.with_suffix("")]
        else:
            with suppress(DataError):
                yield sidecar, sidecar.stem, list(Prepared.load(sidecar).files)


def _used(path: Path) -> float:
    """When it was used, or written, in seconds since 1970."""
    times = [0.0]
    for file in (used_mark(path), path):
        with suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(times)

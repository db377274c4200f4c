"""Pixels of one or more betons by row, decoded by FFCV's compiled functions in the thread of the caller.

FFCV's Loader reads one file, in a thread of its own that dies silently when a sample is damaged, and hands out views into
a ring of buffers. Here its decoders are called directly on the mapped files: an exception is an exception, what is
returned is a copy, and reading ahead is left to `prefetch.py`. A file is mapped once a process, whatever the number of
readers, and its lock is held as long as it is mapped. Knows nothing of order, epochs or shards.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from krrst_dist.data.beton import JPEG, check_beton, importing_ffcv
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import opened_in_use

with importing_ffcv():
    from ffcv.libffcv import imdecode, memcpy
    from numba import njit

_imdecode, _memcpy = njit(imdecode), njit(memcpy)


class BetonDecoder:
    """Random access to the images and labels of betons, whose rows are counted through. One caller at a time; `close()` when done."""

    def __init__(self, betons: Sequence[tuple[Path, int]], *, threads: int = 1) -> None:
        """betons: at least one, of one size of images, each with the number of its images. threads: that decode together.

        Raises DataError (see `check_beton`).
        """
        self._files = [_mapped(path, count) for path, count in betons]
        self._firsts = np.cumsum([0] + [count for _, count in betons])  # [files + 1], first row of each
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
        self.read(np.arange(0))  # compiles

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [b] -> pixels uint8 [b, H, W, C], labels int64 [b]: new arrays.

        Raises DataError when an image is damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        pixels, labels = np.empty((len(rows), *self._files[0].size, 3), np.uint8), np.empty(len(rows), np.int64)
        parts = [slice(0, len(rows))]
        if self._pool is not None:
            cuts = np.linspace(0, len(rows), self._threads + 1).astype(int)
            parts = [slice(*cut) for cut in zip(cuts, cuts[1:], strict=False)]
        for _ in (map if self._pool is None else self._pool.map)(lambda part: self._fill(rows[part], pixels[part], labels[part]), parts):
            pass
        return pixels, labels

    def close(self) -> None:
        """Let go of threads and mapped files."""
        if self._pool is not None:
            self._pool.shutdown()
        self._files = []

    def _fill(self, rows: np.ndarray, pixels: np.ndarray, labels: np.ndarray) -> None:
        """Decode rows [b] into pixels [b, H, W, C] and labels [b], file by file."""
        of_file = np.searchsorted(self._firsts, rows, side="right") - 1  # [b]
        for f in np.unique(of_file) if len(rows) else [0]:
            file, places = self._files[f], np.flatnonzero(of_file == f)
            within = rows[places] - self._firsts[f]
            failed = _decode(within, places, pixels, *file.tables, file.stored)
            if failed >= 0:
                raise DataError(f"{file.path}: image {rows[places[failed]]} cannot be decoded, the file is damaged; delete it and run "
                                f"`krrst prepare` again")
            labels[places] = file.labels[within]


class _Mapped:
    """A beton in memory; what its lock says lasts as long as the mapping, which has a descriptor of the file of its own."""

    def __init__(self, path: Path, count: int) -> None:
        self.path = path
        if not path.is_file():
            check_beton(path, count)  # says so
        with opened_in_use(path) as file:
            rows = check_beton(path, count)
            self.stored = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        self.size, self.labels, self.tables = (rows.height, rows.width), rows.labels, (rows.starts, rows.sizes, rows.modes)


_open: WeakValueDictionary[tuple, _Mapped] = WeakValueDictionary()
_one_at_a_time = threading.Lock()


def _mapped(path: Path, count: int) -> _Mapped:
    """The mapped file; one that was replaced is another one."""
    try:
        found = path.stat()
        key = str(path), count, found.st_ino, found.st_size, found.st_mtime_ns
    except OSError:
        key = str(path), count  # and let it be said what is wrong
    with _one_at_a_time:
        file = _open.get(key) or _Mapped(path, count)
        _open[key] = file
    return file


@njit(nogil=True)
def _decode(rows, places, pixels, starts, sizes, modes, stored):
    """Fill pixels [places] from the mapped file; the number of the row that fails, or -1."""
    for i in range(len(rows)):
        row, to = rows[i], pixels[places[i]]
        data = stored[starts[row]:starts[row] + sizes[row]]
        if modes[row] == JPEG:
            height, width = to.shape[0], to.shape[1]
            if _imdecode(data, to, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                return i
        else:
            _memcpy(data, to)
    return -1

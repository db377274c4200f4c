"""Pixels of a beton by row, through FFCV's Loader, in the thread of the caller.

FFCV would run its pipeline in a thread of its own that dies silently when a sample is damaged, hands out views into
a ring of buffers and sets torch's thread count of the process. Here the same pipeline is called directly: an
exception is an exception, what is returned is a copy, and reading ahead is left to `prefetch.py`. The one compiled
function is compiled once a process, whatever number of files and readers. Knows nothing of order, epochs or shards.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from krrst_dist.data.beton import JPEG, check_beton, importing_ffcv, keeping_torch_threads
from krrst_dist.data.errors import DataError

with importing_ffcv():
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, memcpy
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.compiler import Compiler
    from numba import njit

_one_at_a_time = threading.Lock()  # making a Loader changes FFCV's process-wide settings for a moment
_imdecode, _memcpy = njit(imdecode), njit(memcpy)


class BetonDecoder:
    """Random access to the images and labels of one beton. One caller at a time; `close()` when done."""

    def __init__(self, path: Path, *, count: int, batch: int, threads: int = 1) -> None:
        """batch: the most rows of one `read`, for which memory is set aside. threads: that decode them together.

        Raises DataError (see `check_beton`).
        """
        check_beton(path, count)
        self.path = path
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads > 1 else None
        with _one_at_a_time, keeping_torch_threads():
            was_enabled = Compiler.is_enabled
            Compiler.set_enabled(False)  # the decoders below bring their own compiled function
            try:
                loader = Loader(str(path), batch_size=-(-batch // threads), num_workers=1, os_cache=True, drop_last=False,
                                batches_ahead=max(threads, 2) - 2,
                                pipelines={"image": [_ImageDecoder()], "label": [_IntDecoder()], "index": [_IntDecoder()]})
                self._pipeline = _Pipeline(loader, [])
            finally:
                Compiler.set_enabled(was_enabled)
        self.read(np.arange(0))  # compiles

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [b] -> pixels uint8 [b, H, W, C], labels int64 [b], index int64 [b]: new arrays.

        Raises DataError when an image is damaged.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)  # of one type, or `_decode` would be compiled again
        try:
            if self._pool is None:
                parts = [self._read_part(0, rows)]
            else:
                parts = list(self._pool.map(self._read_part, range(self._threads), np.array_split(rows, self._threads)))
        except _Damaged as damaged:
            raise DataError(f"{self.path}: image {damaged.row} cannot be decoded, the file is damaged; "
                            f"delete it and run `krrst prepare` again") from None
        pixels, labels, index = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return pixels, labels[:, 0], index[:, 0]

    def close(self) -> None:
        """Let go of threads, buffers and the mapped file."""
        if self._pool is not None:
            self._pool.shutdown()
        self._pipeline = None

    def _read_part(self, slot: int, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        return self._pipeline.run_pipeline(0, rows, slot, None)


class _Pipeline(EpochIterator):
    """FFCV's batch pipeline with its memory map and buffers (one slot a decoding thread), without its thread."""

    def start(self) -> None:
        pass


class _Damaged(Exception):
    def __init__(self, row: int) -> None:
        self.row = row


class _ImageDecoder(SimpleRGBImageDecoder):
    """Images of one size; unlike FFCV's own it notices when the JPEG decoder fails."""

    def generate_code(self) -> Callable:
        def decode(rows, pixels, images, storage):
            failed = _decode(rows, pixels, images, *storage)
            if failed >= 0:
                raise _Damaged(int(rows[failed]))
            return pixels

        return decode


class _IntDecoder(IntDecoder):
    """FFCV's own, for a whole batch at once."""

    def generate_code(self) -> Callable:
        def decode(rows, values, column, _storage):
            values[:, 0] = column[rows]
            return values

        return decode


@njit(nogil=True)
def _decode(rows, pixels, images, stored, starts, sizes):
    """Fill pixels [b, H, W, C] from the mapped file; the place in `rows` of an image that fails, or -1."""
    for i in range(len(rows)):
        image = images[rows[i]]
        start, height, width = image["data_ptr"], image["height"], image["width"]
        data = stored[start:start + sizes[np.searchsorted(starts, start)]]
        if image["mode"] == JPEG:
            if _imdecode(data, pixels[i], height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                return i
        else:
            _memcpy(data, pixels[i])
    return -1

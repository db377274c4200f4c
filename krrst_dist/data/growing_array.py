"""A .npy file that grows row by row and survives a kill.

Beside it a marker says how many rows are safely on the disk, and their checksum; what came after is cut off and made again.
Knows nothing of what the rows mean: it takes up old rows only when their `identity` is the one asked for.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from krrst_dist import storage
from krrst_dist.data import integrity
from krrst_dist.data.errors import DataError


class GrowingArray:
    """Rows float32 [rows so far, ...] of a `length` known beforehand. A context manager; leaving it for any reason marks.

    Raises DataError when the disk is full or cannot be written.
    """

    def __init__(self, file: Path, identity: dict[str, Any], *, length: int) -> None:
        """Take up the rows that are there, if they are of the same identity and length and undamaged; otherwise start anew."""
        self.file = file
        self.rows = 0
        """rows written"""
        self._marker = file.with_name(file.name + ".json")
        self._identity, self._length = identity | {"length": length}, length
        self._row: list[int] = []  # shape of one
        self._crc = 0  # of what was written
        mark = self._read_mark()
        if mark:
            self.rows, self._row, self._crc = mark["rows"], mark["row"], mark["crc"]
        self._handle = open(file, "r+b" if mark else "wb")
        self._bytes = self._handle.seek(self._handle.truncate(mark["bytes"] if mark else 0))  # of whole rows, and the header
        self.marked = time.monotonic()
        """when it was last marked"""

    def append(self, rows: np.ndarray) -> None:
        """rows: float32 [b, ...], of one shape throughout."""
        if self.rows == 0:
            self._begin(list(rows.shape[1:]))
        if list(rows.shape[1:]) != self._row:
            raise DataError(f"{self.file}: rows of shape {list(rows.shape[1:])} after rows of {self._row}; all must have one shape")
        self._write(np.ascontiguousarray(rows, dtype="<f4"))
        self.rows += len(rows)

    @property
    def checksum(self) -> str:
        """Of the file as it was written so far; see `integrity`."""
        return integrity.named(self._crc)

    def mark(self) -> None:
        """Make the rows so far safe from a kill."""
        with self._writing():
            self._handle.flush()
            os.fsync(self._handle.fileno())
        mark = {"identity": self._identity, "rows": self.rows, "row": self._row, "bytes": self._bytes, "crc": self._crc}
        storage.write_whole(self._marker, json.dumps(mark).encode())
        self.marked = time.monotonic()

    def publish(self, path: Path) -> None:
        """Rename the finished file."""
        assert self._handle.closed and self.rows == self._length
        os.replace(self.file, path)
        self._marker.unlink()

    def __enter__(self) -> GrowingArray:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._writing(), self._handle:  # closing writes, too
            self.mark()

    def _begin(self, row: list[int]) -> None:
        shape = (self._length, *row)
        needed, free = 4 * int(np.prod(shape)), shutil.disk_usage(self.file.parent).free
        if needed > free:
            raise DataError(f"{self.file}: takes {storage.in_words(needed)}, {storage.in_words(free)} are free there; free some or choose "
                            f"another --cache")
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        self._write(header.getbuffer())
        self._row = row

    def _write(self, payload: np.ndarray | memoryview) -> None:
        with self._writing():
            self._handle.write(payload)
            self._bytes = self._handle.tell()
        self._crc = zlib.crc32(payload, self._crc)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.file}: cannot be written ({error.strerror}); free some space there and run it again: it goes on "
                            f"where it stopped") from error

    def _read_mark(self) -> dict[str, Any] | None:
        """The marker, if what it says can be gone on from."""
        try:
            mark = json.loads(self._marker.read_text())
            usable = (mark["identity"] == self._identity and mark["rows"] > 0 and self.file.stat().st_size >= mark["bytes"]
                      and integrity.crc32(self.file, mark["bytes"]) == mark["crc"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mark if usable else None

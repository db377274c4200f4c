"""The .beton file: written whole, and checked before anything maps it into memory.

A file that is cut short or not ours would crash the process that maps it (SIGBUS), so `check_beton` compares every
pointer of the file with its size first, reading the tables with NumPy alone. Knows nothing of data sets or readers.

Layout (FFCV format 2): header, 3 field descriptors, one sample record an image, pages of pixels, allocation table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np
from tqdm import tqdm

from krrst_dist.data.errors import DataError
from krrst_dist.storage import atomic_path

FORMAT_VERSION = 2
FIELDS = {"image": 2, "label": 1, "index": 1}  # name -> FFCV's number of the field type, in file order
JPEG, RAW = 0, 1  # modes of an image record
JPEG_QUALITY = 95
PAGE_SIZE = 1 << 21  # bytes; the smallest FFCV takes

HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page_size", "<u4"), ("count", "<u8"), ("table", "<u8")], align=True)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("start", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8"), ("index", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("start", "<u8"), ("size", "<u8")])


class Items(Protocol):
    """What is written: images as np.uint8 [H, W, 3] with their labels, by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]: ...


def write_beton(path: Path, items: Items, *, resolution: int, encoding: Literal["raw", "jpeg"], indices: Sequence[int] | None = None,
                progress: bool = True) -> None:
    """Write `items` in order to a beton with the fields image, label and index (`indices`, rising; default: the position); whole or not
    at all.

    FFCV's own writer would fork workers and wait for ever when one of them fails. Here its parts do the work in this
    process: an exception in `items` reaches the caller as it is, and equal items give equal bytes.

    Raises:
        DataError: no items, an image that is not np.uint8 [resolution, resolution, 3], or no FFCV on this machine.
        OSError: the disk is full or cannot be written.
    """
    if len(items) == 0:
        raise DataError(f"{path}: there are no images to write; check where the data set is read from")
    with importing_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter, handle_sample

    fields = {"image": RGBImageField(write_mode="raw" if encoding == "raw" else "jpg", jpeg_quality=JPEG_QUALITY),
              "label": IntField(), "index": IntField()}
    with atomic_path(path) as temporary:
        writer = DatasetWriter(str(temporary), fields, page_size=PAGE_SIZE, num_workers=1)
        writer.num_samples = len(items)
        writer.prepare()  # header, field descriptors, and shared memory for the sample records, which one process does not need
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
        records = np.zeros(len(items), dtype=writer.metadata_type)
        writer.metadata_sm = SimpleNamespace(buf=records.view(np.uint8))
        allocator = MemoryAllocator(str(temporary), writer.data_region_start, PAGE_SIZE)
        shown = tqdm(range(len(items)), desc=f"writing {path.name}", unit="image", disable=not progress)
        with _closing_file(allocator), allocator, shown:
            for i in shown:
                image, label = items[i]
                if image.dtype != np.uint8 or image.shape != (resolution, resolution, 3):
                    raise DataError(f"{path}: image {i} is {image.dtype} {list(image.shape)}, not uint8 "
                                    f"[{resolution}, {resolution}, 3]; resize it and convert it to RGB first")
                handle_sample((image, label, i if indices is None else indices[i]), i, records.dtype.names, records, allocator, fields)
        writer.finalize(allocator.allocations)
        if writer.header["alloc_table_ptr"] != allocator.offset + allocator.next_page_written.value * PAGE_SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))  # FFCV does not look whether a page was written in full


@contextmanager
def _closing_file(allocator) -> Iterator[None]:
    """FFCV's allocator leaves its file open when its last page cannot be written."""
    try:
        yield
    finally:
        allocator.fp.close()


class Rows(NamedTuple):
    """Where the images of a beton are in it, and their labels; a row an image."""

    height: int
    width: int
    starts: np.ndarray  # int64 [n], bytes from the file's begin
    sizes: np.ndarray  # int64 [n], bytes
    modes: np.ndarray  # uint8 [n], RAW or JPEG
    labels: np.ndarray  # int64 [n]


def check_beton(path: Path, count: int, resolution: int | None = None, *, among: range | None = None) -> Rows:
    """Refuse a beton that is missing, empty, truncated, foreign or inconsistent; gives its rows.

    Afterwards every image's bytes are known to lie inside the file, all images have one size (`resolution` pixels a side, where
    it is given), and the indices rise (and are `among` these, where they are given).

    Raises:
        DataError: what is wrong and the remedy.
    """
    def refuse(what: str) -> NoReturn:
        raise DataError(f"{path}: {what}; delete it and run `krrst prepare` again")

    if not path.is_file():
        raise DataError(f"{path}: there is no such file; write it with `krrst prepare`")
    size = path.stat().st_size
    if size < HEADER.itemsize:
        refuse(f"not a beton ({size} bytes)")
    header = _table(path, HEADER, 1, 0)[0]
    if header["version"] != FORMAT_VERSION or header["fields"] != len(FIELDS):
        refuse("not a beton of this package (format or number of fields differ)")
    samples_at = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
    pixels_at = samples_at + count * SAMPLE.itemsize
    table_at = int(header["table"])
    if int(header["count"]) != count:
        refuse(f"holds {header['count']} images where {count} are expected")
    if table_at < pixels_at or size != table_at + count * ALLOCATION.itemsize:
        refuse(f"truncated or never finished ({size} bytes)")

    names = _table(path, FIELD, len(FIELDS), HEADER.itemsize)
    if {str(f["name"], "ascii", "replace"): int(f["type"]) for f in names} != FIELDS:
        refuse("not a beton of this package (its fields differ)")
    samples = _table(path, SAMPLE, count, samples_at)
    table = _table(path, ALLOCATION, count, table_at)
    images = samples["image"]
    starts, sizes = table["start"], table["size"]
    area = int(images["height"][0]) * int(images["width"][0])
    index = samples["index"]
    sound = (
        (np.diff(index) > 0).all() and (among is None or (among.start <= index[0] and index[-1] < among.stop))
        and np.array_equal(table["sample"], np.arange(count, dtype="<u8"))
        and np.array_equal(images["start"], starts)
        and (starts >= pixels_at).all() and (sizes <= table_at).all() and (starts <= table_at - sizes).all()
        and np.isin(images["mode"], (JPEG, RAW)).all()
        and (images["height"] == images["height"][0]).all() and (images["width"] == images["width"][0]).all()
        and (sizes[images["mode"] == RAW] == 3 * area).all()
    )
    if not sound:
        refuse("damaged (its tables contradict each other)")
    height, width = int(images["height"][0]), int(images["width"][0])
    if resolution is not None and (height, width) != (resolution, resolution):
        refuse(f"holds images of {height} x {width} pixels where {resolution} a side are expected")
    return Rows(height, width, starts.astype(np.int64), sizes.astype(np.int64), images["mode"].copy(), samples["label"].astype(np.int64))


def _table(path: Path, dtype: np.dtype, count: int, offset: int) -> np.ndarray:
    return np.fromfile(path, dtype=dtype, count=count, offset=offset)


@contextmanager
def keeping_torch_threads() -> Iterator[None]:
    """FFCV sets torch's thread count of the whole process when it is imported and when a Loader is made; put it back."""
    import torch

    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """Around FFCV's imports: torch's thread count stays, and a machine without it is told so.

    FFCV keeps its two image modes in numba's dict, for which numba compiles for three seconds in every process. Only
    Python reads them, so a plain dict stands in.
    """
    with keeping_torch_threads():
        try:
            import numba.typed

            of_numba, numba.typed.Dict = numba.typed.Dict, dict
            try:
                yield
            finally:
                numba.typed.Dict = of_numba
        except ImportError as error:
            raise DataError(f"FFCV, which writes and reads betons, cannot be imported ({error}); run clusters/setup_node.sh on "
                            f"this machine, and `krrst doctor` to see what is missing") from error

"""Labelled images from files, from Parquet and from arrays, behind one small protocol.

Each reader knows how many images there are, their labels and a fingerprint of them before any image is decoded, so
that what is wrong with a data set shows in seconds. Knows no data set by name (`sources.py`) and no folder layout
(`layouts.py`), and leaves an image as it was stored (`images.py` makes it RGB).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import stat
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from krrst_dist.data.errors import BadImage, DataError

UNLABELLED = -1
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
UNNAMED_UP_TO = 10_000
"""classes without names, called by their number, that a data set may have whatever its size; beyond it no more than images"""


@dataclass(frozen=True)
class Item:
    """One image as it was stored, decoded; `label` is UNLABELLED (-1) where there is none; `where` names it to a user."""

    image: Image.Image
    label: int
    where: str


class Images(Protocol):
    """One split of a data set. May be indexed from several threads at once, and sent to another process.

    `labels` is int64 [n]. `fingerprint` changes when an image or a label does. Indexing raises BadImage.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    labelled: bool
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Item: ...

    def where(self, i: int) -> str:
        """An image's file and place in it, for people."""
        ...

    def some(self, first: int, stop: int) -> Images:
        """The images from `first` to before `stop`, with the fingerprint of all; small where the images are in files."""
        ...

    def require_there(self) -> None:
        """Raise DataError unless the files that hold the images are here, as long as they were when they were listed."""
        ...


class FileImages:
    """One image a file. What is there but cannot be read as a file (a link to nothing, a pipe) is a bad image.

    The fingerprint covers each file's name, size and label, not its pixels: a million files are too many to read twice.

    Args:
        folder: what the files' names are relative to.
        files: paths relative to `folder`, in the order of the images.
        labels: [n], or None for images without labels.
        class_names: one name a class; empty without labels.
    """

    def __init__(self, folder: Path, files: Sequence[str], labels: Sequence[int] | None, class_names: Sequence[str]) -> None:
        self._folder, self._files = str(folder), list(files)
        self.labelled = labels is not None
        self.labels = np.full(len(self._files), UNLABELLED) if labels is None else np.asarray(labels, np.int64)  # [n]
        self.class_names = tuple(map(printable, class_names))
        check_labels(self)
        self._unreadable: dict[int, str] = {}  # image -> why
        digest = hashlib.sha256()
        self._sizes: list[int | None] = []
        for i, (file, label) in enumerate(zip(self._files, self.labels.tolist(), strict=True)):
            size = self._size(i, os.path.join(self._folder, file))
            self._sizes.append(size)
            digest.update(os.fsencode(file) + f"\0{size}\0{label}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def where(self, i: int) -> str:
        return printable(os.path.join(self._folder, self._files[i]))

    def __getitem__(self, i: int) -> Item:
        where = self.where(i)
        if i in self._unreadable:
            raise BadImage(where, self._unreadable[i])
        return Item(decode(os.path.join(self._folder, self._files[i]), where), int(self.labels[i]), where)

    def some(self, first: int, stop: int) -> FileImages:
        part = copy.copy(self)
        part._files, part._sizes, part.labels = self._files[first:stop], self._sizes[first:stop], self.labels[first:stop]
        part._unreadable = {i - first: why for i, why in self._unreadable.items() if first <= i < stop}
        return part

    def require_there(self) -> None:
        for i, size in enumerate(self._sizes):
            if size is not None:
                require_size(os.path.join(self._folder, self._files[i]), size)

    def _size(self, i: int, path: str) -> int | None:
        """Bytes of a file, None where it cannot be read as one. Raises DataError when it is missing."""
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if not os.path.islink(path):
                raise DataError(f"{printable(path)}: missing, though the data set lists it; complete the copy") from None
            self._unreadable[i] = f"a link to {printable(os.readlink(path))}, which is not there"
        except OSError as error:
            self._unreadable[i] = error.strerror
        else:
            if stat.S_ISREG(found.st_mode):
                return found.st_size
            self._unreadable[i] = "a pipe, socket, device or folder, not a file"
        return None


class ParquetImages:
    """Rows of Parquet files in the usual image convention: `image: struct<bytes, path>` and, if labelled, `label: int64`.

    Class names come from the schema's metadata (`class_names`, or Hugging Face's `ClassLabel`); without them classes are
    called by their number. The fingerprint is that of the files' content. Row groups are read when needed; the last few are kept.
    """

    _GROUPS_KEPT = 4

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        with ThreadPoolExecutor() as pool:
            opened = list(pool.map(_open_parquet, self._paths))
        files = [file for file, _ in opened]
        self.fingerprint = hashlib.sha256(b"".join(digest for _, digest in opened)).hexdigest()
        self._sizes = [os.path.getsize(path) for path in self._paths]
        schema = files[0].schema_arrow
        rows = [file.metadata.num_rows for file in files]
        self._first_rows = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])  # [files + 1] first image of each file
        self._groups = [(f, g) for f, file in enumerate(files) for g in range(file.num_row_groups)]
        sizes = [files[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # [groups + 1] first image of each row group
        self._before = 0  # images before the first
        self._open(files)
        self.labelled = "label" in schema.names
        if self.labelled:
            self.labels = np.concatenate([_label_column(*pair) for pair in zip(self._paths, files, strict=True)])  # [n]
            self.class_names = _class_names(self._paths[0], schema) or numbered_classes(self)
        else:
            self.labels, self.class_names = np.full(sum(rows), UNLABELLED), ()
        check_labels(self)

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, i: int) -> str:
        file, row = self._place(i)
        return f"{self._paths[file]}, row {row}"

    def __getitem__(self, i: int) -> Item:
        group, where = int(np.searchsorted(self._starts, self._before + i, side="right")) - 1, self.where(i)
        row = self._column(group)[int(self._before + i - self._starts[group])].as_py()  # None where the whole struct is null
        payload = row and row["bytes"]
        if payload is None:
            raise BadImage(where, "the row holds no bytes")
        return Item(decode(io.BytesIO(payload), where), int(self.labels[i]), where)

    def some(self, first: int, stop: int) -> ParquetImages:
        part = object.__new__(ParquetImages)
        vars(part).update(vars(self))  # in this process it shares the open files and the row groups that are kept
        part._before, part.labels = self._before + first, self.labels[first:stop]
        return part

    def require_there(self) -> None:
        for file in range(self._place(0)[0], self._place(len(self) - 1)[0] + 1):
            require_size(str(self._paths[file]), self._sizes[file])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept", "_files")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open([None] * len(self._paths))  # each when it is needed

    def _open(self, files: list[pq.ParquetFile | None]) -> None:
        self._lock, self._kept, self._files = threading.Lock(), {}, files

    def _place(self, i: int) -> tuple[int, int]:
        """File and row of an image."""
        file = int(np.searchsorted(self._first_rows, self._before + i, side="right")) - 1
        return file, int(self._before + i - self._first_rows[file])

    def _column(self, group: int) -> pa.ChunkedArray:
        """The images of one row group."""
        with self._lock:
            if group not in self._kept:
                file, index = self._groups[group]
                try:
                    self._files[file] = self._files[file] or pq.ParquetFile(self._paths[file])
                    column = self._files[file].read_row_group(index, columns=["image"]).column("image")
                except (OSError, pa.ArrowException) as error:
                    raise DataError(f"{self._paths[file]}: row group {index} cannot be read ({error}); get the file again") from error
                if len(self._kept) == self._GROUPS_KEPT:
                    del self._kept[next(iter(self._kept))]
                self._kept[group] = column
            return self._kept[group]


class ArrayImages:
    """Images already in memory: uint8 [n, H, W] (grayscale) or [n, H, W, 3], int64 labels [n]; `title` names them to a user."""

    labelled = True

    def __init__(self, title: str, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        self._title, self._pixels, self._before = title, pixels, 0
        self.labels = np.asarray(labels, np.int64)  # [n]
        self.class_names = tuple(class_names)
        self.fingerprint = hashlib.sha256(pixels.tobytes() + self.labels.tobytes()).hexdigest()
        check_labels(self)

    def __len__(self) -> int:
        return len(self._pixels)

    def where(self, i: int) -> str:
        return f"{self._title}, image {self._before + i}"

    def __getitem__(self, i: int) -> Item:
        return Item(Image.fromarray(self._pixels[i]), int(self.labels[i]), self.where(i))

    def some(self, first: int, stop: int) -> ArrayImages:
        part = copy.copy(self)
        part._before, part._pixels, part.labels = self._before + first, self._pixels[first:stop], self.labels[first:stop]
        return part

    def require_there(self) -> None:
        """They travel with the object."""


def is_image(name: str) -> bool:
    """By a file's base name."""
    return name.lower().endswith(_IMAGE_ENDINGS) and not name.startswith(".")


def decode(source: str | BinaryIO, where: str) -> Image.Image:
    """Decode a whole image. Raises BadImage, whatever the decoder trips over: it raises a dozen kinds of error."""
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except Exception as error:
        said = re.sub(r" *<[^<>]* at 0x[0-9a-f]+>", "", str(error))  # an object's address is another one every time
        raise BadImage(where, f"{type(error).__name__}: {said}") from error


def numbered_classes(images: Images) -> tuple[str, ...]:
    """Classes called by their number. Raises DataError for a label that counts no classes: it would make as many names."""
    highest, most = int(images.labels.max(initial=-1)), max(len(images), UNNAMED_UP_TO)
    if highest >= most:
        raise DataError(f"{images.where(int(images.labels.argmax()))}: label {highest} is too high for the number of a class: "
                        f"{len(images)} images without class names may have at most {most} classes (0 to {most - 1}); correct it, number "
                        f"the classes from 0, or, in Parquet, give class_names in the schema's metadata")
    return tuple(str(c) for c in range(highest + 1))


def require_size(path: str, size: int) -> None:
    """Raise DataError unless a file is there and of this size."""
    try:
        found = os.path.getsize(path)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read here ({error.strerror})") from None
    if found != size:
        raise DataError(f"{printable(path)}: {found} bytes here, {size} where the images were listed; it is not the same data")


def check_labels(images: Images) -> None:
    """Raise DataError for the first label that is no class."""
    if not images.labelled:
        return
    wrong = np.flatnonzero((images.labels < 0) | (images.labels >= len(images.class_names)))
    if wrong.size:
        i, classes = int(wrong[0]), len(images.class_names)
        rule = f"is not one of the {classes} classes (0 to {classes - 1})" if classes else "is no class: they are numbered from 0"
        raise DataError(f"{images.where(i)}: label {images.labels[i]} {rule}; correct it, or, if the labels of this split are withheld, "
                        f"take one that has them, or leave the labels out altogether")


def _open_parquet(path: Path) -> tuple[pq.ParquetFile, bytes]:
    """The opened file and the hash of its content. Raises DataError unless it has images in the usual convention."""
    try:
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").digest()
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); get the file again") from error
    schema = file.schema_arrow
    kind = schema.field("image").type if "image" in schema.names else None
    if kind is None or not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0 or not (
            pa.types.is_binary(kind.field("bytes").type) or pa.types.is_large_binary(kind.field("bytes").type)):
        raise DataError(f"{path}: no column image: struct<bytes, path> (columns: {', '.join(schema.names)}); rename or rewrite it")
    return file, digest


def _label_column(path: Path, file: pq.ParquetFile) -> np.ndarray:
    if "label" not in file.schema_arrow.names:
        raise DataError(f"{path}: no column label, though the shards beside it have one; get the file again")
    column = file.read(columns=["label"]).column("label")
    if not pa.types.is_integer(column.type) or column.null_count:
        raise DataError(f"{path}: column label must be whole numbers without gaps, not {column.type} with {column.null_count} missing")
    return column.to_numpy().astype(np.int64)


def _class_names(path: Path, schema: pa.Schema) -> tuple[str, ...] | None:
    """The names in the schema's metadata, None where it has none. Raises DataError when it cannot be understood."""
    metadata = schema.metadata or {}
    try:
        if b"class_names" in metadata:
            names = json.loads(metadata[b"class_names"])
        else:
            names = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {}).get("label", {}).get("names") or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{names!r} is no list of names")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: its schema's metadata does not give class names as it should ({error}); rewrite the metadata class_names "
                        f"as a JSON list of names, or leave class_names and huggingface out") from error
    return tuple(names) or None


def printable(name: str) -> str:
    """A file's name as it can be shown and stored, whatever bytes it is made of."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")

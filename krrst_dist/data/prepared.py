"""A prepared split of a data set: one or more betons of consecutive images, and a JSON file that says what is in them, its manifest.

The manifest is written last: betons without one are not there. Knows nothing of where the images came from or how they are read.
"""

from __future__ import annotations

import json
import weakref
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from krrst_dist import seeds, storage
from krrst_dist.config import ConfigError, NonNegative, Positive
from krrst_dist.data import integrity
from krrst_dist.data.beton import check_beton
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import opened_in_use

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]
Checksum = Annotated[str, Field(pattern=integrity.PATTERN)]
Sums = tuple[NonNegative, NonNegative, NonNegative]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.beton$")]
"""of a file beside the manifest: it leads nowhere else"""
TARGETS_OF = "-targets-"
"""between the stem of a manifest and the rest of the name of a file of target representations"""


@dataclass(frozen=True)
class Part:
    """One beton: some consecutive images of the source, less those that were skipped. A part of nothing but those has no file."""

    name: FileName
    first: NonNegative
    """place in the source of the part's first image"""
    count: NonNegative
    """images in the beton"""
    size: NonNegative
    """bytes of the beton"""
    checksum: Checksum
    """of those bytes; see `integrity`"""
    total: Sums
    """sum over the pixels, one a channel (before JPEG, where that is used): whole numbers, so that parts may be added in any order"""
    squares: Sums
    """sum of their squares"""
    bad_images: tuple[str, ...] = ()
    """those skipped: path or row, and why"""

    @property
    def found(self) -> int:
        """Images of the source that belong to it."""
        return self.count + len(self.bad_images)

    def check(self, folder: Path, resolution: int) -> None:
        """Compare the beton with this (size, tables, and checksum once a node), without mapping it. Raises DataError."""
        path = folder / self.name
        if self.count == 0:
            return
        if not path.is_file():
            raise DataError(f"{path}: not there; run `krrst prepare`")
        if path.stat().st_size != self.size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, but its sidecar says {self.size}: truncated, or another file; "
                            f"delete it and run `krrst prepare` again")
        check_beton(path, self.count, resolution, among=range(self.first, self.first + self.found))
        integrity.require_whole(path, self.checksum, remedy="delete it and run `krrst prepare` again")


@dataclass(frozen=True)
class Prepared:
    """What the betons hold. `mean` and `std` are those of all their pixels in [0, 1], one a channel (before JPEG, where that is used).

    Images are counted through all parts, without those that were skipped. The betons' fields are image (uint8 [resolution,
    resolution, 3]), label and index, the image's place in the source.
    """

    path: Path
    """the manifest; the betons are beside it"""
    resolution: Positive
    resize: Literal["crop", "squash"]
    encoding: Literal["raw", "jpeg"]
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Std, Std, Std]
    class_names: tuple[str, ...]
    labelled: bool
    name: str
    """registry name of the source"""
    split: Literal["train", "test"]
    official_count: Positive | None
    """images that the whole split has, None where nobody says; more than `found` where the copy at hand is a part of it"""
    fingerprint: str
    """hash of the source's images and labels and of how they were prepared"""
    parts: tuple[Part, ...]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def found(self) -> int:
        """Images found in the source; `count` is less where bad ones were skipped."""
        return sum(part.found for part in self.parts)

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Those skipped: path or row, and why."""
        return tuple(bad for part in self.parts for bad in part.bad_images)

    @property
    def files(self) -> dict[Path, Part]:
        """The betons, in order."""
        return {self.path.parent / part.name: part for part in self.parts if part.count}

    def save(self) -> None:
        """Write the manifest: from now on the betons count as whole."""
        described = asdict(self)
        del described["path"]
        storage.write_whole(self.path, (json.dumps(described, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Read a manifest, without looking at the betons. Raises DataError when it is missing or describes none."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: not there; run `krrst prepare`")
        again = "delete it and run `krrst prepare` again"
        try:
            described = json.loads(path.read_text())
            if {"checksum", "size"} <= described.keys():
                raise DataError(f"{path}: prepared by an earlier version, which wrote one beton a split and no list of parts; {again}")
            missing = {field.name for field in fields(cls)} - {"path"} ^ described.keys()
            if missing:
                raise ValueError(f"fields missing or unknown: {', '.join(sorted(missing))}")
            prepared = TypeAdapter(cls).validate_python(described | {"path": path})
            prepared._require_rising()
        except DataError:
            raise
        except (ValueError, AttributeError) as error:
            wrong = _explain(error) if isinstance(error, ValidationError) else error
            raise DataError(f"{path}: does not describe a prepared data set ({wrong}); {again}") from error
        return prepared

    @classmethod
    def open(cls, path: Path) -> Prepared:
        """Read a manifest and check every beton against it (`Part.check`). They are in use as long as the object lives.

        Raises:
            DataError: missing, truncated, damaged or foreign beton or manifest.
        """
        prepared = cls.load(path)
        with ExitStack() as stack, suppress(FileNotFoundError):  # `check` says which
            for file in prepared.files:
                stack.enter_context(opened_in_use(file))
            weakref.finalize(prepared, stack.pop_all().close)
        for part in prepared.parts:
            part.check(prepared.path.parent, prepared.resolution)
        return prepared

    def _require_rising(self) -> None:
        place = 0
        for i, part in enumerate(self.parts):
            if part.first != place:
                raise ValueError(f"parts.{i}.first = {part.first}: the parts before it end at {place}")
            place += part.found
        if self.count == 0:
            raise ValueError("parts = none with an image")


def _explain(error: ValidationError) -> str:
    """Each field that is wrong, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))} = {e['input']!r}: {e['msg']}" for e in error.errors())


def held_out_split(count: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set some images aside: (training int64 [count - held_out], held out int64 [held_out]), each sorted.

    Raises:
        ConfigError: nothing would be left to train on.
    """
    if not 0 <= held_out < count:
        raise ConfigError(f"source.held_out = {held_out}: must leave at least one of the {count} images to train on; lower it")
    order = seeds.numpy_rng(seed, "held out").permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])

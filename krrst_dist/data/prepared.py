"""A prepared data set: a beton, and beside it a JSON file that says what is in it.

The JSON is written last: a beton without one is not there. Knows nothing of where the images came from or how they are read.
"""

from __future__ import annotations

import json
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

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(gt=0, le=1)]
Checksum = Annotated[str, Field(pattern=integrity.PATTERN)]


@dataclass(frozen=True)
class Prepared:
    """What a beton holds. `mean` and `std` are those of all its pixels in [0, 1], one a channel (before JPEG, where that is used)."""

    path: Path
    """the beton; fields image (uint8 [resolution, resolution, 3]), label, index"""
    count: Positive
    size: NonNegative
    """bytes of the beton"""
    checksum: Checksum
    """of those bytes; see `integrity`"""
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
    found: Positive
    """images found in the source; `count` is less where bad ones were skipped"""
    official_count: Positive | None
    """images that the whole split has, None where nobody says; more than `found` where the copy at hand is a part of it"""
    fingerprint: str
    """hash of the source's images and labels and of how they were prepared"""
    bad_images: tuple[str, ...] = ()
    """those skipped: path or row, and why"""

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    def save(self) -> None:
        """Write the sidecar: from now on the beton counts as whole."""
        described = asdict(self)
        del described["path"]
        storage.write_whole(self.sidecar, (json.dumps(described, indent=1) + "\n").encode())

    @classmethod
    def open(cls, path: Path) -> Prepared:
        """Read the sidecar of a beton and check the beton against it (size, header, and checksum once a node), without mapping it.

        Raises:
            DataError: missing, truncated, damaged or foreign beton or sidecar.
        """
        path = Path(path)
        sidecar = path.with_suffix(".json")
        for file in (path, sidecar):
            if not file.is_file():
                raise DataError(f"{file}: not there; run `krrst prepare`")
        try:
            described = json.loads(sidecar.read_text())
            missing = {field.name for field in fields(cls)} - {"path"} ^ described.keys()
            if missing:
                raise ValueError(f"fields missing or unknown: {', '.join(sorted(missing))}")
            prepared = TypeAdapter(cls).validate_python(described | {"path": path})
        except (ValueError, AttributeError) as error:
            wrong = _explain(error) if isinstance(error, ValidationError) else error
            raise DataError(f"{sidecar}: does not describe a prepared data set ({wrong}); "
                            f"delete it and run `krrst prepare` again") from error
        if path.stat().st_size != prepared.size:
            raise DataError(f"{path}: {path.stat().st_size} bytes, but its sidecar says {prepared.size}: truncated, or another file; "
                            f"delete it and run `krrst prepare` again")
        check_beton(path, prepared.count, prepared.resolution)
        integrity.require_whole(path, prepared.checksum, remedy="delete it and run `krrst prepare` again")
        return prepared


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

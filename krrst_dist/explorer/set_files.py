"""The files of one distillation run as they are now: its images at every point of time, its losses, its map of the feature space."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from krrst_dist import parquet, sheets, storage
from krrst_dist.artifacts import ArtifactError, DistilledSet, read_header
from krrst_dist.explorer.library import SetPlace
from krrst_dist.feature_map import FILE, FeatureMap

_PICTURE = re.compile(r"step-(\d{8,12})\.png")
SETS = ("distilled", "start")
MAPS = ("nearest", "real")


@dataclass(frozen=True)
class SetFiles:
    """One run's files."""

    place: SetPlace

    @cached_property
    def names(self) -> list[str]:
        """In its folder."""
        return storage.list_names(self.place.uri)

    @cached_property
    def steps(self) -> list[str]:
        """Names of the pictures that were taken along the way, in their order: step-00000000, ..."""
        found = storage.list_names(storage.join(self.place.uri, "pictures")) if "pictures" in self.names else []
        return sorted(name.removesuffix(".png") for name in found if _PICTURE.fullmatch(name))

    def load(self, which: str) -> DistilledSet:
        """which: `distilled` or `start`. Raises FileNotFoundError, ArtifactError, StorageError."""
        return _kept(storage.join(self.place.uri, f"{which}.safetensors"), DistilledSet.load)

    def images(self, which: str) -> np.ndarray:
        """uint8 [m, H, W, C]. which: `distilled`, `start`, one of `steps`; `nearest`: the real image nearest to each; `real`: the real ones
        of the feature map. Raises KeyError for another word, FileNotFoundError, ArtifactError, StorageError."""
        if which in SETS:
            return _kept(storage.join(self.place.uri, f"{which}.safetensors"), _of_set)
        if which in MAPS:
            return getattr(self._map(), f"{which}_images")
        if which in self.steps:
            return _kept(storage.join(self.place.uri, "pictures", f"{which}.png"), _of_sheet)
        raise KeyError(which)

    @cached_property
    def method(self) -> str:
        """The method that made the run's set, or its start where it has not ended; '' where neither says it."""
        for which in SETS:
            try:
                return str(json.loads(read_header(storage.join(self.place.uri, f"{which}.safetensors"))[1]["metadata"])["method"])
            except (FileNotFoundError, ArtifactError, storage.StorageError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return ""

    @property
    def feature_map(self) -> FeatureMap | None:
        """None where it has not been computed. Raises ArtifactError, StorageError."""
        return self._map() if FILE in self.names else None

    @cached_property
    def history(self) -> pa.Table | None:
        """Losses by update, None where there are none that can be read."""
        try:
            return parquet.decode(storage.read_whole(storage.join(self.place.uri, "history.parquet")))
        except (OSError, ValueError, pa.ArrowException):
            return None

    def _map(self) -> FeatureMap:
        return _kept(storage.join(self.place.uri, FILE), FeatureMap.load)


def _of_set(uri: str) -> np.ndarray:
    held = DistilledSet.load(uri)
    return sheets.to_pixels(held.x_syn, held.space)


def _of_sheet(uri: str) -> np.ndarray:
    try:
        return sheets.cut(storage.read_whole(uri))
    except ArtifactError as error:
        raise ArtifactError(f"{uri}: {error}") from None


def _kept(uri: str, read: Callable[[str], Any]) -> Any:
    """What `read` makes of a file, kept for as long as it stays as it is."""
    version = storage.changed(uri)
    if version is None or storage.is_link(uri):  # which may lead out of the folder
        raise FileNotFoundError(uri)
    with _ONE_AT_A_TIME:  # a page asks for sixty images at once, of one file
        return _read(uri, version, read)


_ONE_AT_A_TIME = threading.Lock()


@lru_cache(maxsize=12)
def _read(uri: str, version: object, read: Callable[[str], Any]) -> Any:
    return read(uri)

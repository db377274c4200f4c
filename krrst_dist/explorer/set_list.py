"""Which distillation runs there are, and what the beginnings of their files say of the sets. Writes no HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError, read_header
from krrst_dist.explorer.library import SetPlace

THREADS = 16


@dataclass(frozen=True)
class Listed:
    """One run. problem: why nothing can be said of its set, '' where something can."""

    name: str
    method: str = ""
    source: str = ""
    images: str = ""
    labels: str = ""
    problem: str = ""


def listed(places: Sequence[SetPlace]) -> list[Listed]:
    """In the same order; as many files are looked at at once as THREADS."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_one, places))


def _one(place: SetPlace) -> Listed:
    uri = storage.join(place.uri, "distilled.safetensors")
    try:
        version = storage.changed(uri)
        return Listed(place.name, *_said(uri, version)) if version else Listed(place.name, problem="has not ended")
    except FileNotFoundError:
        return Listed(place.name, problem="has not ended")
    except (ArtifactError, storage.StorageError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return Listed(place.name, problem="cannot be read")


@lru_cache(maxsize=4096)
def _said(uri: str, version: object) -> tuple[str, str, str, str]:
    """Method, source, images and labels, of the file as it was written then."""
    shapes, about = read_header(uri)
    made = json.loads(about["metadata"])
    return str(made.get("method", "")), str(made.get("source", "")), " x ".join(map(str, shapes["x_syn"])), about["label_kind"]

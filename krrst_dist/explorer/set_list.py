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
    """One run. settings: how the set was made, as canonical JSON. problem: why nothing can be said of its set, '' where something can."""

    name: str
    method: str = ""
    source: str = ""
    images: str = ""
    labels: str = ""
    seed: str = ""
    settings: str = ""
    problem: str = ""


def listed(places: Sequence[SetPlace]) -> list[Listed]:
    """In the same order; as many files are looked at at once as THREADS."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_one, places))


def made_with(places: Sequence[SetPlace], settings: str, seed: int | None) -> str:
    """The name of the run whose set was made so, '' where there is none. settings: as in a result's `distillation`."""
    if seed is None:
        return ""
    return next((one.name for one in listed(places) if one.settings and (one.settings, one.seed) == (_canonical(settings), str(seed))), "")


def _canonical(settings: str) -> str:
    return json.dumps(json.loads(settings), sort_keys=True)


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
def _said(uri: str, version: object) -> tuple[str, ...]:
    """Method, source, images, labels, seed and settings, of the file as it was written then."""
    shapes, about = read_header(uri)
    made = json.loads(about["metadata"])
    return (str(made.get("method", "")), str(made.get("source", "")), " x ".join(map(str, shapes["x_syn"])), about["label_kind"],
            str(made.get("seed", "")), json.dumps(made["distillation"], sort_keys=True) if "distillation" in made else "")

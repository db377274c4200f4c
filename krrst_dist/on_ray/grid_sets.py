"""The sets that a grid evaluates: found where they are, or made by the pipeline first.

A made set lies under the grid's folder, named by everything it depends on, so that a second grid or a second start finds it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any

from krrst_dist import paths, storage
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError
from krrst_dist.data.lock import alone
from krrst_dist.data.prepare import prepared_fingerprint
from krrst_dist.data.sources import open_images
from krrst_dist.grid_config import SetSettings
from krrst_dist.methods import krr_st
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.source import Source
from krrst_dist.on_ray import pipeline, targets
from krrst_dist.on_ray.places import Places, prepared_source
from krrst_dist.on_ray.preflight import check_checkpoint, check_images, check_labels, check_names
from krrst_dist.presets_and_grids import load_preset

MADE: dict[str, Callable[[Config, Source], DistilledSet]] = {
    "random_targets": krr_st.METHOD.start, "random_labels": real_images.random_labels, "all_targets": real_images.all_targets}
REAL_DEPENDS = ("source.", "target.", "distill.m", "distill.space", "distill.start_y")
"""the settings that sets of real images depend on"""


@dataclass(frozen=True)
class GridSet:
    """One set of a grid, without its images: `path` is None and `fingerprint` empty where there is no set."""

    entry: SetSettings
    seed: int | None
    """distillation seed"""
    path: str | None = None
    fingerprint: str = ""
    label_kind: str = ""
    recipe: dict[str, Any] | None = None
    shape: tuple[int, ...] = ()
    source: str = ""
    source_fingerprint: str = ""
    distillation: dict[str, Any] = field(default_factory=dict)
    """how it was made, as far as its file says"""


def load_presets(entry: SetSettings, gpus: float = 0) -> list[Config]:
    """The runs that make an entry's sets, one a seed; on GPUs where the grid has some. Raises ConfigError."""
    if entry.preset is None:
        return []
    changes = ({"engine.gpus": 1} if gpus else {}) | entry.settings | {"repeats": 1}
    return [load_preset(entry.preset, method=entry.by, **changes | {"seed": seed}) for seed in entry.seeds]


def given(entry: SetSettings) -> list[GridSet]:
    """The sets of an entry that has no preset: the files that are there, or no set. Raises ConfigError, ArtifactError."""
    return [_described(entry, path) for path in _find(entry)] if entry.path is not None else [GridSet(entry, None)]


def check_makeable(entry: SetSettings, config: Config, places: Places) -> None:
    """Can a set be made, as far as its data and settings say? Raises ConfigError, DataError."""
    check_names(config)
    check_checkpoint(config)
    images = open_images(config.source.dataset, "train", places.data)
    check_labels(config, images.labelled)
    check_images(config, len(images), distils=True, labels=images.labels if images.labelled else None)
    if entry.make == "random_labels" and not images.labelled:
        raise ConfigError(f"sets: method {entry.method!r}, make = random_labels: {config.source.dataset} has no labels; take make = "
                          f"random_targets")


def make(entry: SetSettings, config: Config, places: Places, *, wait: bool) -> GridSet:
    """A set that the pipeline makes, unless it is there. Raises what the pipeline raises."""
    out = storage.join(places.out, "sets", f"{config.preset.rpartition('/')[2]}-{_code(config, places)}")
    where = replace(places, out=out)
    name = "distilled" if entry.make == "distilled" else entry.make.replace("_", "-")
    path = storage.join(out, f"seed-{config.seed}", f"{name}.safetensors")
    places.cache.local.mkdir(parents=True, exist_ok=True)
    with alone(places.cache.local / hashlib.sha256(path.encode()).hexdigest()[:16], lambda _: print(f"another grid makes {path}; waiting")):
        if not storage.exists(path):
            if entry.make == "distilled":
                pipeline.run_stages(config, where, resume=True, wait=wait, until="distill")
            else:
                _real_images(entry.make, config, where, wait=wait).save(path)
    return _described(entry, path, seed=config.seed)


def _code(config: Config, places: Places) -> str:
    """Hash of everything that a run's sets depend on, but the seed."""
    images = open_images(config.source.dataset, "train", places.data)
    checkpoint = config.target.checkpoint
    depends = config.trajectory() | config.distillation() | {
        "seed": 0,
        "source": prepared_fingerprint(images, resolution=config.source.resolution, resize=config.source.resize, on_bad_image="stop"),
        "checkpoint": checkpoint and storage.digest(checkpoint)}
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]


def _real_images(make: str, config: Config, places: Places, *, wait: bool) -> DistilledSet:
    pipeline.run_stages(config, places, wait=wait, until="target")
    prepared = prepared_source(config, places, wait=wait)
    found = targets.compute(config, prepared, places.cache, wait=wait)
    source = Source.of(config, places.cache.fetch_prepared(prepared.path), found.file)
    made = MADE[make](config, source)
    depends = {key: value for key, value in config.distillation().items() if key.startswith(REAL_DEPENDS)}
    origin = {"method": make, "distillation": depends, "seed": config.seed, "source": prepared.name,
              "source_fingerprint": prepared.fingerprint, "target_fingerprint": source.targets.fingerprint}
    return replace(made, metadata=origin)


def _described(entry: SetSettings, path: str, seed: int | None = None) -> GridSet:
    found = DistilledSet.load(path)
    about = found.metadata
    given, depends = seed if seed is not None else about.get("seed"), about.get("distillation")
    return GridSet(entry, int(given) if isinstance(given, int) else None, path, found.fingerprint, found.label_kind, found.recipe,
                   found.x_syn.shape[1:], str(about.get("source", "")), str(about.get("source_fingerprint", "")),
                   {"method": about.get("method")} | depends if isinstance(depends, dict) else {})


def _find(entry: SetSettings) -> list[str]:
    """The files that a path with * in its last two parts stands for."""
    path = paths.resolve(entry.path, name="sets.path")
    if "*" not in path:
        found = [path] if storage.exists(path) else []
    else:
        parent, _, name = path.rpartition("/")
        above, _, folder = parent.rpartition("/")
        folders = [storage.join(above, found) for found in storage.list_names(above) if fnmatch(found, folder)]
        found = [storage.join(place, file) for place in folders for file in storage.list_names(place) if fnmatch(file, name)]
    if not found:
        raise ConfigError(f"sets: method {entry.method!r}, path = {path!r}: no such file; `krrst distill` makes distilled sets")
    return found

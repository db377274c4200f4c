"""`krrst features`: what the explorer shows of a set in the target's feature space, computed on the cluster into a file beside the set.

A set's file says how it was made, so that its folder is all that is needed; what is prepared already is reused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import tyro

from krrst_dist import paths, storage
from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.config import Config, ConfigError, parse
from krrst_dist.data.cache import Cache
from krrst_dist.evaluation.feature_space import feature_map
from krrst_dist.evaluation.target_model import load_target
from krrst_dist.feature_map import FILE, FeatureMap
from krrst_dist.methods.common.source import Source
from krrst_dist.on_ray import assembly, cluster, errands, preflight, rooms, targets
from krrst_dist.on_ray.places import Places, prepared_source
from krrst_dist.on_ray.signs import Alive
from krrst_dist.on_ray.targets import Targets


def compute(config: Config, cache: Cache, beton: Path, found: Targets, sets: list[str], *, wait: bool) -> None:
    """The feature maps of distilled sets (paths or URIs) of one source, those that are there excepted."""
    open_ = [path for path in sets if not _is_there(path)]
    if not open_:
        return
    engine = config.engine
    rooms.require(engine.threads, engine.gpus, 1, wait)
    calls = {f"feature space of {path}": (config, cache, beton, found, path) for path in open_}
    for path, _ in zip(open_, errands.run(_compute, calls, cpus=engine.threads, gpus=engine.gpus), strict=True):
        print(f"feature space    {_map_of(path)}", flush=True)


def main(arguments: list[str]) -> int:
    """`krrst features PATH [--options]`."""
    return tyro.cli(features, args=arguments, prog="krrst features")


def features(path: Annotated[str, tyro.conf.Positional], data: str | None = None, cache: str | None = None, wait: bool = False) -> int:
    """Compute where distilled sets lie among real images in the target's feature space (t-SNE), and each image's nearest real one.

    Args:
        path: a distilled set, or the --out of a run or of a grid.
        data: folder with the data sets; default: $KRRST_DATA.
        cache: folder for prepared data and targets; default: `cache` beside the run's or the grid's folder.
        wait: wait for a cluster that is still growing, instead of refusing when resources are missing.
    """
    sets = _sets(where := paths.resolve(path, name="path"))
    if not sets:
        raise ConfigError(f"path = {path!r}: no distilled.safetensors is there; give one, or the --out of a run or of a grid")
    for name in sets:
        try:
            config = _config(name)
        except ConfigError as error:
            if len(sets) == 1:
                raise
            print(f"left out: {error}", flush=True)
            continue
        preflight.check_names(config)
        preflight.check_checkpoint(config)
        places = Places.of(_home(where), data=data, cache=cache)
        cluster.connect()
        prepared = prepared_source(config, places, wait=wait)
        compute(config, places.cache, prepared.path, targets.compute(config, prepared, places.cache, wait=wait), [name], wait=wait)
    return 0


def _compute(config: Config, cache: Cache, beton: Path, found: Targets, path: str, alive: Alive) -> None:
    """Compute one on whichever node this task runs on."""
    torch.set_num_threads(config.engine.threads)
    cache.fetch(*found.files)
    source = Source.of(config, cache.fetch_prepared(beton), found.file)
    device = assembly.device(config.engine)
    network = load_target(found.model, resolution=source.prepared.resolution).to(device)
    feature_map(DistilledSet.load(path), network, source.prepared, source.targets, source.training, seed=0, device=device,
                threads=config.engine.threads, say=lambda _: alive()).save(_map_of(path))


def _is_there(path: str) -> bool:
    try:
        return FeatureMap.load(_map_of(path)).set_fingerprint == DistilledSet.load(path).fingerprint
    except (FileNotFoundError, ArtifactError):
        return False


def _map_of(path: str) -> str:
    return storage.join(_parent(path), FILE)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _sets(path: str) -> list[str]:
    """The distilled sets at a path: itself, of a run, or of a grid."""
    if path.endswith(".safetensors"):
        return [path] if path.endswith("/distilled.safetensors") and storage.exists(path) else []
    made = storage.join(path, "sets")
    runs = [path, *(storage.join(made, name) for name in storage.list_names(made))]
    seeds = [storage.join(run, name) for run in runs for name in storage.list_names(run) if name.startswith("seed-")] or [path]
    return [name for seed in seeds if storage.exists(name := storage.join(seed, "distilled.safetensors"))]


def _home(path: str) -> str:
    """The --out that a set, a run or a grid belongs to."""
    path = path.rstrip("/").removesuffix("/distilled.safetensors")
    if path.rpartition("/")[2].startswith("seed-"):
        path = _parent(path)
    above = _parent(path)
    of_grid = above.endswith("/sets") and storage.exists(storage.join(_parent(above), "grid.yaml"))
    return _parent(above) if of_grid else path


def _config(path: str) -> Config:
    """The settings that a set says it was made with."""
    about = DistilledSet.load(path).metadata
    try:
        return parse(about["config"])
    except KeyError:
        raise ConfigError(f"{path}: the set does not say how it was distilled, so that its source and target are not known; only sets that "
                          f"`krrst distill` made have a feature map") from None
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{path}: the settings that the set says it was made with are not this version's: {error}") from None

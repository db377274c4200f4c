"""What a grid's FID cells are computed from: the network's files, and the source of every set.

Knows paths and data sets; the statistic is in `evaluation/fid.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from krrst_dist import paths, storage
from krrst_dist.config import ConfigError
from krrst_dist.data.prepared import Prepared
from krrst_dist.evaluation.target_model import load_target
from krrst_dist.grid_config import Grid
from krrst_dist.on_ray.grid_sets import GridSet
from krrst_dist.on_ray.places import Places, prepared_split

INCEPTION = "inception"


def located(grid: Grid) -> Grid:
    """The grid with absolute paths of its network: trials have working directories of their own."""
    settings = grid.fid
    network = settings.network if settings.network == INCEPTION else paths.resolve(settings.network, name="fid.network")
    weights = settings.weights and paths.resolve(settings.weights, name="fid.weights")
    return grid.model_copy(update={"fid": settings.model_copy(update={"network": network, "weights": weights})})


def files(grid: Grid) -> dict[str, str]:
    """What the network is, by its files' content. Raises ConfigError where they are not there, ArtifactError where they do not fit."""
    if "fid" not in grid.tasks:
        return {}
    network, weights = grid.fid.network, grid.fid.weights
    if weights and not storage.exists(weights):
        raise ConfigError(f"fid.weights = {weights!r}: no such file; give Inception's weights, or leave it out to have them downloaded")
    if network == INCEPTION:
        return {"network": network} | ({"weights": storage.digest(weights)} if weights else {})
    if not storage.exists(network):
        raise ConfigError(f"fid.network = {network!r}: no such file; give {INCEPTION}, or the path of a target that `krrst target` trained")
    load_target(network, resolution=grid.resolution)
    return {"network": storage.digest(network)}


def sources(grid: Grid, sets: Sequence[GridSet], places: Places, *, wait: bool) -> dict[str, Prepared]:
    """The source of every set, by the set's path; none where the grid has no FID."""
    if "fid" not in grid.tasks:
        return {}
    names = {found.path: source_of(grid, found) for found in sets if found.path}
    betons = {name: prepared_split(name, "train", places, wait=wait, resolution=grid.resolution, resize=grid.resize)
              for name in set(names.values())}
    return {path: betons[name] for path, name in names.items()}


def source_of(grid: Grid, found: GridSet) -> str:
    """Name of the data set that FID compares a set with. Raises ConfigError where the set does not say."""
    name = grid.fid.source or found.source
    if not name:
        raise ConfigError(f"fid.source = None: {found.path} does not say what it was made of; name its source data set")
    return name

"""From a grid's settings to the list of what has to be computed: networks to train once, and cells that use them.

Knows names, fingerprints and file names; computes nothing and asks nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from krrst_dist import networks, storage
from krrst_dist.config import ConfigError, NetworkSettings, PretrainSettings, Settings
from krrst_dist.data import sources
from krrst_dist.data.prepared import Prepared
from krrst_dist.grid_config import Grid
from krrst_dist.on_ray.grid_sets import GridSet, load_presets
from krrst_dist.on_ray.grid_work import Model, Planned, Target, digest
from krrst_dist.recipes import TeacherSettings, pretrain_recipe
from krrst_dist.results import Cell


def check_grid(grid: Grid) -> None:
    """Are all data sets, networks and presets known, and do they fit the resolution? Raises ConfigError."""
    for name in grid.targets:
        sources.spec(name)
        if name.startswith(sources.OWN):
            raise ConfigError(f"targets: {name!r} has no labelled test split; name a registered data set")
    with torch.device("meta"):
        for settings in (*grid.architectures, *([grid.kd.teacher.network] if "kd" in grid.tasks else [])):
            networks.build(settings.name, resolution=grid.resolution, **settings.options())
    for entry in grid.sets:
        for config in load_presets(entry, grid.gpus):
            check_resolution(grid, f"method {entry.method!r}, preset = {entry.preset!r}", config.source.resolution)
    if grid.tasks == ("fid",) and all(entry.make == "nothing" for entry in grid.sets):
        raise ConfigError("sets: make = nothing for all of them, so there are no images for task fid; add a distilled set")
    for changes in (*grid.pretrain.values(), *(entry.pretrain for entry in grid.sets)):
        pretrain_recipe({}, **changes)


def check_resolution(grid: Grid, what: str, resolution: int) -> None:
    """Raises ConfigError for a set of another resolution than the grid's."""
    if resolution != grid.resolution:
        raise ConfigError(f"sets: {what} is of {resolution} px, but resolution = {grid.resolution}: sets, targets and networks of a grid "
                          f"have one resolution; make a grid of its own for it")


def check_set(grid: Grid, found: GridSet) -> None:
    """Does a set's shape fit the targets and networks? Raises ConfigError."""
    if found.path is None:
        return
    channels, height, width = found.shape
    if channels != 3 or height != width:
        raise ConfigError(f"sets: {found.path} holds images of {channels} x {height} x {width}; targets and networks take 3 channels "
                          f"and square images")
    check_resolution(grid, found.path, height)


def plan(grid: Grid, sets: Sequence[GridSet], targets: Sequence[Target], sources: dict[str, Prepared], out: str, *,
         files: dict[str, str] | None = None) -> list[Planned]:
    """Every cell of the grid, each once, those that share a network beside each other.

    sources: data set by the set's path, for fid. files: hashes of what fid's network is read from. out: the grid's folder.
    Raises ConfigError where two methods have the same set, and so the same cells.
    """
    cells: dict[str, Planned] = {}
    for found in sets:
        for planned in _of_set(grid, found, targets, sources, out, files or {}):
            other = cells.setdefault(planned.cell.key, planned).cell.method
            if other != planned.cell.method:
                raise ConfigError(f"sets: methods {other!r} and {planned.cell.method!r} have the same set, {found.path}, and so the same "
                                  f"results; leave one of them out (the sets that were made are kept)")
    return list(cells.values())


def check_names_kept(cells: Sequence[Planned], stored: dict[str, str], uri: str) -> None:
    """Are the finished cells in the store under the grid's names of their methods? Raises ConfigError."""
    for planned in cells:
        name = stored.get(planned.cell.key, planned.cell.method)
        if name != planned.cell.method:
            raise ConfigError(f"sets: method {planned.cell.method!r} has results in {uri} under the name {name!r}; keep that name, give "
                              f"--recompute to compute them anew, or another --out")


def _of_set(grid: Grid, found: GridSet, targets: Sequence[Target], sources: dict[str, Prepared], out: str,
            files: dict[str, str]) -> Iterator[Planned]:
    about = {"method": found.entry.method, "source": found.source, "source_fingerprint": found.source_fingerprint,
             "set_fingerprint": found.fingerprint, "distillation_seed": found.seed, "distillation": found.distillation,
             "resolution": grid.resolution}
    if "fid" in grid.tasks and found.path in sources:
        settings, real = grid.fid, sources[found.path]
        cell = Cell(**about | {"source": found.source or real.name}, target=real.name, target_fingerprint=real.fingerprint, task="fid",
                    architecture=Path(settings.network).stem, evaluation_seed=0, hyperparameters={"task": files})
        yield Planned(cell, settings, set_path=found.path, source=real.path)
    recipe = _pretraining(grid, found)
    for network in grid.architectures:
        for seed in _evaluation_seeds(grid, found):
            encoder = _encoder(out, network, found, recipe, seed)
            for target in targets:
                for task in grid.tasks:
                    if task == "fid":
                        continue
                    settings = _task_settings(grid, task, target)
                    teacher = _teacher(out, grid.kd.teacher, target) if task == "kd" else None
                    for fraction in grid.fractions(task):
                        used = {"task": _dump(settings)} | ({"pretrain": _dump(recipe)} if recipe else {})
                        cell = Cell(**about, target=target.title, target_fingerprint=target.fingerprint, task=task,
                                    architecture=str(network), evaluation_seed=seed, label_fraction=fraction, hyperparameters=used)
                        yield Planned(cell, settings, encoder, teacher, found.path, target)


def _pretraining(grid: Grid, found: GridSet) -> PretrainSettings | None:
    """The recipe that a set carries, with the grid's and the entry's changes."""
    if found.recipe is None:
        return None
    return pretrain_recipe(found.recipe, **grid.pretrain.get(found.label_kind, {}) | found.entry.pretrain)


def _evaluation_seeds(grid: Grid, found: GridSet) -> tuple[int, ...]:
    if found.entry.paired and found.seed is not None:
        return (found.seed,)
    return found.entry.evaluation_seeds or grid.seeds


def _task_settings(grid: Grid, task: str, target: Target) -> Settings:
    settings = getattr(grid, task)
    return settings.for_target(target.name) if task == "finetune" else settings


def _encoder(out: str, network: NetworkSettings, found: GridSet, recipe: PretrainSettings | None, seed: int) -> Model:
    key = digest([found.fingerprint, _dump(network), _dump(recipe) if recipe else None, seed])
    title = f"pre-training: {found.entry.method}, {network}, seeds {found.seed}/{seed}"
    return Model(storage.join(out, "models", f"encoder-{key}.safetensors"), network, seed, recipe, found.path, title=title)


def _teacher(out: str, settings: TeacherSettings, target: Target) -> Model:
    settings = settings.model_copy(update={"training": settings.training.for_target(target.name)})
    key = digest([_dump(settings), target.fingerprint])
    return Model(storage.join(out, "models", f"teacher-{key}.safetensors"), settings.network, settings.seed, settings, target=target,
                 title=f"teacher: {settings.network}, {target.name}")


def _dump(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json")

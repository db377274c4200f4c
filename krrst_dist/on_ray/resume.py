"""May a run begin, or go on, in this folder? Asked before anything is computed, and again when all is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError
from krrst_dist.config import Config, ConfigError
from krrst_dist.on_ray.checkpoint import Checkpoint, Checkpoints, Facts, require_same

DATA = "data."


def checkpoints_of(config: Config, directory: str) -> Checkpoints:
    """The checkpoints of the run in a folder or URI."""
    return Checkpoints(storage.join(directory, "checkpoints"), keep=config.engine.keep)


def facts(config: Config, data: Mapping[str, str] | None, *, horizon: int | None = None) -> Facts:
    """What this run will have in common with its later parts. data: fingerprints of what the shards read, by name."""
    kind = None if config.engine.gpus else torch.backends.cpu.get_cpu_capability()
    trajectory = config.trajectory() | {f"{DATA}{key}": value for key, value in (data or {}).items()}
    return Facts(trajectory, horizon or config.distill.horizon, kind, torch.__version__)


def check_resume(config: Config, directory: str, *, resume: bool, data: Mapping[str, str] | None) -> Checkpoint | None:
    """The newest checkpoint to go on from, or None for a run that begins.

    data: as in `facts`; None: not known yet, so not compared.

    Raises ConfigError for an unfinished run that is there without --resume, or one that does not fit; ArtifactError when no
    checkpoint is readable.
    """
    last = newest(checkpoints_of(config, directory))
    if last is None:
        return None
    updates, before = config.distill.updates, last.facts
    if data is None:
        known = {key: value for key, value in before.trajectory.items() if not key.startswith(DATA)}
        before = replace(before, trajectory=known)
    require_same(before, facts(config, data), asked_decay=getattr(config.distill, "decay_updates", None), uri=directory)
    if not resume and last.step < updates:  # after the settings: --resume would be refused where they differ
        raise ConfigError(f"out = {directory}: holds an unfinished run ({last.step} of {updates} updates); pass --resume to go on with it, "
                          f"or another --out")
    if last.step > updates:
        raise ConfigError(f"distill.updates = {updates}: the run in {directory} has done {last.step} already; ask for at least as many, or "
                          f"start a new run with another --out")
    return last


def newest(checkpoints: Checkpoints) -> Checkpoint | None:
    """The newest checkpoint with a readable manifest. Raises ArtifactError when there are some, but none is readable."""
    names = checkpoints.whole()
    for name in names:
        try:
            return checkpoints.read(name)
        except ArtifactError:
            continue  # the restore will say so
    if names:
        raise nothing_readable(checkpoints, names)
    return None


def nothing_readable(checkpoints: Checkpoints, names: list[str]) -> ArtifactError:
    """The error for checkpoints that are all damaged."""
    return ArtifactError(f"all checkpoints in {checkpoints.uri} are damaged ({', '.join(names)}); start a new run with another --out")

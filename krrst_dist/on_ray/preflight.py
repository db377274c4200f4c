"""Everything that can be known to be wrong with a run before it begins: asked for first, because preparing takes hours.

Looks at names, files and the cluster; computes and writes nothing that stays.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from krrst_dist import networks, plugins, storage
from krrst_dist.config import Config, ConfigError
from krrst_dist.data import sources
from krrst_dist.data.prepare import prepared_fingerprint
from krrst_dist.data.prepared import held_out_split
from krrst_dist.data.readers import Images
from krrst_dist.evaluation.target_model import load_target
from krrst_dist.on_ray import rooms
from krrst_dist.on_ray.target_training import check_target, target_file

Split = tuple[str, Literal["train", "test"]]


def check_names(config: Config) -> None:
    """Are the data sets and networks known, and can the networks take the resolution? Raises ConfigError."""
    for name in (config.source.dataset, *config.evaluate.datasets):
        sources.spec(name)
    for name in config.evaluate.datasets:
        if name.startswith(sources.OWN):
            raise ConfigError(f"evaluate.datasets: {name!r} has no labelled test split; name a registered data set")
    with torch.device("meta"):
        for settings in (config.target.network, plugins.load(config.method).network(config)):
            networks.build(settings.name, resolution=config.source.resolution, **settings.options())


def check_checkpoint(config: Config) -> None:
    """Can an existing target model be read, and does it fit? Raises ConfigError, ArtifactError."""
    if config.target.checkpoint is None:
        return
    try:
        load_target(config.target, resolution=config.source.resolution)
    except FileNotFoundError:
        raise ConfigError(f"target.checkpoint = {config.target.checkpoint!r}: no such file; give the path or URI of a target's weights, or "
                          f"leave --target-checkpoint out to train one") from None


def check_images(config: Config, count: int, *, distils: bool, labels: np.ndarray | None = None) -> None:
    """Do the settings fit a source of `count` images? Raises ConfigError.

    distils: will the run go that far? labels: int64 [count] of a labelled source; None: not known, or none.
    """
    training, _ = held_out_split(count, config.source.held_out, config.source.split_seed)
    method = plugins.load(config.method)
    if needs_targets(config) or not distils:
        check_target(config, len(training))
    if distils:
        if config.distill.updates and not method.learns:
            raise ConfigError(f"distill.updates = {config.distill.updates}: {method.title} has no outer steps; leave it out")
        classes = None if labels is None else np.bincount(labels[training], minlength=labels.max() + 1).tolist()
        method.check(config, training=len(training), classes=classes)


def check_labels(config: Config, labelled: bool) -> None:
    """Has the source the labels that the method needs? Raises ConfigError."""
    if labelled or not plugins.load(config.method).needs_labels(config.distill):
        return
    others = []
    for name in plugins.names():
        method = plugins.load(name)
        if not method.needs_labels(method.settings()):
            others.append(name)
        elif "labels" in method.settings.model_fields and not method.needs_labels(method.settings(labels="targets")):
            others.append(f"{name} with distill.labels = targets")
    raise ConfigError(f"method = {config.method!r} goes by class labels, and {config.source.dataset} has none; methods that can do without "
                      f"them: {', '.join(others)}")


def needs_targets(config: Config) -> bool:
    """Does the method need a self-supervised target?"""
    return plugins.load(config.method).needs_targets(config.distill)


def check_room_for_target(config: Config, source: Images, directory: str, *, on_bad_image: str, wait: bool) -> None:
    """Has the cluster room for the workers that train the target, if it has to be trained? Raises ClusterError."""
    fingerprint = prepared_fingerprint(source, resolution=config.source.resolution, resize=config.source.resize, on_bad_image=on_bad_image)
    if config.target.checkpoint is None and config.target.steps and not storage.exists(target_file(config, fingerprint, directory)):
        rooms.require(config.engine.threads, 1 if config.engine.gpus else 0, config.target.workers, wait)

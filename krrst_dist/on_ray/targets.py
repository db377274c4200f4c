"""The target stage: a trained g_phi, and its representations of every image beside the beton."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from krrst_dist.config import Config
from krrst_dist.data.cache import Cache
from krrst_dist.data.normalise import normalise
from krrst_dist.data.prepared import TARGETS_OF, Prepared, held_out_split
from krrst_dist.data.targets import write_targets
from krrst_dist.evaluation.target_model import load_target, target_fingerprint
from krrst_dist.on_ray import assembly, errands, rooms
from krrst_dist.on_ray.signs import Alive
from krrst_dist.on_ray.target_training import train_target


@dataclass(frozen=True)
class Targets:
    """model: path or URI of the target model's file. file: its representations of the source, on this node's disk."""

    model: str
    file: Path

    @property
    def files(self) -> tuple[Path, Path]:
        """The representations and what they are of, for `Cache.fetch`."""
        return self.file, self.file.with_name(self.file.name + ".json")


def compute(config: Config, source: Prepared, cache: Cache, *, wait: bool) -> Targets:
    """Train the target model (or take what is there) and compute its representations of the source."""
    model = train_target(config, source, cache, wait=wait)
    fingerprint = target_fingerprint(load_target(model, resolution=source.resolution))
    standard = f"-standardised-{config.source.held_out}-{config.source.split_seed}" if config.target.standardise else ""
    views = f"{views_of(config)}-views" + (f"-{config.source.split_seed}" if views_of(config) else "")
    path = source.path.with_name(f"{source.path.stem}{TARGETS_OF}{fingerprint}-{views}{standard}.npy")
    found = Targets(model, path)
    if cache.holds(*found.files):
        print(f"target representations: already there, {path}", flush=True)
    else:
        engine, call = config.engine, (config, cache, source.path, model, fingerprint, path)
        rooms.require(engine.threads, engine.gpus, 1, wait)
        dict(errands.run(_represent, {"target representations": call}, cpus=engine.threads, gpus=engine.gpus))
    cache.fetch(*found.files)
    return found


def views_of(config: Config) -> int:
    """Stored views of each real image; only methods that augment them have some."""
    return getattr(config.distill, "views", 0)


def _represent(config: Config, cache: Cache, manifest: Path, model: str, fingerprint: str, path: Path, alive: Alive) -> None:
    """Compute the side file on whichever node this task runs on."""
    torch.set_num_threads(config.engine.threads)
    prepared = cache.fetch_prepared(manifest)
    device = assembly.device(config.engine)
    network = load_target(model, resolution=prepared.resolution).to(device, memory_format=torch.channels_last)

    def represent(images: Tensor) -> Tensor:
        alive()
        return network(normalise(images.to(device, memory_format=torch.channels_last), prepared.mean, prepared.std))

    training, _ = held_out_split(prepared.count, config.source.held_out, config.source.split_seed)
    write_targets(path, prepared, represent, target_fingerprint=fingerprint, views=views_of(config), view_seed=config.source.split_seed,
                  statistics_over=training if config.target.standardise else None, threads=config.engine.threads)
    cache.publish(path, path.with_name(path.name + ".json"))

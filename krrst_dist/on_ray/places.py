"""Where a grid's or a run's files are, and the prepared data sets that it reads: made once, found by all nodes.

Knows folders and URIs; not what is done with the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import ray

from krrst_dist import paths, storage
from krrst_dist.config import Config, ConfigError
from krrst_dist.data.cache import Cache
from krrst_dist.data.prepare import prepare
from krrst_dist.data.prepared import Prepared
from krrst_dist.on_ray.fan_out import write_parts


@dataclass(frozen=True)
class Places:
    """Where a run reads and writes."""

    data: Path
    out: str
    cache: Cache

    @classmethod
    def of(cls, where: str, *, data: str | None, cache: str | None) -> Places:
        """Defaults filled in, paths absolute; where: the output directory. A remote one also carries prepared files from node to node."""
        parent = where.rstrip("/").rpartition("/")[0]
        local = storage.local_path(where)
        if cache is not None and paths.is_uri(cache):
            raise ConfigError(f"--cache = {cache!r}: prepared files are mapped into memory, so this is a folder on this machine's disk; a "
                              f"storage URI is for --out")
        if cache is not None:
            folder = Path(paths.resolve(cache, name="--cache"))
        else:
            folder = local.parent / "cache" if local else Path("~/.cache/krrst_dist").expanduser()
        remote = None if local and "://" not in where else storage.join(parent, "cache")
        return cls(paths.data_directory(data), where, Cache(folder, remote))


def prepared_source(config: Config, places: Places, *, wait: bool = False) -> Prepared:
    """A run's source, prepared."""
    source = config.source
    return prepared_split(source.dataset, "train", places, wait=wait, resolution=source.resolution, resize=source.resize)


def prepared_split(name: str, split: Literal["train", "test"], places: Places, *, wait: bool = False, **how: Any) -> Prepared:
    """One split, prepared and put where the other nodes get it from; by all nodes, where this process is in a cluster.

    wait: for room on a cluster that grows. how: the settings of `prepare`.
    """
    writers = partial(write_parts, wait=wait) if ray.is_initialized() else None
    return prepare(name, split, root=places.data, directory=places.cache.local, remote=places.cache.remote, writers=writers, **how)

"""Prepared files on this node's disk, and where the other nodes get them from.

A beton is memory-mapped, so it must be on a local or mounted disk; a cluster's nodes need not share one. With a
`remote` place, a file is published there once it is whole, and a node that lacks it copies it. Without, the folder
is taken to be the same for all (one machine, or a shared file system).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krrst_dist import storage
from krrst_dist.data import integrity
from krrst_dist.data.errors import DataError
from krrst_dist.data.prepared import Prepared


@dataclass(frozen=True)
class Cache:
    """A folder on each node, and the URI behind it."""

    local: Path
    remote: str | None = None

    def publish(self, *paths: Path) -> None:
        """Make whole local files available to the other nodes; what is whole there already stays."""
        if self.remote is None:
            return
        for path in paths:
            uri = self._uri(path)
            if storage.size(uri) != path.stat().st_size:
                storage.copy(path, uri)

    def holds(self, *paths: Path) -> bool:
        """Are all the files on this node, or to be fetched?"""
        return all(path.exists() or (self.remote is not None and storage.exists(self._uri(path))) for path in paths)

    def fetch(self, *paths: Path) -> None:
        """Have the files on this node, copying those that are missing. A copy is compared with the checksum in its sidecar, which is to
        be among the files.

        Raises DataError when they are nowhere, or damaged.
        """
        copied = {}
        for path in paths:
            if path.exists():
                continue
            uri = self._uri(path) if self.remote else None
            if uri is None or not storage.exists(uri):
                elsewhere = f", nor at {uri}" if uri else ""
                raise DataError(f"{path}: not on this node{elsewhere}; give --cache a folder that all nodes share, or --out a storage URI, "
                                f"through which nodes pass prepared files on")
            storage.copy(uri, path)
            copied[path] = uri
        for path, uri in copied.items():
            try:
                integrity.require_recorded(path, remedy=f"it was copied from {uri}: delete that, and the file it was made from, and "
                                                        f"start again")
            except DataError:
                path.unlink(missing_ok=True)
                raise

    def fetch_prepared(self, manifest: Path) -> Prepared:
        """Have a prepared data set on this node and open it. Raises DataError as `fetch` and `Prepared.open` do."""
        self.fetch(manifest)
        self.fetch(*Prepared.load(manifest).files)
        return Prepared.open(manifest)

    def _uri(self, path: Path) -> str:
        return storage.join(self.remote, path.relative_to(self.local).as_posix())

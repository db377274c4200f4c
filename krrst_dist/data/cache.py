"""Prepared files on this node's disk, and where the other nodes get them from.

A beton is memory-mapped, so it must be on a local or mounted disk; a cluster's nodes need not share one. With a
`remote` place, a file is published there once it is whole, and a node that lacks it copies it, making room for it where it
must (`room.py`). Without, the folder is taken to be the same for all (one machine, or a shared file system).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from krrst_dist import storage
from krrst_dist.data import integrity, room
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import alone
from krrst_dist.data.prepared import Part, Prepared

_AT_ONCE = 4
"""files that are copied side by side: one stream of an object store does not fill a network"""


@dataclass(frozen=True)
class Cache:
    """A folder on each node, and the URI behind it."""

    local: Path
    remote: str | None = None

    def publish(self, *paths: Path, anew: bool = False) -> None:
        """Make whole local files available to the other nodes, in this order; what is whole there already stays, unless `anew`."""
        if self.remote is None:
            return
        for path in paths:
            uri = self.uri(path)
            if anew or storage.size(uri) != path.stat().st_size:
                storage.copy(path, uri)

    def holds(self, *paths: Path) -> bool:
        """Are all the files on this node, or to be fetched?"""
        return all(path.exists() or (self.remote is not None and storage.exists(self.uri(path))) for path in paths)

    def fetch(self, *paths: Path) -> None:
        """Have the files on this node, copying those that are missing. A copy is compared with the checksum in its sidecar, which is to
        be among the files.

        Raises DataError when they are nowhere, or damaged, or the disk is too full.
        """
        if self.remote is None or all(path.exists() for path in paths):
            self._require(path for path in paths if not path.exists())
        else:
            with self._alone():
                self._copy(paths)
        self._mark_used(paths[0])

    def describe(self, manifest: Path) -> Prepared:
        """A prepared data set of which every part is on this node, and whole, or can be fetched. Raises DataError."""
        if not manifest.exists() and self.remote is not None:
            self.fetch(manifest)
        prepared = Prepared.load(manifest)
        for path, part in prepared.files.items():
            self.require_part(path, part, prepared.resolution)
        return prepared

    def require_part(self, path: Path, part: Part, resolution: int) -> None:
        """Raise DataError unless a beton is on this node, and whole, or at the remote place."""
        if path.exists() or self.remote is None:
            part.check(path.parent, resolution)
        elif storage.size(self.uri(path)) != part.size:
            raise DataError(f"{path}: not on this node, nor whole at {self.uri(path)}; run `krrst prepare`")

    def fetch_prepared(self, manifest: Path) -> Prepared:
        """Have a prepared data set on this node, and open it. Of the processes of a node that want it, one copies what is missing.

        Raises DataError as `fetch` and `Prepared.open` do.
        """
        if self.remote is None:
            self._require([] if manifest.exists() else [manifest])
            return Prepared.open(manifest)
        with suppress(DataError):  # once it is in use, nobody makes room of it
            return self._open(manifest)
        with self._alone():
            self._copy([manifest])
            self._copy(files := Prepared.load(manifest).files, files)
            return self._open(manifest)

    def make_room(self, path: Path, size: int, *, doing: str = "fetching") -> None:
        """See to it that `size` bytes are free for `path` and what belongs to it. Raises DataError."""
        if not room.lacks(self.local, size):
            return
        if self.remote is None:
            room.require(self.local, size, doing=doing)
        else:
            with self._alone():
                room.make(self.local, size, self.uri, wanted=path.name, doing=doing)

    def uri(self, path: Path) -> str:
        """Where the other nodes get a file from."""
        return storage.join(self.remote, path.relative_to(self.local).as_posix())

    def _copy(self, paths: Iterable[Path], parts: dict[Path, Part] | None = None) -> None:
        """Copy the files that are missing. parts: what a manifest says of them; without, their sidecars are asked. Under `_alone`."""
        missing = [path for path in paths if not path.exists()]
        sizes = {path: storage.size(self.uri(path)) for path in missing}
        self._require(path for path, size in sizes.items() if size is None)
        if not missing:
            return
        storage.check_writable(self.local)
        if room.lacks(self.local, needed := sum(sizes.values())):
            room.make(self.local, needed, self.uri, wanted=missing[0].name)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda path: storage.copy(self.uri(path), path), missing))
        for path in missing:
            remedy = f"it was copied from {self.uri(path)}: delete that, and the file it was made from, and start again"
            try:
                if parts is None:
                    integrity.require_recorded(path, remedy=remedy)
                else:
                    integrity.require_whole(path, parts[path].checksum, remedy=remedy)
            except DataError:
                path.unlink(missing_ok=True)
                raise

    def _open(self, manifest: Path) -> Prepared:
        prepared = Prepared.open(manifest)
        self._mark_used(manifest)
        return prepared

    def _require(self, missing: Iterable[Path]) -> None:
        for path in missing:
            elsewhere = f", nor at {self.uri(path)}" if self.remote else ""
            raise DataError(f"{path}: not on this node{elsewhere}; give --cache a folder that all nodes share, or --out a storage URI, "
                            f"through which nodes pass prepared files on")

    def _mark_used(self, path: Path) -> None:
        if self.remote is not None:
            with suppress(OSError):
                room.used_mark(path).touch()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process of a node at a time copies into the folder and deletes from it. Not to be nested."""
        def tell(_: str) -> None:
            print(f"krrst: another process fetches files into {self.local}; waiting for it", file=sys.stderr, flush=True)

        with ExitStack() as stack:
            with suppress(OSError):  # nobody copies into, or deletes from, a folder that cannot be written
                self.local.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(self.local / "fetch", tell))
            yield

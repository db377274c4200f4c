"""Images in tar shards: pairs of members KEY.jpg (or another image) and KEY.cls (the class, a number in text), read in place.

Nothing is extracted, so that what a member is called leads nowhere: the shards' headers are read once for where the members begin,
and an image is read from there. Knows no folder layout (`layouts.py`).
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from krrst_dist.data.errors import BadImage, DataError
from krrst_dist.data.readers import UNLABELLED, Item, check_labels, decode, is_image, numbered_classes, printable, require_size

_CLASS_BYTES = 20  # that the number of a class may take


@dataclass
class _Shard:
    """The images of one file."""

    size: int
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # bytes; -1 where the member is no plain file
    sizes: list[int] = field(default_factory=list)  # bytes
    labels: list[int | None] = field(default_factory=list)


class TarImages:
    """Members of tar files that are not compressed, in their order. KEY is a member's name up to the first dot of its base name.

    The fingerprint covers each member's shard, name, size and label, not its pixels, as that of `FileImages`.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """paths: in the order of the images. Raises DataError for what is no such shard."""
        self._paths = list(paths)
        with ThreadPoolExecutor() as pool:
            shards = list(pool.map(_read_headers, self._paths))
        self._file_sizes = [shard.size for shard in shards]
        self._names = [name for shard in shards for name in shard.names]
        self._shards = np.repeat(np.arange(len(shards)), [len(shard.names) for shard in shards])  # int64 [n]
        self._offsets, self._sizes = (np.array([value for shard in shards for value in values(shard)], np.int64) for values in
                                      (lambda shard: shard.offsets, lambda shard: shard.sizes))  # [n]
        labels = [label for shard in shards for label in shard.labels]
        self.labelled = any(label is not None for label in labels)
        if self.labelled and None in labels:
            raise DataError(f"{self.where(labels.index(None))}: has no .cls beside it, though others have; complete the shard")
        self.labels = np.array(labels, np.int64) if self.labelled else np.full(len(labels), UNLABELLED)  # [n]
        self.class_names = numbered_classes(self) if self.labelled else ()
        check_labels(self)
        digest = hashlib.sha256()
        for shard, name, size, label in zip(self._shards.tolist(), self._names, self._sizes.tolist(), self.labels.tolist(), strict=True):
            digest.update(os.fsencode(f"{self._paths[shard].name}\0{name}") + f"\0{size}\0{label}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def where(self, i: int) -> str:
        return f"{self._paths[self._shards[i]]}, member {printable(self._names[i])}"

    def __getitem__(self, i: int) -> Item:
        where = self.where(i)
        if self._offsets[i] < 0:
            raise BadImage(where, "a link, device or sparse file, not a plain one")
        with open(self._paths[self._shards[i]], "rb") as file:
            payload = os.pread(file.fileno(), int(self._sizes[i]), int(self._offsets[i]))
        return Item(decode(io.BytesIO(payload), where), int(self.labels[i]), where)

    def some(self, first: int, stop: int) -> TarImages:
        part, of = copy.copy(self), slice(first, stop)
        part._names, part._shards, part.labels = self._names[of], self._shards[of], self.labels[of]
        part._offsets, part._sizes = self._offsets[of], self._sizes[of]
        return part

    def require_there(self) -> None:
        for shard in np.unique(self._shards):
            require_size(str(self._paths[shard]), self._file_sizes[shard])


def _read_headers(path: Path) -> _Shard:
    shard, classes, images = _Shard(path.stat().st_size), {}, {}  # the class, and the image, of each key
    try:
        with tarfile.open(path, "r:") as archive:
            end = 0
            for member in archive:
                name, end = member.name, archive.offset
                archive.members = []  # it would keep them all
                folder, _, base = name.rpartition("/")
                key = f"{folder}/{base.partition('.')[0]}"
                plain = member.isreg() and not member.issparse()
                if base.endswith(".cls") and plain:
                    classes[key] = _class(f"{path}, member {printable(name)}", archive.extractfile(member).read(_CLASS_BYTES + 1))
                elif is_image(base):
                    if key in images:
                        raise DataError(f"{path}, member {printable(name)}: {printable(images[key])} has the same name up to its ending, "
                                        f"which is the key of an image and its class; rename one of them")
                    images[key] = name
                    shard.names.append(name)
                    shard.offsets.append(member.offset_data if plain else -1)
                    shard.sizes.append(member.size)
            archive.fileobj.seek(end)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a header that is cut for the end
                raise DataError(f"{path}: cut short, it does not end as a tar does; get the file again")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read as a tar that is not compressed ({error}); get the file again, or unpack it") from error
    shard.labels = [classes.get(key) for key in images]
    return shard


def _class(where: str, payload: bytes) -> int:
    try:
        if len(payload) > _CLASS_BYTES:
            raise ValueError
        return int(payload)
    except ValueError:
        raise DataError(f"{where}: {payload[:_CLASS_BYTES]!r} is not the number of a class") from None

"""One part of a prepared split: some consecutive images decoded, resized, measured and written to a beton, once.

Images are decoded by several threads while the beton is written; sums over the pixels are whole numbers, so mean and std do
not depend on who summed what. The beton grows in a hidden work folder under a lock and is renamed when whole; a note beside
it, with all that the manifest will say of it, comes last. A killed run leaves nothing that counts, the next one sweeps it up,
and of two processes that want the same part one waits for the other. Knows nothing of the other parts.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import TypeAdapter

from krrst_dist import storage
from krrst_dist.data import integrity
from krrst_dist.data.beton import write_beton
from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import BadImage, DataError
from krrst_dist.data.images import resize, to_rgb
from krrst_dist.data.lock import alone
from krrst_dist.data.prepared import Part
from krrst_dist.data.readers import Images

_CHUNK = 16  # images a thread decodes at a time

log = logging.getLogger(__name__)

Watch = Callable[[int], None]
"""told how many images of a part are done"""


@dataclass(frozen=True)
class PartJob:
    """A part to be written, by whichever process and node."""

    cache: Cache
    name: str
    """of the beton"""
    images: Images
    first: int
    """place in the source of the first of `images`"""
    resolution: int
    resize: str
    encoding: Literal["raw", "jpeg"]
    skip: bool
    """bad images are left out; otherwise the first one is an error"""

    @property
    def path(self) -> Path:
        return self.cache.local / self.name

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    @property
    def bytes_needed(self) -> int:
        return len(self.images) * bytes_an_image(self.resolution, self.encoding)

    def finished(self, known: Part | None = None) -> Part | None:
        """What was written, where the beton is whole, here or at the cache's remote place; known: what a manifest says of it, where
        there is no note. A beton that is not as it was written does not count."""
        try:
            note = self._read_note()
            part = known if note is None else TypeAdapter(Part).validate_json(note)
            if part is None or (part.name, part.first, part.found) != (self.name, self.first, len(self.images)):
                return None
            if part.count:
                self.cache.require_part(self.path, part, self.resolution)
        except ValueError as error:
            log.info("%s is written anew: %s", self.path, error)
            return None
        return part

    def write(self, *, threads: int | None = None, watch: Watch = lambda done: None) -> Part:
        """Write the beton and its note and publish them, or find that it has been done. threads: that decode; default: one a CPU, up to 16.

        Raises DataError (damaged data; too little space), StorageError (the folder cannot be written).
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.path, log.info):
            part = self.finished()
            if part is None:
                self.note.unlink(missing_ok=True)
                self.cache.make_room(self.path, self.bytes_needed, doing="preparing")
                with _work_folder(self.path) as work:
                    decoded, bad = self._write(work / self.name, threads or min(16, os.cpu_count() or 1), watch)
                    if decoded is not None:
                        os.replace(work / self.name, self.path)
                part = self._describe(decoded, tuple(bad[i] for i in sorted(bad)))
                if part.count:
                    storage.write_whole(self.note, (json.dumps(asdict(part), indent=1) + "\n").encode())
                    self.cache.publish(self.path, self.note, anew=True)
        watch(len(self.images))
        return part

    def forget_note(self) -> None:
        """Once the manifest has all that is in it."""
        self.note.unlink(missing_ok=True)
        if self.cache.remote is not None:
            storage.delete(self.cache.uri(self.note))

    def _read_note(self) -> bytes | None:
        if self.note.exists():
            return self.note.read_bytes()
        if self.cache.remote is None:
            return None
        with suppress(FileNotFoundError):
            return storage.read_whole(self.cache.uri(self.note))

    def _describe(self, decoded: _Decoded | None, bad: tuple[str, ...]) -> Part:
        if decoded is None:
            return Part(self.name, self.first, 0, 0, integrity.named(0), (0, 0, 0), (0, 0, 0), bad)
        return Part(self.name, self.first, len(decoded), self.path.stat().st_size, integrity.seal(self.path),
                    tuple(decoded.total.tolist()), tuple(decoded.squares.tolist()), bad)

    def _write(self, file: Path, threads: int, watch: Watch) -> tuple[_Decoded | None, dict[int, str]]:
        """Write the beton, and a second time without the bad images if there were any: clean data is decoded once."""
        indices, bad = list(range(len(self.images))), {}
        while indices:
            with closing(_Decoded(self, indices, threads=threads, watch=watch)) as decoded:
                write_beton(file, decoded, resolution=self.resolution, encoding=self.encoding, indices=[self.first + i for i in indices],
                            progress=False)
            if not decoded.bad:
                return decoded, bad
            bad |= decoded.bad
            indices = [i for i in indices if i not in bad]
        return None, bad


class _Decoded:
    """The images as (uint8 [H, W, 3], label) items for the beton, to be asked for in order, and what was learnt on the way.

    Decodes ahead in threads, which `close` ends: left to the garbage collector, that may happen inside a thread that
    is just starting, and then nothing goes on. `bad` tells what is wrong with which image; the sums of the pixels are exact.
    """

    def __init__(self, job: PartJob, indices: Sequence[int], *, threads: int, watch: Watch) -> None:
        self._job, self._indices, self._threads, self._watch = job, indices, threads, watch
        self.total, self.squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self._items = self._in_order()
        self.bad: dict[int, str] = {}  # image -> what is wrong with it

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
        return next(self._items)

    def close(self) -> None:
        """End the decoding threads."""
        self._items.close()

    def _in_order(self) -> Iterator[tuple[np.ndarray, int]]:
        chunks, done = (self._indices[start:start + _CHUNK] for start in range(0, len(self), _CHUNK)), 0
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="decode")
        try:
            ahead = deque(pool.submit(self._decode, chunk) for chunk in islice(chunks, 2 * self._threads))
            while ahead:
                chunk, block, total, squares = ahead.popleft().result()
                ahead.extend(pool.submit(self._decode, later) for later in islice(chunks, 1))
                self.total += total
                self.squares += squares
                done += len(chunk)
                self._watch(done)
                for i, pixels in zip(chunk, block, strict=True):
                    yield pixels, int(self._job.images.labels[i])
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, chunk: Sequence[int]) -> tuple[Sequence[int], np.ndarray, np.ndarray, np.ndarray]:
        """The chunk, its pixels uint8 [chunk, H, W, 3], and their sums and sums of squares a channel."""
        block = np.zeros((len(chunk), self._job.resolution, self._job.resolution, 3), np.uint8)
        for place, i in enumerate(chunk):
            try:
                block[place] = self._pixels(i)
            except BadImage as error:
                if not self._job.skip:
                    raise DataError(f"{error}; replace it, or leave such images out with --on-bad-image skip") from error
                self.bad[i] = str(error)  # left black: this beton will be written again without it
        values = block.reshape(-1, 3).astype(np.int64)
        return chunk, block, values.sum(0), (values * values).sum(0)

    def _pixels(self, i: int) -> np.ndarray:
        item = self._job.images[i]
        try:
            return resize(to_rgb(item.image), self._job.resolution, self._job.resize)
        except (ValueError, OSError) as error:
            raise BadImage(item.where, str(error)) from error


def bytes_an_image(resolution: int, encoding: str) -> int:
    """About what an image takes in a beton (JPEG taken as a quarter of the raw pixels)."""
    return resolution * resolution * 3 // (1 if encoding == "raw" else 4)


@contextmanager
def _work_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path`, emptied of what a killed run left and removed at the end. A full disk, or something in the way, becomes
    a DataError."""
    work = path.with_name(f".{path.stem}.work")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        yield work
    except OSError as error:
        raise DataError(f"{path.parent}: cannot write {path.name} ({error.strerror}); check the free space and what is in the way, or "
                        f"choose another --cache") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)

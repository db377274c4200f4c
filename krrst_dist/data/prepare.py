"""From a data set as it is found to a beton with its sidecar: decode, resize, measure, write, once.

Images are decoded by several threads while the beton is written; sums over the pixels are whole numbers, so mean and std do
not depend on who summed what. The beton grows in a hidden work folder under a lock and is renamed when whole; the sidecar
comes last. A killed run leaves nothing that counts, the next one sweeps it up, and of two processes that want the same file
one waits for the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from krrst_dist import storage
from krrst_dist.config import ConfigError, nearest
from krrst_dist.data import integrity
from krrst_dist.data.beton import write_beton
from krrst_dist.data.errors import BadImage, DataError
from krrst_dist.data.images import RESIZE_MODES, to_rgb
from krrst_dist.data.images import resize as resize_image
from krrst_dist.data.lock import alone
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.readers import Images
from krrst_dist.data.sources import open_images, spec

RAW_UP_TO = 64
"""resolution up to which pixels are stored raw; beyond it as JPEG"""
_CHUNK = 16  # images a thread decodes at a time


def prepare(name: str, split: Literal["train", "test"], *, root: Path, directory: Path, resolution: int,
            resize: Literal["crop", "squash"] = "crop", on_bad_image: Literal["stop", "skip"] = "stop", images: Images | None = None,
            progress: bool = True) -> Prepared:
    """Prepare one split of a data set, or find that it has been done.

    Args:
        root: folder the data set is looked for in; see `sources`.
        directory: folder for the beton and its sidecar, on a local or mounted disk.
        resolution: pixels a side.
        on_bad_image: stop at the first image that cannot be decoded, or skip such images and list them in the sidecar.
        images: what `open_images` found of this split, where it has been asked already.
        progress: show it on stderr.

    Raises:
        ConfigError: unknown data set or setting.
        DataError: no, incomplete or damaged data; too little space.
        StorageError: `directory` cannot be written.
    """
    _check_choice("resize", resize, RESIZE_MODES)
    _check_choice("on_bad_image", on_bad_image, ("stop", "skip"))
    if resolution < 1:
        raise ConfigError(f"resolution = {resolution}: must be at least 1 pixel")
    official = spec(name).official_count(split)
    images = open_images(name, split, root) if images is None else images
    directory = Path(directory)
    encoding = "raw" if resolution <= RAW_UP_TO else "jpeg"
    fingerprint = prepared_fingerprint(images, resolution=resolution, resize=resize, on_bad_image=on_bad_image)
    stem = f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{split}-{resolution}-{resize}-{fingerprint[:12]}"
    path = directory / f"{stem}.beton"

    def tell(message: str) -> None:
        if progress:
            print(f"krrst: {message}", file=sys.stderr)

    def there() -> Prepared:
        prepared = Prepared.open(path)
        tell(f"{name} {split} at {resolution} px is prepared already: {path} ({prepared.count} images)")
        return prepared

    if path.with_suffix(".json").exists():  # it is whole where it is there: no lock is needed, nor a folder that can be written
        with suppress(DataError):
            return there()
    _check_writable(directory)
    with alone(path, tell):
        if path.with_suffix(".json").exists():
            try:
                return there()
            except DataError as error:
                tell(f"preparing anew, as what is there cannot be used: {error}")
        with _work_folder(path, bytes_needed=_bytes_needed(len(images), resolution, encoding)) as work:
            decoded, bad = _write(images, work / path.name, resolution=resolution, resize=resize, encoding=encoding,
                                  skip=on_bad_image == "skip", title=f"{name} {split}", progress=progress)
            mean, std = decoded.statistics()
            path.with_suffix(".json").unlink(missing_ok=True)
            os.replace(work / path.name, path)
        prepared = Prepared(
            path=path, count=len(decoded), size=path.stat().st_size, checksum=integrity.seal(path), resolution=resolution,
            resize=resize, encoding=encoding, mean=mean, std=std, class_names=images.class_names, labelled=images.labelled,
            name=name, split=split, found=len(images), official_count=official, fingerprint=fingerprint,
            bad_images=tuple(bad[i] for i in sorted(bad)))
        prepared.save()
    if bad:
        tell(f"skipped {len(bad)} bad images, listed in {prepared.sidecar}; the first: {prepared.bad_images[0]}")
    if official not in (None, len(images)):
        tell(f"note: {len(images)} of the {official} images of {name} {split}: a part of it")
    return prepared


def prepared_fingerprint(images: Images, *, resolution: int, resize: str, on_bad_image: str) -> str:
    """What `Prepared.fingerprint` will be: hash of the images, their labels and how they are prepared."""
    encoding = "raw" if resolution <= RAW_UP_TO else "jpeg"
    return hashlib.sha256(json.dumps([images.fingerprint, resolution, resize, encoding, on_bad_image]).encode()).hexdigest()[:32]


class _Decoded:
    """The images as (uint8 [H, W, 3], label) items for the beton, to be asked for in order, and what was learnt on the way.

    Decodes ahead in threads, which `close` ends: left to the garbage collector, that may happen inside a thread that
    is just starting, and then nothing goes on. `bad` tells what is wrong with which image; the sums of the pixels are exact.
    """

    def __init__(self, images: Images, indices: list[int], *, resolution: int, resize: str, skip: bool, bar: tqdm) -> None:
        self._images, self._indices = images, indices
        self._resolution, self._resize, self._skip, self._bar = resolution, resize, skip, bar
        self._total, self._squares = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self._items = self._in_order()
        self.bad: dict[int, str] = {}  # image -> what is wrong with it

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, k: int) -> tuple[np.ndarray, int]:
        return next(self._items)

    def close(self) -> None:
        """End the decoding threads."""
        self._items.close()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and population std of each channel in [0, 1], over all pixels of all images."""
        return _statistics(self._total, self._squares, len(self) * self._resolution**2)

    def _in_order(self) -> Iterator[tuple[np.ndarray, int]]:
        threads = min(16, os.cpu_count() or 1)
        chunks = (self._indices[start:start + _CHUNK] for start in range(0, len(self), _CHUNK))
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            ahead = deque(pool.submit(self._decode, chunk) for chunk in islice(chunks, 2 * threads))
            while ahead:
                chunk, block, total, squares = ahead.popleft().result()
                ahead.extend(pool.submit(self._decode, later) for later in islice(chunks, 1))
                self._total += total
                self._squares += squares
                self._bar.update(len(chunk))
                for i, pixels in zip(chunk, block, strict=True):
                    yield pixels, int(self._images.labels[i])
        finally:
            pool.shutdown(cancel_futures=True)

    def _decode(self, chunk: list[int]) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """The chunk, its pixels uint8 [chunk, H, W, 3], and their sums and sums of squares a channel."""
        block = np.zeros((len(chunk), self._resolution, self._resolution, 3), np.uint8)
        for place, i in enumerate(chunk):
            try:
                block[place] = self._pixels(i)
            except BadImage as error:
                if not self._skip:
                    raise DataError(f"{error}; replace it, or leave such images out with --on-bad-image skip") from error
                self.bad[i] = str(error)  # left black: this beton will be written again without it
        values = block.reshape(-1, 3).astype(np.int64)
        return chunk, block, values.sum(0), (values * values).sum(0)

    def _pixels(self, i: int) -> np.ndarray:
        item = self._images[i]
        try:
            return resize_image(to_rgb(item.image), self._resolution, self._resize)
        except (ValueError, OSError) as error:
            raise BadImage(item.where, str(error)) from error


def _write(images: Images, file: Path, *, resolution: int, resize: str, encoding: str, skip: bool, title: str, progress: bool
           ) -> tuple[_Decoded, dict[int, str]]:
    """Write the beton, and a second time without the bad images if there were any: clean data is decoded once."""
    indices, bad = list(range(len(images))), {}
    while indices:
        with tqdm(total=len(indices), unit=" images", desc=title, disable=not progress) as bar:
            with closing(_Decoded(images, indices, resolution=resolution, resize=resize, skip=skip, bar=bar)) as decoded:
                write_beton(file, decoded, resolution=resolution, encoding=encoding, progress=False)
        if not decoded.bad:
            return decoded, bad
        bad |= decoded.bad
        indices = [i for i in indices if i not in bad]
    raise DataError(f"{title}: none of the {len(images)} images can be decoded; the first: {bad[min(bad)]}")


def _statistics(total: np.ndarray, squares: np.ndarray, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population std in [0, 1] of `count` uint8 values a channel, from their sums and sums of squares (whole numbers, exact)."""
    sums = [(int(s), int(q)) for s, q in zip(total, squares, strict=True)]
    std = tuple((count * q - s * s) ** 0.5 / count / 255 for s, q in sums)
    if 0 in std:
        raise DataError(f"channel {std.index(0)} has the same value in every pixel of every image: there is nothing to learn from, "
                        f"and it cannot be normalised")
    return tuple(s / count / 255 for s, _ in sums), std


def _bytes_needed(count: int, resolution: int, encoding: str) -> int:
    """About the size of the beton (JPEG taken as a quarter of the raw pixels)."""
    return count * resolution * resolution * 3 // (1 if encoding == "raw" else 4)


@contextmanager
def _work_folder(path: Path, *, bytes_needed: int) -> Iterator[Path]:
    """A folder beside `path`, emptied of what a killed run left and removed at the end. A full disk, or something in the way, becomes
    a DataError."""
    work = path.with_name(f".{path.stem}.work")
    shutil.rmtree(work, ignore_errors=True)
    free = shutil.disk_usage(path.parent).free
    if free < bytes_needed:
        raise DataError(f"{path.parent}: {storage.in_words(free)} free, but preparing takes {storage.in_words(bytes_needed)}; free some, "
                        f"or choose another --cache")
    try:
        work.mkdir()
        yield work
    except OSError as error:
        raise DataError(f"{path.parent}: cannot write {path.name} ({error.strerror}); check the free space and what is in the way, or "
                        f"choose another --cache") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_writable(directory: Path) -> None:
    try:
        storage.check_writable(directory)
    except storage.StorageError as error:
        raise storage.StorageError(f"{error}, or choose another --cache") from error


def _check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting} = {value!r}: must be one of {', '.join(known)}; {nearest(value, list(known))}")

"""From a data set as it is found to betons with their manifest: cut into parts, write each once, add up, describe.

Where the parts begin follows from the number of images and the resolution alone. Whoever is at hand writes them: this process
one after the other, or a cluster (`Writers`). Finished parts are kept: a run that was killed, or whose beton was damaged since,
writes the others only. Of two processes that want the same split one waits for the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from krrst_dist import storage
from krrst_dist.config import ConfigError, nearest
from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import DataError
from krrst_dist.data.images import RESIZE_MODES
from krrst_dist.data.lock import alone
from krrst_dist.data.part import PartJob, Watch, bytes_an_image
from krrst_dist.data.prepared import Part, Prepared
from krrst_dist.data.readers import Images
from krrst_dist.data.sources import open_images, spec

RAW_UP_TO = 64
"""resolution up to which pixels are stored raw; beyond it as JPEG"""
PART_BYTES = 250_000_000
"""about the most that a part takes. A minute or two of one core's decoding, and seconds of a network's time, so that little is lost
with a task or a copy, and 63 parts for ImageNet at 64 px, so that a cluster has something to share out; CIFAR and digits are one part"""

Writers = Callable[[Sequence[PartJob], Watch], Iterable[Part]]
"""writes parts, in any order; told: how many images of theirs are done"""


def prepare(name: str, split: Literal["train", "test"], *, root: Path, directory: Path, resolution: int,
            resize: Literal["crop", "squash"] = "crop", on_bad_image: Literal["stop", "skip"] = "stop", images: Images | None = None,
            progress: bool = True, remote: str | None = None, writers: Writers | None = None) -> Prepared:
    """Prepare one split of a data set, or find that it has been done.

    Args:
        root: folder the data set is looked for in; see `sources`.
        directory: folder for the betons and their manifest, on a local or mounted disk.
        resolution: pixels a side.
        on_bad_image: stop at the first image that cannot be decoded, or skip such images and list them in the manifest.
        images: what `open_images` found of this split, where it has been asked already.
        progress: show it on stderr.
        remote: where parts and manifest are published, and taken from where they are there already; see `Cache`.
        writers: who writes the parts that are missing; default: this process.

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
    encoding = _encoding(resolution)
    fingerprint = prepared_fingerprint(images, resolution=resolution, resize=resize, on_bad_image=on_bad_image)
    stem = f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{split}-{resolution}-{resize}-{fingerprint[:12]}"
    cache = Cache(Path(directory), remote)
    path = cache.local / f"{stem}.json"

    def tell(message: str) -> None:
        if progress:
            print(f"krrst: {message}", file=sys.stderr)

    def there() -> Prepared:
        prepared = cache.describe(path)
        tell(f"{name} {split} at {resolution} px is prepared already: {path} ({prepared.count} images)")
        return prepared

    if cache.holds(path):  # it is whole where it is there: no lock is needed, nor a folder that can be written
        with suppress(DataError):
            return there()
    _check_writable(path.parent)
    with alone(path, tell):
        known = {}
        if cache.holds(path):
            try:
                return there()
            except DataError as error:
                tell(f"preparing anew, as what is there cannot be used: {error}")
            with suppress(DataError):
                known = {part.name: part for part in Prepared.load(path).parts}
        jobs = [PartJob(cache, file, images.some(first, stop), first, resolution, resize, encoding, on_bad_image == "skip")
                for file, first, stop in _cut(stem, len(images), resolution, encoding)]
        parts = _write_missing(jobs, known, writers or in_this_process, title=f"{name} {split}", progress=progress)
        mean, std = _statistics(parts, resolution)
        prepared = Prepared(
            path=path, resolution=resolution, resize=resize, encoding=encoding, mean=mean, std=std, class_names=images.class_names,
            labelled=images.labelled, name=name, split=split, official_count=official, fingerprint=fingerprint, parts=tuple(parts))
        prepared.save()
        cache.publish(*(file for file in prepared.files if file.exists()))
        cache.publish(path, anew=True)
        for job in jobs:
            job.forget_note()
    if prepared.bad_images:
        tell(f"skipped {len(prepared.bad_images)} bad images, listed in {path}; the first: {prepared.bad_images[0]}")
    if official not in (None, len(images)):
        tell(f"note: {len(images)} of the {official} images of {name} {split}: a part of it")
    return prepared


def prepared_fingerprint(images: Images, *, resolution: int, resize: str, on_bad_image: str) -> str:
    """What `Prepared.fingerprint` will be: hash of the images, their labels and how they are prepared."""
    how = [images.fingerprint, resolution, resize, _encoding(resolution), on_bad_image]
    return hashlib.sha256(json.dumps(how).encode()).hexdigest()[:32]


def in_this_process(jobs: Sequence[PartJob], watch: Watch) -> Iterator[Part]:
    """`Writers`: one part after the other, once there is known to be room for all."""
    jobs[0].cache.make_room(jobs[0].path, sum(job.bytes_needed for job in jobs), doing="preparing")
    before = 0
    for job in jobs:
        yield job.write(watch=lambda done, before=before: watch(before + done))
        before += len(job.images)


def _encoding(resolution: int) -> Literal["raw", "jpeg"]:
    return "raw" if resolution <= RAW_UP_TO else "jpeg"


def _cut(stem: str, count: int, resolution: int, encoding: str) -> list[tuple[str, int, int]]:
    """The parts of `count` images: each one's file, its first image, and the one after its last."""
    most = max(1, PART_BYTES // bytes_an_image(resolution, encoding))
    number = -(-count // most)
    files = [f"{stem}.beton"] if number == 1 else [f"{stem}-{i:05d}-of-{number:05d}.beton" for i in range(number)]
    return [(file, i * most, min((i + 1) * most, count)) for i, file in enumerate(files)]


def _write_missing(jobs: Sequence[PartJob], known: dict[str, Part], writers: Writers, *, title: str, progress: bool) -> list[Part]:
    """All parts, those written that are not finished."""
    found = {job.name: job.finished(known.get(job.name)) for job in jobs}
    missing = [job for job in jobs if found[job.name] is None]
    total, left = (sum(len(job.images) for job in some) for some in (jobs, missing))
    with tqdm(total=total, initial=total - left, unit=" images", desc=title, disable=not progress) as bar:

        def watch(written: int) -> None:
            bar.update(total - left + written - bar.n)

        for part in writers(missing, watch) if missing else ():
            found[part.name] = part
    if not any(part.count for part in found.values()):
        bad = [bad for part in found.values() for bad in part.bad_images]
        raise DataError(f"{title}: none of the {len(bad)} images can be decoded; the first: {bad[0]}")
    return [found[job.name] for job in jobs]


def _statistics(parts: Sequence[Part], resolution: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and population std of each channel in [0, 1], from the sums of all pixels (whole numbers, exact)."""
    count = sum(part.count for part in parts) * resolution**2
    totals, squares = ([sum(channel) for channel in zip(*sums, strict=True)] for sums in
                       ([part.total for part in parts], [part.squares for part in parts]))
    std = tuple((count * q - s * s) ** 0.5 / count / 255 for s, q in zip(totals, squares, strict=True))
    if 0 in std:
        raise DataError(f"channel {std.index(0)} has the same value in every pixel of every image: there is nothing to learn from, "
                        f"and it cannot be normalised")
    return tuple(s / count / 255 for s in totals), std


def _check_writable(directory: Path) -> None:
    try:
        storage.check_writable(directory)
    except storage.StorageError as error:
        raise storage.StorageError(f"{error}, or choose another --cache") from error


def _check_choice(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{setting} = {value!r}: must be one of {', '.join(known)}; {nearest(value, list(known))}")

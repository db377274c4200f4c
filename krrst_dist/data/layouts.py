"""How data sets lie on disk: one small class a layout, each saying where it looks and reading what it finds.

Adding a layout is adding a class with `places` and `read`; `sources.py` says which data set is kept in which. A layout
that is `official` holds a data set as its makers published it, so its counts can be insisted on; Parquet copies and
folders of class folders may be part of one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from krrst_dist import seeds
from krrst_dist.data.errors import DataError
from krrst_dist.data.readers import ArrayImages, FileImages, Images, ParquetImages, is_image
from krrst_dist.data.tar_images import TarImages

_TEST_NAMES = ("test", "val", "validation", "valid")


class Layout(Protocol):
    """`places`: the paths (or patterns) to look at, in order. `read`: the images there, or None where there is nothing."""

    official: bool

    def places(self, root: Path, name: str, split: str) -> list[Path]: ...

    def read(self, place: Path, split: str) -> Images | None: ...


@dataclass(frozen=True)
class Parquet:
    """`NAME-SPLIT*.parquet`, or `SPLIT*.parquet` in a folder NAME or NAME/data; one file, or shards `...-00000-of-00005...`.

    `test` lists what the test split may be called. A data set's `NAME-sample*.parquet`, where it is the only one,
    stands for both splits.
    """

    test: Sequence[str] = _TEST_NAMES
    official = False

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        splits = ("train",) if split == "train" else self.test
        return [place for s in splits for place in (root / f"{name}-{s}*.parquet", root / name / f"{s}*.parquet",
                                                    root / name / "data" / f"{s}*.parquet")] + [root / f"{name}-sample*.parquet"]

    def read(self, place: Path, split: str) -> Images | None:
        found = sorted(place.parent.glob(place.name))
        shards = [path for path in found if re.search(r"-\d+-of-\d+", path.name)]
        if len(found) > 1 and shards != found:
            raise DataError(f"{place}: {len(found)} files match ({', '.join(path.name for path in found)}) and it is not clear which "
                            f"is meant; leave one there, or shards named ...-00000-of-{len(found):05d}")
        if shards and len(shards) != int(re.search(r"-of-(\d+)", shards[0].name)[1]):
            raise DataError(f"{place}: {len(shards)} shards, though {shards[0].name} is one of more; complete the copy")
        return ParquetImages(found) if found else None


@dataclass(frozen=True)
class TarShards:
    """`NAME-SPLIT-000000.tar`, `...-000001.tar`, or `SPLIT-000000.tar`, ... in a folder NAME: pairs KEY.jpg and KEY.cls, not compressed.

    The training split may also be `NAME-000000.tar`, ..., without the word. `test` lists what the test split may be called.
    """

    test: Sequence[str] = _TEST_NAMES
    official = False

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        places = [place for s in (("train",) if split == "train" else self.test)
                  for place in (root / f"{name}-{s}-*.tar", root / name / f"{s}-*.tar")]
        return places + ([root / f"{name}-*.tar", root / name / f"{name}-*.tar"] if split == "train" else [])

    def read(self, place: Path, split: str) -> Images | None:
        number = re.compile(re.escape(place.name).replace(r"\*", r"(\d+)"))
        found = sorted((int(match[1]), path) for path in place.parent.glob(place.name) if (match := number.fullmatch(path.name)))
        for expected, (n, path) in enumerate(found):
            if n != expected:
                raise DataError(f"{path}: shard {n} where {expected} is expected; shards are numbered from 0, each once: complete the copy")
        return TarImages([path for _, path in found]) if found else None


@dataclass(frozen=True)
class ImageFolder:
    """`FOLDER/SPLIT/CLASS/*.jpg`: a folder a class, numbered in sorted order. FOLDER is the data set's name or one of `folders`."""

    folders: Sequence[str] = ()
    test: Sequence[str] = _TEST_NAMES
    official = False

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [root / folder / s for folder in (name, *self.folders) for s in (("train",) if split == "train" else self.test)]

    def read(self, place: Path, split: str) -> Images | None:
        return _class_folders(place) if place.is_dir() else None


@dataclass(frozen=True)
class OwnFolder:
    """A user's own images: like ImageFolder where there are folders of classes, otherwise all images below, without labels.

    The training split may also be the folder itself, without a folder `train` in it.
    """

    official = False

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [root / name / "train", root / name] if split == "train" else [root / name / s for s in _TEST_NAMES]

    def read(self, place: Path, split: str) -> Images | None:
        if not place.is_dir():
            return None
        if any(is_image(name) for name in os.listdir(place)):
            return FileImages(place, _image_files(place), None, ())
        return _class_folders(place)


@dataclass(frozen=True)
class Torchvision:
    """A data set in the layout that torchvision's class of that name reads (without downloading).

    `marker` is the file or folder by which it is recognised, in the data folder or in a folder NAME there; `train` and
    `test` are the arguments that choose the split, joined where there are several.
    """

    kind: str
    marker: str
    train: Sequence[dict[str, Any]] = ({"split": "train"},)
    test: Sequence[dict[str, Any]] = ({"split": "test"},)
    official = True

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [root / self.marker, root / name / self.marker]

    def read(self, place: Path, split: str) -> Images | None:
        if not place.exists():
            return None
        from krrst_dist.torchvision_ops import torchvision

        try:
            parts = [getattr(torchvision.datasets, self.kind)(place.parent, **arguments)
                     for arguments in (self.train if split == "train" else self.test)]
        except (RuntimeError, OSError, KeyError) as error:
            raise DataError(f"{place}: torchvision's {self.kind} refuses it ({error}); complete the copy") from error
        return _from_torchvision(parts, place.parent)


@dataclass(frozen=True)
class TinyImageNet:
    """`tiny-imagenet-200` as published: train/WNID/images, and val/images with val_annotations.txt as the test split."""

    official = True

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        listing = "wnids.txt" if split == "train" else "val/val_annotations.txt"
        return [root / folder / "tiny-imagenet-200" / listing for folder in ("", name)]

    def read(self, place: Path, split: str) -> Images | None:
        if not place.is_file():
            return None
        folder = place.parent if split == "train" else place.parents[1]
        classes = sorted(_lines(folder / "wnids.txt"))
        number = {wnid: c for c, wnid in enumerate(classes)}
        if split == "train":
            rows = [(file, wnid) for wnid in classes for file in _image_files(folder, f"train/{wnid}/images")]
        else:
            rows = [(f"val/images/{line.split()[0]}", line.split()[1]) for line in _lines(place)]
        return FileImages(folder, [file for file, _ in rows], [number[wnid] for _, wnid in rows], classes)


@dataclass(frozen=True)
class Cub:
    """`CUB_200_2011` as published, with its train_test_split.txt."""

    official = True

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [root / folder / "CUB_200_2011" / "train_test_split.txt" for folder in ("", name)]

    def read(self, place: Path, split: str) -> Images | None:
        if not place.is_file():
            return None
        files, labels, training, classes = (dict(line.split(maxsplit=1) for line in _lines(place.with_name(listing))) for listing in (
            "images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"))
        chosen = [i for i in files if training[i] == ("1" if split == "train" else "0")]
        return FileImages(place.with_name("images"), [files[i] for i in chosen], [int(labels[i]) - 1 for i in chosen],
                          tuple(classes.values()))


@dataclass(frozen=True)
class StanfordDogs:
    """Stanford Dogs as published: train_list.mat, test_list.mat and a folder Images."""

    official = True

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [root / folder / f"{split}_list.mat" for folder in (name, "stanford_dogs", "StanfordDogs")]

    def read(self, place: Path, split: str) -> Images | None:
        if not place.is_file():
            return None
        from scipy.io import loadmat

        lists = loadmat(place, squeeze_me=True)
        files, labels = [str(file) for file in lists["file_list"]], np.asarray(lists["labels"], np.int64) - 1
        classes = sorted(entry.name for entry in os.scandir(place.with_name("Images")) if entry.is_dir())
        return FileImages(place.with_name("Images"), files, labels, classes)


@dataclass(frozen=True)
class ScikitDigits:
    """Some of the 8x8 handwritten digits that ship inside scikit-learn; one in five of each is the test split, always the same ones."""

    digits: tuple[int, ...]
    official = True
    _folder: Path = field(default=Path("scikit-learn's load_digits"), init=False)

    def places(self, root: Path, name: str, split: str) -> list[Path]:
        return [self._folder]

    def read(self, place: Path, split: str) -> Images | None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        chosen = []
        for digit in self.digits:
            rows = seeds.numpy_rng(0, "digits split", digit).permutation(np.flatnonzero(bunch.target == digit))
            chosen.append(rows[len(rows) // 5:] if split == "train" else rows[:len(rows) // 5])
        rows = np.sort(np.concatenate(chosen))  # [n]
        pixels = np.round(bunch.images[rows] * (255 / 16)).astype(np.uint8)  # [n, 8, 8]
        return ArrayImages(str(place), pixels, bunch.target[rows] - self.digits[0], [str(digit) for digit in self.digits])


def _from_torchvision(parts: Sequence[Any], folder: Path) -> Images:
    """The files (or arrays) and labels that torchvision's data sets list, so that we decode and name images ourselves."""
    first = parts[0]
    names = [name if isinstance(name, str) else name[0] for name in getattr(first, "wnids", first.classes)]
    if hasattr(first, "data"):
        return ArrayImages(str(folder / first.base_folder), np.concatenate([part.data for part in parts]),
                           np.concatenate([part.targets for part in parts]), names)
    pairs = [pair for part in parts for pair in _listed(part)]
    return FileImages(folder, [os.path.relpath(file, folder) for file, _ in pairs], [label for _, label in pairs], names)


def _listed(dataset: Any) -> Iterable[tuple[str, int]]:
    """(file, label) of each image; torchvision's classes keep them under three different names."""
    if hasattr(dataset, "_image_files"):
        return zip(dataset._image_files, dataset._labels, strict=True)
    return dataset.samples if hasattr(dataset, "samples") else dataset._samples


def _class_folders(folder: Path) -> Images | None:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    rows = [(file, c) for c, name in enumerate(classes) for file in _image_files(folder, name)]
    return FileImages(folder, [file for file, _ in rows], [c for _, c in rows], classes) if rows else None


def _image_files(folder: Path, below: str = "") -> list[str]:
    """Every image under `folder/below`, sorted, relative to `folder`."""
    found = []
    for directory, _, names in os.walk(folder / below):
        found += [os.path.relpath(os.path.join(directory, name), folder) for name in names if is_image(name)]
    return sorted(found)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; complete the copy") from error

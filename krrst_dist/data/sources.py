"""The data sets that can be distilled from or transferred to, by name. Adding one is adding an entry to `_REGISTRY`.

A data set is looked for in the data folder in the order of its entry's layouts: as published (torchvision's own layout,
or the makers'), then Parquet, tar shards, then a folder of class folders. `folder:NAME` is a user's own folder of images, Parquet
files or tar shards, with or without labels. Knows names, counts and where to look; reading is `layouts.py`'s and `readers.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from krrst_dist.config import ConfigError, nearest
from krrst_dist.data.errors import DataError
from krrst_dist.data.layouts import (
    Cub,
    ImageFolder,
    Layout,
    OwnFolder,
    Parquet,
    ScikitDigits,
    StanfordDogs,
    TarShards,
    TinyImageNet,
    Torchvision,
)
from krrst_dist.data.readers import Images

OWN = "folder:"
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is read; None where nothing is (a user's own folder).

    `train` and `test` are the official numbers of images (train includes val where the makers have a train, val and test).
    `mean` and `std` are the published ones of the training pixels in [0, 1] at the default resolution.
    """

    layouts: tuple[Layout, ...]
    classes: int | None = None
    train: int | None = None
    test: int | None = None
    resolution: int = 64
    mean: Colour | None = None
    std: Colour | None = None

    def official_count(self, split: str) -> int | None:
        return self.train if split == "train" else self.test


_VAL = ("val", "validation", "valid")  # for data sets whose own test split has no labels
_TRAIN_FLAG = {"train": ({"train": True},), "test": ({"train": False},)}

_REGISTRY: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec(
        (Torchvision("CIFAR10", "cifar-10-batches-py", **_TRAIN_FLAG), Parquet(), TarShards(), ImageFolder()),
        10, 50_000, 10_000, 32, (.4914, .4822, .4465), (.2470, .2435, .2616)),
    "cifar100": DatasetSpec(
        (Torchvision("CIFAR100", "cifar-100-python", **_TRAIN_FLAG), Parquet(), TarShards(), ImageFolder()),
        100, 50_000, 10_000, 32, (.5071, .4866, .4409), (.2673, .2564, .2762)),
    "tinyimagenet": DatasetSpec(
        (TinyImageNet(), Parquet(_VAL), TarShards(_VAL), ImageFolder(("tiny-imagenet-200",), _VAL)),
        200, 100_000, 10_000, 64, (.4802, .4481, .3975), (.2770, .2691, .2821)),
    "imagenet": DatasetSpec(
        (Torchvision("ImageNet", "meta.bin", test=({"split": "val"},)), Parquet(_VAL), TarShards(_VAL), ImageFolder((), _VAL)),
        1000, 1_281_167, 50_000, 64, (.4810, .4574, .4078), (.2633, .2560, .2708)),
    "imagenette": DatasetSpec(
        (Torchvision("Imagenette", "imagenette2", test=({"split": "val"},)), Parquet(), TarShards(),
         ImageFolder(("imagenette2-320", "imagenette2-160"))),
        10, 9_469, 3_925, 224, (.4655, .4546, .4250), (.2804, .2754, .2965)),
    "aircraft": DatasetSpec(
        (Torchvision("FGVCAircraft", "fgvc-aircraft-2013b", train=({"split": "trainval"},)), Parquet(), TarShards(), ImageFolder()),
        100, 6_667, 3_333, 64, (.4797, .5108, .5341), (.2117, .2049, .2380)),
    "cars": DatasetSpec(
        (Torchvision("StanfordCars", "stanford_cars"), Parquet(), TarShards(), ImageFolder()),
        196, 8_144, 8_041, 64, (.4707, .4601, .4549), (.2836, .2826, .2914)),
    "cub2011": DatasetSpec(
        (Cub(), Parquet(), TarShards(), ImageFolder()),
        200, 5_994, 5_794, 64, (.4856, .4995, .4324), (.2218, .2170, .2564)),
    "dogs": DatasetSpec(
        (StanfordDogs(), Parquet(), TarShards(), ImageFolder()),
        120, 12_000, 8_580, 64, (.4765, .4517, .3911), (.2551, .2495, .2539)),
    "flowers": DatasetSpec(
        (Torchvision("Flowers102", "flowers-102", train=({"split": "train"}, {"split": "val"})), Parquet(), TarShards(), ImageFolder()),
        102, 2_040, 6_149, 64, (.4344, .3830, .2955), (.2878, .2390, .2674)),
    "digits-0-4": DatasetSpec((ScikitDigits((0, 1, 2, 3, 4)),), 5, 723, 178, 16),
    "digits-5-9": DatasetSpec((ScikitDigits((5, 6, 7, 8, 9)),), 5, 719, 177, 16),
}


def names() -> list[str]:
    """The registered data sets."""
    return list(_REGISTRY)


def spec(name: str) -> DatasetSpec:
    """What is known of a data set. Raises ConfigError for an unknown name, with the nearest known one."""
    if name.startswith(OWN) and len(name) > len(OWN):
        return DatasetSpec((Parquet(), TarShards(), OwnFolder()))
    if name not in _REGISTRY:
        raise ConfigError(f"dataset = {name!r}: no such data set; {nearest(name, names())} (folder:NAME takes a folder of your own)")
    return _REGISTRY[name]


def open_images(name: str, split: Literal["train", "test"], root: Path) -> Images:
    """Find one split of a data set under the data folder and read its list of images (not yet their pixels).

    Raises:
        ConfigError: unknown name or split.
        DataError: nothing found (with every place looked at), empty, incomplete or damaged.
    """
    entry = spec(name)
    if split not in ("train", "test"):
        raise ConfigError(f"split = {split!r}: must be train or test")
    looked = []
    for layout in entry.layouts:
        for place in layout.places(Path(root), name.removeprefix(OWN), split):
            images = layout.read(place, split)
            if images is not None:
                _check(name, split, entry, images, layout, place)
                return images
            looked.append(str(place))
    missing = "" if Path(root).is_dir() else f" (and there is no folder {root})"
    raise DataError(f"{name}, {split}: no images found{missing}; put them in one of these places or give another --data. Looked at:\n  "
                    + "\n  ".join(looked))


def _check(name: str, split: str, entry: DatasetSpec, images: Images, layout: Layout, place: Path) -> None:
    count, official = len(images), entry.official_count(split)
    if count == 0:
        raise DataError(f"{place}: holds no images; {name} needs at least one")
    if entry.classes is not None and images.labelled and len(images.class_names) != entry.classes:
        raise DataError(f"{place}: {len(images.class_names)} classes, but {name} has {entry.classes}; "
                        f"use folder:NAME for a data set of your own")
    if layout.official and count != official:
        raise DataError(f"{place}: {count} images in the {split} split, but {name} has {official}; "
                        f"the copy is not complete, or not the original")

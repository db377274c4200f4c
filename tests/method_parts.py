"""A small labelled source for tests of the compared methods, and settings that fit it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from betons import Items, prepared_beton, real_images

from krrst_dist.config import Config, parse
from krrst_dist.data.targets import write_targets
from krrst_dist.methods.common.source import Source

CLASSES, SIDE = 3, 8


def method_config(method: str, *, m: int = 7, seed: int = 0, **distill) -> Config:
    """Settings of a method for the small source."""
    return parse({"preset": "test", "method": method, "seed": seed,
                  "source": {"dataset": "cifar100", "resolution": SIDE, "held_out": 6},
                  "distill": {"m": m} | distill, "evaluate": {"pretrain": {"steps": 9, "batch": 5}}})


def small_source(data: Path, folder: Path) -> Source:
    """60 CIFAR-100 images, called three classes, with a side file of 12 numbers each."""
    images = real_images(data / "cifar100-test.parquet", 60, SIDE)
    prepared = replace(prepared_beton(folder / "images.beton", Items(images.pixels, np.arange(60) % CLASSES), "raw"),
                       class_names=("a", "b", "c"))
    prepared.save()
    write_targets(folder / "targets.npy", prepared, lambda images: images[:, :, ::4, ::4].float().flatten(1), target_fingerprint="pixels",
                  views=0, view_seed=0, statistics_over=None, progress=False)
    return Source.open(method_config("random"), prepared.path, folder / "targets.npy")

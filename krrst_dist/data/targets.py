"""Target representations g_phi(x), computed once and kept beside the beton: the teacher does not run while distilling.

Two files: `path`, a NumPy array float32 [n, 1 + views, k] that is mapped into memory (column 0 is the image as it
is), and `path`.json, which says of which prepared data and which target model it is, and what its checksum is. While it is
computed, the rows so far are in `path`.part and `path`.part.json, from which a killed run goes on; `path` itself appears when all is done.
Of two processes that want the same file one computes it and the other waits.
Knows nothing of networks (it is handed a function) or of the order in which images are read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from krrst_dist import storage
from krrst_dist.augment.views import crop_flip
from krrst_dist.data import integrity
from krrst_dist.data.errors import DataError
from krrst_dist.data.growing_array import GrowingArray
from krrst_dist.data.lock import alone, opened_in_use
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import Batch, check_indices, read_in_order

FORMAT = 1
Represent = Callable[[Tensor], Tensor]
"""uint8 [b, C, H, W] -> representations [b, k], on any device"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetFile:
    """The stored representations of every image of a prepared data set."""

    path: Path
    target: str
    """fingerprint of the target model"""
    array: np.ndarray  # float32 [n, 1 + views, k], mapped; column 0: the image as it is, column 1 + v: its view v
    views: int
    """crop-and-flip views stored of each image, beside the image as it is"""
    view_seed: int
    mean: np.ndarray | None  # float64 [k], of each dimension where targets are standardised
    std: np.ndarray | None  # float64 [k], 1 where a dimension does not vary

    @property
    def k(self) -> int:
        return self.array.shape[2]

    @classmethod
    def open(cls, path: Path, prepared: Prepared, target_fingerprint: str | None = None) -> TargetFile:
        """Map a target file, compared with its checksum once a node. It is in use as long as the object lives.

        Raises DataError when it is missing, truncated, damaged, or belongs to other data or another target model.
        """
        path = Path(path)
        about = _read_sidecar(path)
        _require_same(path, about, {"prepared": prepared.fingerprint, "target": target_fingerprint or about["target"], "format": FORMAT})
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path}: not there, or not finished; compute it with `krrst target`") from None
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: damaged or truncated ({error}); delete it and run `krrst target` again") from error
        expected = (prepared.count, 1 + about["views"], about["k"])
        if array.shape != expected or array.dtype != np.float32:
            raise DataError(f"{path}: holds {array.dtype} {list(array.shape)}, not float32 {list(expected)}; delete it and "
                            f"run `krrst target` again")
        integrity.require_whole(path, about["checksum"], remedy="delete it and run `krrst target` again")
        mean, std = (None if about[key] is None else np.array(about[key]) for key in ("mean", "std"))
        opened = cls(path=path, target=about["target"], array=array, views=about["views"], view_seed=about["view_seed"], mean=mean, std=std)
        weakref.finalize(opened, opened_in_use(path).close)
        return opened

    @property
    def fingerprint(self) -> str:
        """Of the target model and of how its output is scaled: runs on files with different ones are different runs."""
        scaled = None if self.mean is None or self.std is None else [self.mean.tolist(), self.std.tolist()]
        return hashlib.sha256(json.dumps([self.target, self.views, self.view_seed, scaled]).encode()).hexdigest()[:16]

    def look_up(self, index: np.ndarray, view: np.ndarray | None = None) -> Tensor:
        """Representations float32 [b, k] of images `index` [b] in their views [b] (None: as they are), standardised where the file says so.

        Raises ConfigError for an image that is not there.
        """
        check_indices(index, len(self.array))
        rows = self.array[index, 0 if view is None else 1 + view]  # [b, k], a copy
        if self.mean is not None and self.std is not None:
            rows = ((rows - self.mean) / self.std).astype(np.float32)
        return torch.from_numpy(np.asarray(rows))


def write_targets(path: Path, prepared: Prepared, represent: Represent, *, target_fingerprint: str, views: int, view_seed: int,
                  statistics_over: np.ndarray | None, batch: int = 256, threads: int = 1, progress: bool = True,
                  mark_every: float = 5.0) -> TargetFile:
    """Compute the representations of every image (and of `views` views of it), or find that it has been done, or go on where it stopped.

    Args:
        represent: the target model, with its own normalisation.
        statistics_over: int64 images over which mean and std of each dimension are taken; None: not standardised.
        batch: images handed to `represent` at once; threads: that decode them.
        mark_every: seconds of work that a killed run may lose.

    Raises:
        DataError: `path` holds other targets, `represent` gives something else than finite numbers [b, k], or the disk is full.
        StorageError: the folder cannot be written.
    """
    path = Path(path)
    over = None if statistics_over is None else _digest(statistics_over, prepared.count)
    identity = {"format": FORMAT, "prepared": prepared.fingerprint, "target": target_fingerprint, "views": views, "view_seed": view_seed,
                "statistics_over": over}
    if not path.exists():  # it is whole where it is there, and no lock is needed to read it
        storage.check_writable(path.parent)
        with alone(path, log.info):
            if not path.exists():
                _compute(path, prepared, represent, identity, statistics_over, batch=batch, threads=threads, progress=progress,
                         mark_every=mark_every)
                return TargetFile.open(path, prepared, target_fingerprint)
    _require_same(path, _read_sidecar(path), identity)
    log.info("%s: target representations are there already", path)
    return TargetFile.open(path, prepared, target_fingerprint)


def _compute(path: Path, prepared: Prepared, represent: Represent, identity: dict[str, Any], statistics_over: np.ndarray | None, *,
             batch: int, threads: int, progress: bool, mark_every: float) -> None:
    """Compute the file, or the rest of it, and write its sidecar."""
    part = GrowingArray(path.with_name(path.name + ".part"), identity | {"batch": batch}, length=prepared.count)
    if part.rows:
        log.info("%s: going on at image %d of %d", path, part.rows, prepared.count)
    with part, tqdm(total=prepared.count, initial=part.rows, desc=f"writing {path.name}", unit="image", disable=not progress) as bar:
        left = np.arange(part.rows, prepared.count)
        for images in read_in_order(prepared, left, batch=batch, threads=threads) if len(left) else ():
            part.append(_all_views(represent, images, identity["views"], identity["view_seed"]))  # [b, 1 + views, k]
            bar.update(len(images.index))
            if time.monotonic() - part.marked > mark_every:
                part.mark()
    array = np.load(part.file, mmap_mode="r", allow_pickle=False)  # [n, 1 + views, k]
    mean, std = (None, None) if statistics_over is None else _statistics(array, np.sort(statistics_over))
    about = identity | {"k": array.shape[2], "mean": mean, "std": std, "checksum": part.checksum}
    del array
    storage.write_whole(_sidecar(path), (json.dumps(about, indent=1) + "\n").encode())
    part.publish(path)


def _all_views(represent: Represent, batch: Batch, views: int, view_seed: int) -> np.ndarray:
    """Representations float32 [b, 1 + views, k] of each image as it is, and in each of its views."""
    index = torch.from_numpy(batch.index)
    seen = [batch.images] + [crop_flip(batch.images, index, torch.full_like(index, view), seed=view_seed) for view in range(views)]
    with torch.no_grad():
        rows = torch.stack([represent(images) for images in seen], dim=1).to("cpu", torch.float32).numpy()
    if rows.ndim != 3 or len(rows) != len(index):
        raise DataError(f"the target model gives {list(rows.shape)} for {len(index)} images, not one vector each; "
                        f"end it in a [b, k] output")
    finite = np.isfinite(rows).all(axis=(1, 2))
    if not finite.all():
        raise DataError(f"the target model gives NaN or infinity for image {batch.index[~finite][0]}; train it anew with a lower "
                        f"target.lr, or check the checkpoint")
    return rows


def _statistics(array: np.ndarray, over: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and std [k] of each dimension over images `over` and all their views, in float64; std 1 where nothing varies."""
    chunks = [over[start:start + 4096] for start in range(0, len(over), 4096)]
    seen = len(over) * array.shape[1]
    mean = sum(array[chunk].sum(axis=(0, 1), dtype=np.float64) for chunk in chunks) / seen  # [k]
    variance = sum(((array[chunk] - mean) ** 2).sum(axis=(0, 1)) for chunk in chunks) / seen  # [k]
    std = np.sqrt(variance)
    std[std <= 1e-6 * np.abs(mean)] = 1.0  # a dimension that is constant up to float32's rounding
    return mean.tolist(), std.tolist()


def _digest(indices: np.ndarray, count: int) -> str:
    """Hash of a set of images."""
    check_indices(indices, count)
    return hashlib.sha256(np.sort(indices).astype("<i8").tobytes()).hexdigest()[:16]


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_sidecar(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(_sidecar(path).read_text())
        missing = {"views", "view_seed", "k", "mean", "std", "checksum"} - about.keys()
        if missing:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return about
    except FileNotFoundError:
        what = f"{_sidecar(path)}, which says of what they are, is gone; delete it" if path.exists() else "they are not there"
        raise DataError(f"{path}: target representations cannot be used: {what}, and run `krrst target`") from None
    except (ValueError, AttributeError) as error:
        raise DataError(f"{_sidecar(path)}: does not describe target representations ({error}); delete both files and "
                        f"run `krrst target` again") from error


def _require_same(path: Path, about: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [f"{key} is {about.get(key)!r}, not {value!r}" for key, value in wanted.items() if about.get(key) != value]
    if differing:
        raise DataError(f"{path}: target representations of something else ({'; '.join(differing)}); give another path, or delete it and "
                        f"run `krrst target` again")

"""The distilled set: what a run leaves behind and a user takes home.

One safetensors file holds X_s and Y_s and, in its metadata, all that is needed to train on them: what the labels
are, the recipe, the space the images live in, class names, and where it all came from. NumPy only; the one-line
loader into torch is `krrst_dist.load`, other formats are in `exports.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from krrst_dist import storage

FORMAT = "krrst_dist distilled set, version 1"
LABEL_KINDS = ("features", "soft", "class", "none")
SPACES = ("normalised", "raw")


class ArtifactError(ValueError):
    """A file that is not what it should be, or arrays that do not fit together."""


@dataclass(frozen=True)
class Space:
    """Where images live: raw pixels in [0, 1], or (pixel - mean) / std with one mean and std a channel."""

    kind: Literal["normalised", "raw"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in SPACES:
            raise ArtifactError(f"the space is {self.kind!r}; it must be one of {', '.join(SPACES)}")
        if not all(isinstance(v, Real) and math.isfinite(v) for v in (*self.mean, *self.std)) or not all(v > 0 for v in self.std):
            raise ArtifactError(f"the space has mean {self.mean} and std {self.std}; they must be finite numbers, std above 0")

    def scale(self) -> np.ndarray:
        """Pixel units of one unit of this space, [C, 1, 1] float32."""
        std = self.std if self.kind == "normalised" else (1.0,) * len(self.std)
        return np.asarray(std, np.float32)[:, None, None]

    def offset(self) -> np.ndarray:
        """The pixel value of this space's zero, [C, 1, 1] float32."""
        mean = self.mean if self.kind == "normalised" else (0.0,) * len(self.mean)
        return np.asarray(mean, np.float32)[:, None, None]

    def to_pixels(self, x: np.ndarray) -> np.ndarray:
        """[..., C, H, W] in this space -> pixels, nominally in [0, 1] (not clipped)."""
        return x * self.scale() + self.offset()

    def from_pixels(self, x: np.ndarray) -> np.ndarray:
        """[..., C, H, W] pixels in [0, 1] -> this space."""
        return (x - self.offset()) / self.scale()


@dataclass(frozen=True)
class DistilledSet:
    """Synthetic images with their labels, if they have any.

    x_syn: [m, C, H, W] float32, in `space`. y_syn: [m, k] float32 for label_kind "features" (targets to regress) and
    "soft" (class scores), [m] int64 for "class", [m, 0] float32 for "none": such images are trained on by a self-supervised
    loss. recipe: the settings to pre-train with, overridable.
    """

    x_syn: np.ndarray
    y_syn: np.ndarray
    label_kind: Literal["features", "soft", "class", "none"]
    recipe: dict[str, Any]
    space: Space
    class_names: tuple[str, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x, y = self.x_syn, self.y_syn
        if self.label_kind not in LABEL_KINDS:
            raise ArtifactError(f"the label kind is {self.label_kind!r}; it must be one of {', '.join(LABEL_KINDS)}")
        names = self.class_names or ()
        if not (isinstance(self.recipe, dict) and isinstance(self.metadata, dict)):
            raise ArtifactError(f"the recipe is {self.recipe!r} and the metadata {self.metadata!r}; both must be dicts")
        if not (isinstance(names, tuple) and all(isinstance(name, str) for name in names)):
            raise ArtifactError(f"the class names are {names!r}; they must be a tuple of texts, or None")
        if x.ndim != 4 or x.dtype != np.float32 or 0 in x.shape[1:]:
            raise ArtifactError(f"x_syn has shape {x.shape} and type {x.dtype}; it must be [m, C, H, W] float32, with "
                                f"at least one of C, H and W")
        wanted = (1, np.int64) if self.label_kind == "class" else (2, np.float32)
        if (y.ndim, y.dtype) != wanted:
            raise ArtifactError(f"y_syn has shape {y.shape} and type {y.dtype}; label kind {self.label_kind!r} takes "
                                f"{wanted[0]} dimension(s) of {np.dtype(wanted[1])}")
        if y.ndim == 2 and (y.shape[1] == 0) != (self.label_kind == "none"):
            raise ArtifactError(f"y_syn has shape {y.shape}; label kind 'none' takes 0 columns, 'features' and 'soft' at least 1")
        if len(x) != len(y):
            raise ArtifactError(f"{len(x)} images but {len(y)} labels; there must be one each")
        if len(self.space.mean) != x.shape[1] or len(self.space.std) != x.shape[1]:
            raise ArtifactError(f"the space has {len(self.space.mean)} channels, the images {x.shape[1]}")
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise ArtifactError("x_syn or y_syn holds NaN or infinite values; take an earlier checkpoint")

    @property
    def fingerprint(self) -> str:
        """Hash of all that training on the set depends on: 16 hex digits."""
        digest = hashlib.sha256()
        for array in (self.x_syn, self.y_syn):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        classes = [len(self.class_names)] if self.label_kind == "class" and self.class_names else []  # the width of the head
        digest.update(json.dumps([self.label_kind, self.recipe, vars(self.space), *classes], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def save(self, uri: str | Path) -> None:
        """Write the set as one .safetensors file, whole or not at all."""
        about = {"format": FORMAT, "label_kind": self.label_kind, "recipe": self.recipe, "space": vars(self.space),
                 "class_names": self.class_names, "metadata": self.metadata}
        payload = safetensors.numpy.save(
            {"x_syn": np.ascontiguousarray(self.x_syn), "y_syn": np.ascontiguousarray(self.y_syn)},
            metadata={key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()})
        storage.write_whole(uri, payload)

    @classmethod
    def load(cls, uri: str | Path) -> DistilledSet:
        """Read a set. Raises FileNotFoundError, or ArtifactError for a truncated or foreign file."""
        tensors, about = read_safetensors(uri)
        if about.get("format") != FORMAT:
            raise ArtifactError(f"{uri} is not a distilled set of this package (format {about.get('format')!r}); "
                                f"the authors' x_syn.pt and y_syn.pt are read by `krrst import`")
        try:
            space, names = json.loads(about["space"]), json.loads(about["class_names"]) or None
            return cls(tensors["x_syn"], tensors["y_syn"], about["label_kind"], json.loads(about["recipe"]),
                       Space(space["kind"], tuple(space["mean"]), tuple(space["std"])),
                       tuple(names) if isinstance(names, list) else names, json.loads(about["metadata"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            wrong = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ArtifactError(f"{uri} is damaged or was changed by hand ({wrong}); restore it from its source or an earlier "
                                f"checkpoint") from None


HEADER = 10_000_000
"""the most bytes that the header of a .safetensors file may have: names and metadata"""


def read_safetensors(uri: str | Path, load: Callable[[bytes], dict[str, Any]] = safetensors.numpy.load
                     ) -> tuple[dict[str, Any], dict[str, str]]:
    """All tensors of a .safetensors file, as `load` makes them of its bytes, and its metadata.

    Raises ArtifactError when it is damaged, or when its header is longer than any of ours: then it is not read at all.
    """
    length = _header_length(uri)
    payload = storage.read_whole(uri)
    try:
        return load(payload), json.loads(payload[8:8 + length]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise _no_safetensors(uri, error) from None


def read_header(uri: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """What a .safetensors file says it holds, without reading that: each tensor's shape, and the metadata. Raises what
    `read_safetensors` raises."""
    start = storage.read_start(uri, 8 + _header_length(uri))
    try:
        header = json.loads(start[8:])
        about = header.pop("__metadata__", None) or {}
        return {name: tuple(map(int, tensor["shape"])) for name, tensor in header.items()}, {str(k): str(v) for k, v in about.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_safetensors(uri, error) from None


def _header_length(uri: str | Path) -> int:
    start = storage.read_start(uri, 8)
    if len(start) < 8:
        raise _no_safetensors(uri, f"{len(start)} bytes")
    length = int.from_bytes(start, "little")
    if length > HEADER:
        raise ArtifactError(f"{uri} begins with a header of {storage.in_words(length)}, as it says: it is no safetensors file, or one that "
                            f"was made to exhaust memory; do not use it")
    return length


def _no_safetensors(uri: str | Path, error: Exception | str) -> ArtifactError:
    return ArtifactError(f"{uri} is truncated or no safetensors file ({error}); restore it from its source or an earlier checkpoint")

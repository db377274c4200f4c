"""A distilled set in the target model's feature space, as a file beside it: where things lie, and what lies nearest.

Points in the plane (t-SNE, as in the paper's Figure 2) of real images' targets g(x), of the set's labels Y_s where they are such targets,
and of the features g(X_s) of its images; and for each synthetic image the real one whose target is nearest to its features.
NumPy only: whoever looks at it needs no network. `evaluation/feature_space.py` computes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError, read_safetensors

FILE = "features.safetensors"
"""its name, beside distilled.safetensors"""
FORMAT = "krrst_dist feature map, version 1"
KINDS = ("real", "labels", "images")
"""of points: targets of real images, Y_s, features of X_s"""


@dataclass(frozen=True)
class FeatureMap:
    """r real images are points, of m synthetic ones too; h x w: what real images are shown at.

    positions: [p, 2] float32. kinds: [p] uint8, places in KINDS. indices: [p] int64, which real image (of those here), row of Y_s or image.
    real_images: [r, h, w, 3] uint8. real_places: [r] int64, in the prepared source. real_labels: [r] int64, classes, -1 without.
    nearest_images: [m, h, w, 3] uint8. nearest_places: [m] int64. distances: [m] float32, Euclidean, in target units.
    set_fingerprint: of the set. target: fingerprint of the target model. source: name of the real images' data set.
    """

    positions: np.ndarray
    kinds: np.ndarray
    indices: np.ndarray
    real_images: np.ndarray
    real_places: np.ndarray
    real_labels: np.ndarray
    nearest_images: np.ndarray
    nearest_places: np.ndarray
    distances: np.ndarray
    set_fingerprint: str
    target: str
    source: str

    def __post_init__(self) -> None:
        points, real, m = len(self.positions), len(self.real_images), len(self.nearest_images)
        counts = {"positions": (self.positions, points, 2), "kinds": (self.kinds, points, 1), "indices": (self.indices, points, 1),
                  "real_images": (self.real_images, real, 4), "real_places": (self.real_places, real, 1),
                  "real_labels": (self.real_labels, real, 1), "nearest_images": (self.nearest_images, m, 4),
                  "nearest_places": (self.nearest_places, m, 1), "distances": (self.distances, m, 1)}
        wrong = [f"{name} {list(array.shape)}" for name, (array, length, dims) in counts.items()
                 if array.ndim != dims or len(array) != length or not array.size or array.dtype != _TYPES[name]]
        sides = self.positions.shape[1:] == (2,) and self.real_images.shape[1:] == self.nearest_images.shape[1:]
        if wrong or not sides or self.real_images.shape[-1] != 3:
            raise ArtifactError(f"arrays of a feature map are empty or do not fit together: {', '.join(wrong) or 'positions or images'}")
        most = np.array([real, m, m])
        if not (np.isfinite(self.positions).all() and np.isfinite(self.distances).all() and (self.kinds < len(KINDS)).all()
                and (self.indices >= 0).all() and (self.indices < most[self.kinds]).all()):
            raise ArtifactError("a feature map has points that are not finite, or of images that are not in it")

    def save(self, uri: str | Path) -> None:
        """Write it as one .safetensors file, whole or not at all."""
        about = {name: getattr(self, name) for name in ("set_fingerprint", "target", "source")}
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in _TYPES}
        storage.write_whole(uri, safetensors.numpy.save(tensors, metadata={"format": FORMAT, "about": json.dumps(about)}))

    @classmethod
    def load(cls, uri: str | Path) -> FeatureMap:
        """Read one. Raises FileNotFoundError, or ArtifactError for a truncated or foreign file."""
        tensors, metadata = read_safetensors(uri)
        try:
            if metadata.get("format") != FORMAT:
                raise ArtifactError(f"format {metadata.get('format')!r}")
            about = json.loads(metadata["about"])
            texts = {name: str(about[name]) for name in ("set_fingerprint", "target", "source")}
            return cls(**{name: tensors[name] for name in _TYPES}, **texts)
        except (ArtifactError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(f"{uri} is no feature map, or damaged ({error}); delete it and run `krrst features` again") from None


_TYPES = {"positions": np.float32, "kinds": np.uint8, "indices": np.int64, "real_images": np.uint8, "real_places": np.int64,
          "real_labels": np.int64, "nearest_images": np.uint8, "nearest_places": np.int64, "distances": np.float32}

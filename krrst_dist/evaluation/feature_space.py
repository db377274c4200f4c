"""A distilled set in the target model's feature space: t-SNE as in the paper's Figure 2, and each image's nearest real one.

Letters: m synthetic images, n real ones, r of them shown, k dimensions of the target g.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import read_all
from krrst_dist.data.targets import TargetFile
from krrst_dist.feature_map import KINDS, FeatureMap
from krrst_dist.seeds import numpy_rng

REAL = 2000
"""real images that are points"""
SHOWN = 64
"""pixels a side that real images are kept at, at most"""
COMPONENTS = 50
"""principal components that t-SNE is given"""
CHUNK = 16384


def feature_map(distilled: DistilledSet, network: nn.Module, prepared: Prepared, targets: TargetFile, training: np.ndarray, *, seed: int,
                device: torch.device, threads: int = 1, say: Callable[[str], None] = print) -> FeatureMap:
    """Where a set lies among the real images that it may be distilled from.

    network: g, normalised images [b, C, H, W] -> [b, k]. targets: g of every real image of `prepared`, as distillation uses them.
    training: [n] places of the real images. seed: of which are shown, and of t-SNE.
    """
    features = _features(distilled, network, prepared, targets, device)
    if not features.isfinite().all():
        raise ArtifactError("the target's features of the set's images are not finite: the images have left what it was trained on")
    say(f"nearest of {len(training)} real images to each of {len(features)}")
    nearest, distances = nearest_rows(features, lambda rows: targets.look_up(training[rows]), len(training), device)
    shown = np.sort(numpy_rng(seed, "feature map").permutation(training)[:REAL])
    parts = {"real": targets.look_up(shown).numpy(), "images": features.numpy()}
    if distilled.label_kind == "features" and distilled.y_syn.shape[1] == features.shape[1]:
        parts["labels"] = distilled.y_syn
    names = [name for name in KINDS if name in parts]
    say(f"t-SNE of {sum(map(len, parts.values()))} points")
    positions = plane(np.concatenate([parts[name] for name in names]), seed=seed, threads=threads)
    real_images, real_labels = _small(prepared, shown, threads)
    nearest_images, _ = _small(prepared, training[nearest], threads)
    return FeatureMap(
        positions, np.concatenate([np.full(len(parts[name]), KINDS.index(name), np.uint8) for name in names]),
        np.concatenate([np.arange(len(parts[name])) for name in names]), real_images, shown.astype(np.int64), real_labels, nearest_images,
        training[nearest].astype(np.int64), distances, set_fingerprint=distilled.fingerprint, target=targets.target, source=prepared.name)


def nearest_rows(features: Tensor, rows: Callable[[np.ndarray], Tensor], count: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """For each of `features` [m, k] the nearest of `count` rows, which are looked up in chunks: places int64 [m], distances float32 [m]."""
    best, place = torch.full((len(features),), torch.inf), torch.zeros(len(features), dtype=torch.int64)
    for start in range(0, count, CHUNK):
        there = rows(np.arange(start, min(start + CHUNK, count))).to(device)
        distance, at = (each.cpu() for each in torch.cdist(features.to(device), there, compute_mode="donot_use_mm_for_euclid_dist").min(1))
        closer = distance < best
        best[closer], place[closer] = distance[closer], at[closer] + start
    return place.numpy(), best.numpy()


def plane(points: np.ndarray, *, seed: int, threads: int) -> np.ndarray:
    """[p, k] -> [p, 2] float32, by t-SNE of the first principal components."""
    from sklearn.decomposition import PCA  # takes a second to import
    from sklearn.manifold import TSNE

    if len(points) < 4:  # nothing to arrange
        return np.stack([np.arange(len(points)), np.zeros(len(points))], 1).astype(np.float32)
    components = min(COMPONENTS, *points.shape)
    reduced = PCA(components, svd_solver="covariance_eigh" if points.shape[1] <= 1000 else "auto", random_state=seed).fit_transform(points)
    start, neighbours = "pca" if components > 1 else "random", min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(2, perplexity=neighbours, init=start, random_state=seed, n_jobs=threads)
    return tsne.fit_transform(reduced).astype(np.float32)


@torch.no_grad()
def _features(distilled: DistilledSet, network: nn.Module, prepared: Prepared, targets: TargetFile, device: torch.device) -> Tensor:
    """g(X_s) [m, k] float32 on the CPU, standardised as the targets are."""
    mean, std = (np.asarray(each, np.float32)[:, None, None] for each in (prepared.mean, prepared.std))
    x = torch.from_numpy((distilled.space.to_pixels(distilled.x_syn) - mean) / std)
    rows = torch.cat([network(part.to(device)).float().cpu() for part in x.split(256)]).double()
    if targets.mean is not None and targets.std is not None:
        rows = (rows - torch.from_numpy(targets.mean)) / torch.from_numpy(targets.std)
    return rows.float()


def _small(prepared: Prepared, places: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, 3], at most SHOWN pixels a side, and labels int64 [n]."""
    order = np.argsort(places, kind="stable")
    pixels, labels = read_all(prepared, places[order], threads=threads)
    back = np.argsort(order)
    images, labels = pixels.permute(0, 2, 3, 1).contiguous().numpy()[back], labels[back]
    if images.shape[1] > SHOWN:
        images = np.stack([np.asarray(Image.fromarray(each).resize((SHOWN, SHOWN), Image.Resampling.BOX)) for each in images])
    return images, labels

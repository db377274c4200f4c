"""FID: how far a distilled set's images are from the real ones it was made of, as a network sees them (Appendix F).

Two Gaussians are compared, fitted to the features of either set: |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)). The
statistic is torchmetrics', in float64; the network is the caller's, by default torch-fidelity's Inception v3, which
computes what the original TensorFlow one does. Knows pixels; not where the images come from, nor what they are for.

FID depends on the number of images: compare sets of one size only. Even real images score well above 0 when they are few.

Letters: m synthetic and n real images [C, H, W], d features, r dimensions of the space that the m features span.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from io import BytesIO

import numpy as np
import torch
from torch import Tensor, nn
from torch.hub import load_state_dict_from_url

import krrst_dist.torchvision_ops  # noqa: F401 (before the two below, which import torchvision)

# isort: split
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.config import ConfigError

CHUNK = 64
"""images that pass the network at once: Inception's first maps take 11 MB an image"""


def to_uint8(distilled: DistilledSet) -> Tensor:
    """The set's images as they would be shown: uint8 [m, C, H, W], clipped to black and white, rounded."""
    pixels = distilled.space.to_pixels(distilled.x_syn)
    return torch.from_numpy(np.rint(pixels.clip(0, 1) * 255).astype(np.uint8))


@torch.no_grad()
def fid(synthetic: Tensor, real_batches: Iterable[Tensor], *, network: nn.Module, device: torch.device | str = "cpu") -> float:
    """FID of the synthetic images [m, C, H, W] against all real images, which come as batches [b, C, H, W].

    network: images -> features [b, d]; it is moved to the device and put in eval mode. Both sets are of the type that it
    takes (uint8 for `inception`). How the batches are cut changes rounding only.

    Raises ValueError for fewer than 2 images of either kind, for images that are not alike, for features that are not
    finite or not [b, d].
    """
    if len(synthetic) < 2:
        raise ValueError(f"FID of {len(synthetic)} synthetic image(s): a covariance takes 2 at least; give a larger set")
    network = network.to(device).eval()
    f_syn = torch.cat([*_features(synthetic, network, device)])  # [m, d]
    centre, basis = _span(f_syn)  # [d], [d, r]

    # Outside the space that the synthetic features span, S S' is 0. Inside, torchmetrics' eigenvalues are all well above
    # rounding, the root of which would otherwise come d - r times. What lies outside is a plain distance and variance.
    given = nn.Identity()
    given.num_features = basis.shape[1]
    inside = FrechetInceptionDistance(feature=given, sync_on_compute=False).to(device)
    inside.update((f_syn - centre) @ basis, real=False)
    count, total, squares = 0, torch.zeros_like(centre), torch.zeros_like(centre)  # of the real features outside: [d] both
    for images in real_batches:
        _check_alike(synthetic, images)
        for features in _features(images, network, device):  # [b, d]
            centred = features - centre
            coordinates = centred @ basis  # [b, r]
            inside.update(coordinates, real=True)
            beyond = centred - coordinates @ basis.T
            count, total, squares = count + len(beyond), total + beyond.sum(0), squares + beyond.square().sum(0)
    if count < 2:
        raise ValueError(f"FID against {count} real image(s): a covariance takes 2 at least; give the whole source")
    mean = total / count
    outside = mean.square().sum() + (squares - count * mean.square()).sum() / (count - 1)
    return float(inside.cpu().compute()) + float(outside)


def inception(weights: str | None = None) -> nn.Module:
    """torch-fidelity's Inception v3: uint8 [b, 3, H, W] of any resolution -> the last pooled features [b, 2048].

    weights: file or URI of its weights; None downloads them once (95 MB, into torch's hub folder).
    Raises ConfigError when there are none, ArtifactError for a file that does not hold them.
    """
    state = _downloaded() if weights is None else _read(weights)
    payload = BytesIO()
    torch.save(state, payload)  # torch-fidelity unpickles what it is given: it gets bytes of tensors that were read safely
    payload.seek(0)
    try:
        return _Inception(payload)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ArtifactError(f"fid.weights = {weights!r}: the file does not hold Inception v3's weights "
                            f"({str(error).splitlines()[-1].strip()}); {_REMEDY}") from None


class _Inception(FeatureExtractorInceptionV3):
    """The network with its one output as a tensor."""

    def __init__(self, payload: BytesIO) -> None:
        super().__init__("inception-v3-compat", ["2048"], payload)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Inception takes uint8 images [b, 3, H, W], not {images.dtype} {tuple(images.shape)}; repeat gray images "
                             f"three times, or give another fid.network")
        return super().forward(images)[0]


_REMEDY = f"take the file from {URL_INCEPTION_V3} and name it in fid.weights"


def _downloaded() -> dict[str, Tensor]:
    try:
        with redirect_stdout(sys.stderr):
            return load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise ConfigError(f"fid.weights = None: Inception's weights could not be downloaded ({error}); on a machine with a network "
                          f"{_REMEDY}") from error
    except Exception as error:  # a damaged file in torch's hub folder can fail anywhere in its unpickler
        raise ArtifactError(f"fid.weights = None: what was downloaded from {URL_INCEPTION_V3} is damaged ({error}); delete it from "
                            f"{torch.hub.get_dir()}/checkpoints and try again") from error


def _read(weights: str) -> object:
    try:
        payload = storage.read_whole(weights)
    except (OSError, storage.StorageError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ConfigError(f"fid.weights = {weights!r}: {reason}; {_REMEDY}, or leave it out to have it downloaded") from error
    try:
        return torch.load(BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can fail anywhere in there
        raise ArtifactError(f"fid.weights = {weights!r}: no file of weights, or one that holds more than tensors "
                            f"({type(error).__name__}); {_REMEDY}") from error


def _features(images: Tensor, network: nn.Module, device: torch.device | str) -> Iterator[Tensor]:
    """Features in float64, [b, d] at a time."""
    for part in images.split(CHUNK):
        features = network(part.to(device))
        if features.ndim != 2 or len(features) != len(part):
            raise ValueError(f"the feature network made {tuple(features.shape)} of {len(part)} images; it must give [b, d]")
        if not torch.isfinite(features).all():
            raise ValueError("the feature network gives NaN or infinite values; check its weights and that it takes such images")
        yield features.double()


def _span(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] of features [m, d] and an orthonormal basis [d, r] of what they span around it; r = 1 where they are all alike."""
    centre = features.mean(0)
    _, sizes, directions = torch.linalg.svd(features - centre, full_matrices=False)  # [min(m, d)], [min(m, d), d]
    cutoff = sizes[0] * max(features.shape) * torch.finfo(features.dtype).eps
    return centre, directions[:max(1, int((sizes > cutoff).sum()))].T


def _check_alike(synthetic: Tensor, real: Tensor) -> None:
    if real.shape[1:] != synthetic.shape[1:] or real.dtype != synthetic.dtype:
        raise ValueError(f"synthetic images are {synthetic.dtype} {tuple(synthetic.shape[1:])} but real ones {real.dtype} "
                         f"{tuple(real.shape[1:])}: both must be alike; give the source at the set's resolution")

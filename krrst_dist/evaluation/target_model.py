"""The target model g_phi as a file: our own, or an existing checkpoint of somebody else's.

Our own is one .safetensors file that names its network in the metadata, so that a path is enough to load it. Others (the
authors' released .pt files, torchvision's layout) hold weights alone, and the settings say what network they are for. Nothing is
ever unpickled. Knows nothing of how a target is trained.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from krrst_dist import networks, storage
from krrst_dist.artifacts import ArtifactError, read_safetensors
from krrst_dist.config import ConfigError, NetworkSettings, TargetSettings
from krrst_dist.networks import Network
from krrst_dist.seeds import seeded

FORMAT = "krrst_dist target model, version 1"


def untrained(settings: TargetSettings, *, resolution: int) -> Network:
    """The network with its random start: a function of the network's settings and `settings.seed`."""
    with seeded(settings.seed, "target weights"):
        return _build(settings.network, resolution)


def load_target(source: str | Path | TargetSettings, *, resolution: int) -> Network:
    """g_phi in eval mode: normalised images [n, 3, resolution, resolution] -> [n, k], k = `feature_dim`.

    source: the path or URI of a file that `save_target` wrote, or settings with a `checkpoint` (.safetensors; .pt, read weights-only),
    or settings with steps = 0 (the untrained network). A classifier `fc` in the checkpoint is left out.

    Raises:
        FileNotFoundError: no such file.
        ArtifactError: the file is damaged, or its weights do not fit the network.
        ConfigError: the settings name neither, or leave open what the weights cannot tell (stem_padding).
    """
    if not isinstance(source, TargetSettings):
        return _load(source, None, resolution)
    if source.checkpoint is not None:
        return _load(source.checkpoint, source.network, resolution)
    if source.steps:
        raise ConfigError(f"target.checkpoint = None: a target of {source.steps} steps has to be trained first (`krrst target`); "
                          f"give its file, or steps = 0 for an untrained one")
    return untrained(source, resolution=resolution).eval()


def save_target(uri: str | Path, network: Network, settings: NetworkSettings, *, resolution: int, about: dict[str, Any]) -> None:
    """Write the weights whole, with a checksum; `about` (JSON values) says where they come from and is not needed to load them."""
    metadata = {"format": FORMAT, "network": settings.model_dump_json(), "resolution": str(resolution),
                "about": json.dumps(about, sort_keys=True)}
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    metadata["checksum"] = _checksum(tensors, metadata)
    storage.write_whole(uri, safetensors.torch.save(tensors, metadata))


def target_fingerprint(network: Network) -> str:
    """Hash of the architecture (as torch prints it: layers, strides, paddings) and of every weight: 16 hex digits."""
    digest = hashlib.sha256(str(network).encode())
    for key, value in network.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _checksum(weights: dict[str, Tensor], about: dict[str, str]) -> str:
    """Hash of all that a target file of ours is loaded from. It stays when torch prints networks differently."""
    digest = hashlib.sha256(f"{about['network']} {about['resolution']}".encode())
    for key, value in sorted(weights.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(uri: str | Path, asked: NetworkSettings | None, resolution: int) -> Network:
    weights, about = _read(uri)
    if about.get("format") == FORMAT:
        try:
            settings, made_for = NetworkSettings.model_validate_json(about["network"]), int(about["resolution"])
        except (ValueError, KeyError) as error:
            raise ArtifactError(f"{uri}: does not say what network it is for ({error}); it was changed by hand, train it again") from None
        if about.get("checksum") != _checksum(weights, about):
            what = "damaged: its weights are not those that were saved" if "checksum" in about else "has no checksum of its weights"
            raise ArtifactError(f"{uri}: {what}; restore it from its source, or delete it and train it again")
        network = _build(settings, resolution)
        if made_for != resolution:
            raise ArtifactError(f"{uri}: a target for {made_for} px, but {resolution} px was asked for; train one at this "
                                f"resolution")
        if asked is not None and str(_build(asked, resolution)) != str(network):
            raise ArtifactError(f"{uri}: a target of network {_shown(settings)}, but the settings ask for {_shown(asked)}; make "
                                f"target.network agree")
    elif asked is None:
        raise ArtifactError(f"{uri}: does not say what network it is for; give it as target.checkpoint together with target.network")
    else:
        settings, network = asked, _build(asked, resolution)
        stem = weights.get("conv1.weight")
        if settings.stem_padding is None and settings.name.startswith("resnet") and stem is not None and stem.shape[-1:] == (3,):
            raise ConfigError(f"target.network.stem_padding = None: weights fit paddings 1 and 2 alike, so {uri} cannot tell which it was "
                              f"trained with; give 2 for the authors' released checkpoints, 1 for a usual 3x3 stem")
    _fill(network, weights, f"{uri} does not fit network {_shown(settings)}")
    return network.eval()


def _read(uri: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by torchvision's names, without `fc`, and the file's metadata."""
    if str(uri).endswith(".safetensors"):
        found, about = read_safetensors(uri, safetensors.torch.load)
    else:
        payload, about = storage.read_whole(uri), {}
        try:
            found = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a foreign or hostile file
            first_line = str(error).strip().partition("\n")[0]
            raise ArtifactError(f"{uri}: no file of weights alone, or damaged ({type(error).__name__}: {first_line}); save the model's "
                                f"state_dict() with torch.save") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(key, str) and _is_plain(value) for key, value in found.items()):
        raise ArtifactError(f"{uri}: holds no state dict (names with dense tensors of real numbers); save the model's state_dict() with "
                            f"torch.save")
    weights = {key.removeprefix("module."): value.float() if value.is_floating_point() else value for key, value in found.items()}
    return {key: value for key, value in weights.items() if not key.startswith("fc.")}, about


def _is_plain(value: object) -> bool:
    """A dense tensor of real numbers?"""
    return isinstance(value, Tensor) and value.layout is torch.strided and not (value.is_complex() or value.is_quantized or value.is_meta)


def _fill(network: Network, weights: dict[str, Tensor], complaint: str) -> None:
    """Load weights whose names and shapes are all as they should be (batch counts, which nothing uses, may be missing)."""
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items()}
    missing = [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in wanted]
    different = [f"{key} {given[key]} instead of {wanted[key]}" for key in wanted if given.get(key, wanted[key]) != wanted[key]]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": different}
    wrong = [f"{len(names)} {kind}, e.g. {names[0]}" for kind, names in kinds.items() if names]
    if wrong:
        raise ArtifactError(f"{complaint}: weights {'; '.join(wrong)}. Set target.network to the network it was trained as (the authors' "
                            f"released checkpoints: resnet18 with stem_padding 2)")
    network.load_state_dict(weights, strict=False)


def _build(settings: NetworkSettings, resolution: int) -> Network:
    return networks.build(settings.name, resolution=resolution, **settings.options())


def _shown(settings: NetworkSettings) -> str:
    options = ", ".join(f"{key} {value}" for key, value in settings.options().items())
    return f"{settings.name} ({options})" if options else settings.name

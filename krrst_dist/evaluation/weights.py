"""Weights of a network that the settings describe, as one file: trained once, used by many.

The file holds tensors and a note of where they come from; who loads it knows which network they are for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError, read_safetensors

FORMAT = "krrst_dist weights, version 1"


def save_weights(uri: str | Path, module: nn.Module, *, about: dict[str, Any]) -> None:
    """Write the module's weights and buffers whole; `about` (JSON values) is for people."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    storage.write_whole(uri, safetensors.torch.save(tensors, {"format": FORMAT, "about": json.dumps(about, sort_keys=True)}))


def load_weights(uri: str | Path, module: nn.Module) -> None:
    """Fill a module. Raises FileNotFoundError; ArtifactError for a damaged file, or one of another network."""
    tensors, about = read_safetensors(uri, safetensors.torch.load)
    if about.get("format") != FORMAT:
        raise ArtifactError(f"{uri} does not hold weights of this package (format {about.get('format')!r}); delete it to train them anew")
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(f"{uri} holds the weights of another network ({str(error).splitlines()[-1].strip()}); delete it to train them "
                            f"anew") from None

"""Decoded pixels to the source's normalised space. Knows nothing of where either comes from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images / 255 - mean) / std by channel: uint8 [b, C, H, W] -> float32 [b, C, H, W] in the same memory format.

    mean, std: [C], of pixels in [0, 1].
    """
    centre, scale = (torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None] for values in (mean, std))  # [C, 1, 1]
    return images.to(torch.float32).div_(255).sub_(centre).div_(scale)

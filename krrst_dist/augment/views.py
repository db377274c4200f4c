"""View v of image i: a random crop and flip that can be made again at any time, in any batch, on any device.

The targets of views are computed once and stored; the same pixels must come out when they are used. So a view is a
pure function of (seed, i, v), by a counter-based hash, with no generator whose state could differ. Acts on decoded
pixels before normalisation, so that the border is black. Knows nothing of files, targets or epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1


def crop_flip(images: Tensor, index: Tensor, view: Tensor, *, seed: int, padding: int = 4) -> Tensor:
    """Each image, padded with `padding` zeros a side, cropped back to its size at a random place, mirrored half the time.

    The augmentation of the authors' real batches (REFERENCE 1.2). Every offset, of (2 padding + 1)^2, and both
    orientations are equally likely.

    Args:
        images: [b, C, H, W], any dtype.
        index: [b] int64, the images' places in the data set.
        view: [b] int64.
        seed: of all views of the data set.

    Returns:
        [b, C, H, W], dtype and device of `images`, in channels_last memory format.
    """
    b, _, height, width = images.shape
    top, left, flip = draw_views(index.to(images.device), view.to(images.device), seed=seed, padding=padding)  # [b] each
    across = torch.arange(width, device=images.device)
    rows = top[:, None] + torch.arange(height, device=images.device)  # [b, H]
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - across, across)  # [b, W]
    padded = torch.nn.functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # [b, H + 2p, W + 2p, C]
    image = torch.arange(b, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def draw_views(index: Tensor, view: Tensor, *, seed: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """(top, left, flip) of each view: offsets in 0..2 padding, int64 [b], and bool [b]."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=index.device)
    word = _mix(_mix(_mix(start) + index) + view)  # [b]
    places = 2 * padding + 1
    place = (word & (_WORD >> 2)) % places**2  # of 62 bits: even to 1 in 10^16
    return place // places, place % places, word < 0


def _mix(word: Tensor) -> Tensor:
    """One output of the generator SplitMix64 (Steele, Lea and Flood, 2014) for each state: int64 as 64-bit words."""
    word = word + _signed(0x9E3779B97F4A7C15)
    word = (word ^ _shifted(word, 30)) * _signed(0xBF58476D1CE4E5B9)
    word = (word ^ _shifted(word, 27)) * _signed(0x94D049BB133111EB)
    return word ^ _shifted(word, 31)


def _shifted(word: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros: torch's own fills with the sign."""
    return (word >> bits) & (_WORD >> bits)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return ((word & _WORD) ^ (1 << 63)) - (1 << 63)

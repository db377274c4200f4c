"""From any decoded image to uint8 RGB pixels of the wanted size: one rule for every data set.

Knows nothing of files, labels or tensors. EXIF orientation is not applied, as in torchvision's loaders.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

RESIZE_MODES = ("crop", "squash")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB. Transparent parts are laid on white; 16-bit gray keeps its upper eight bits, rounded.

    Raises:
        ValueError: a mode whose range of values is not known (floating point, 32 bit beyond 16).
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _sixteen_to_eight_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; store the image with 8 or 16 bits")
    if "A" in image.mode.upper().replace("LAB", "") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize(image: Image.Image, resolution: int, mode: str) -> np.ndarray:
    """uint8 [resolution, resolution, 3] of an RGB image (antialiased bicubic on uint8).

    `crop` brings the shorter side to `resolution` and cuts out the centre; `squash` brings both sides there, ignoring the
    aspect ratio. The rounding is that of torchvision's Resize and CenterCrop.
    """
    width, height = image.size
    if mode == "squash":
        width, height = resolution, resolution
    elif width <= height:
        width, height = resolution, int(resolution * height / width)
    else:
        width, height = int(resolution * width / height), resolution
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return np.asarray(image)[top:top + resolution, left:left + resolution]  # [H, W, 3]


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits (also held in 32, as some decoders do) to 8 bits; Pillow's own conversion would clip it at 255."""
    values = np.asarray(image).astype(np.int64)  # [H, W]
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"gray values from {values.min()} to {values.max()} do not fit 16 bits; store the image with 8 or 16 bits")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))

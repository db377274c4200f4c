"""Images as people see them: one PNG an image, or many in rows of one PNG, from which each can be cut again.

NumPy and Pillow only; knows a set's space, and no method.

Letters: m images [C, H, W].
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from krrst_dist.artifacts import ArtifactError, Space

LAYOUT = "krrst images"
"""name of the text in a sheet's PNG that says how it is cut: images, height, width, columns"""
LARGEST = 60_000_000
"""pixels of a sheet: 1,000 images of 224 x 224 and some; larger ones are not read"""


def to_pixels(x: np.ndarray, space: Space) -> np.ndarray:
    """[m, C, H, W] in `space` -> what is shown of it, clipped: uint8 [m, H, W, 3], or [m, H, W, 1] for fewer than three channels."""
    shown = 3 if x.shape[1] >= 3 else 1
    return np.round(np.clip(space.to_pixels(x)[:, :shown], 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def to_png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, C], C 1 or 3 -> PNG."""
    return _encoded(picture, None)


def sheet(pictures: np.ndarray, *, columns: int, zoom: int = 1, gap: int = 0) -> bytes:
    """uint8 [m, H, W, C] in rows, as one PNG. zoom: pixels for one; gap: white pixels around each. Without both, `cut` takes it apart.

    Raises ArtifactError where there are no images.
    """
    m, height, width, channels = pictures.shape
    if not pictures.size:
        raise ArtifactError("there are no images to show")
    columns = min(columns, m)
    shown = pictures.repeat(zoom, 1).repeat(zoom, 2)
    down, across = height * zoom + gap, width * zoom + gap
    page = np.full((-(-m // columns) * down + gap, columns * across + gap, channels), 255, np.uint8)
    for i, picture in enumerate(shown):
        top, left = gap + i // columns * down, gap + i % columns * across
        page[top:top + height * zoom, left:left + width * zoom] = picture
    return _encoded(page, None if gap or zoom != 1 else f"{m} {height} {width} {columns}")


def fitting(height: int, width: int) -> int:
    """How many images of that size a sheet can hold that is read again."""
    return max(1, LARGEST // (height * width) // 20 * 20)


def cut(payload: bytes) -> np.ndarray:
    """The images of a sheet without gaps, uint8 [m, H, W, C]. Raises ArtifactError for any other file, and for one of unusual size."""
    try:
        with Image.open(io.BytesIO(payload), formats=["PNG"]) as opened:
            across, down = opened.size
            if down * across > LARGEST:  # before anything of it is decoded
                raise ValueError(f"it has {down} x {across} pixels")
            m, height, width, columns = map(int, opened.text[LAYOUT].split())
            rows = -(-m // columns)
            if min(m, height, width, columns) < 1 or (down, across) != (rows * height, columns * width):
                raise ValueError(f"it says {m} images of {height} x {width} in {columns} columns and has {down} x {across} pixels")
            if opened.mode not in ("L", "RGB"):
                raise ValueError(f"its pixels are of the kind {opened.mode}")
            page = np.asarray(opened)
        tiles = page.reshape(rows, height, columns, width, -1).swapaxes(1, 2)  # [rows, columns, H, W, C]
        return tiles.reshape(rows * columns, height, width, -1)[:m]
    except Exception as error:  # Pillow raises many kinds for a damaged or hostile file
        said = "it is no PNG" if isinstance(error, UnidentifiedImageError) else error
        raise ArtifactError(f"no sheet of images, or a damaged one ({said})") from None


def _encoded(picture: np.ndarray, layout: str | None) -> bytes:
    info = PngImagePlugin.PngInfo()
    if layout:
        info.add_text(LAYOUT, layout)
    sink = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(sink, "PNG", pnginfo=info)
    return sink.getvalue()

"""The pictures of a run, read back from the PNG."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from krrst_dist.artifacts import Space
from krrst_dist.evaluation.figures import GAP, LABELS, Curve, curve_png, images_png
from krrst_dist.storage import StorageError

SPACE = Space("normalised", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def digits():
    """[60, 3, 8, 8] float32 pixels in [0, 1]."""
    return (load_digits().images[:60, None].repeat(3, axis=1) / 16).astype(np.float32)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def tile(picture: np.ndarray, row: int, column: int, res: int = 8) -> np.ndarray:
    """The image at a place of the before/after picture, as uint8 [res, res, 3]: rows 0, 2, .. start, 1, 3, .. distilled."""
    zoom = 96 // res
    side = res * zoom + 4
    top = GAP * (row // 2 + 1) + row * side + 2
    left = LABELS + column * side + 2
    return picture[top:top + res * zoom, left:left + res * zoom][zoom // 2::zoom, zoom // 2::zoom]


def shown(pixels: np.ndarray) -> np.ndarray:
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def test_the_picture_shows_each_image_as_pixels_above_what_became_of_it(digits, tmp_path):
    after = 1 - digits
    images_png(SPACE.from_pixels(digits[:13]), SPACE.from_pixels(after[:13]), SPACE, tmp_path / "images.png")
    picture = read(tmp_path / "images.png")
    for i in (0, 9, 10, 12):
        row, column = 2 * (i // 10), i % 10
        assert abs(tile(picture, row, column).astype(int) - shown(digits[i])).max() <= 1
        assert abs(tile(picture, row + 1, column).astype(int) - shown(after[i])).max() <= 1
    assert (tile(picture, 2, 3) == 255).all(), "white where there is no image"


def test_values_beyond_black_and_white_are_clipped(digits, tmp_path):
    images_png(SPACE.from_pixels(digits[:1]), SPACE.from_pixels(digits[:1] * 4 - 1.5), SPACE, tmp_path / "images.png")
    assert abs(tile(read(tmp_path / "images.png"), 1, 0).astype(int) - shown(digits[0] * 4 - 1.5)).max() <= 1


def test_raw_space_and_one_channel_are_drawn_as_they_are(digits, tmp_path):
    gray = digits[:2, :1]
    images_png(gray, gray, Space("raw", (0.5,), (0.2,)), tmp_path / "images.png")
    assert abs(tile(read(tmp_path / "images.png"), 0, 1).astype(int) - shown(digits[1])).max() <= 1


def test_at_most_the_limit_is_drawn(digits, tmp_path):
    for limit in (20, 50):
        images_png(digits, digits, SPACE, tmp_path / f"{limit}.png", limit=limit)
    heights = [read(tmp_path / f"{limit}.png").shape[0] for limit in (20, 50)]
    assert heights[1] / heights[0] == 5 / 2


def curve(seed: int, held_out: list[float]) -> Curve:
    steps = range(0, 10 * len(held_out), 10)
    return Curve(seed, outer=[(i, 0.5 + 0.1 * (i % 3)) for i in range(40)], held_out=list(zip(steps, held_out, strict=True)))


def blue(picture: np.ndarray) -> np.ndarray:
    """Rows and columns of the first run's full colour (C0)."""
    return np.argwhere(np.abs(picture.astype(int) - (0x1F, 0x77, 0xB4)).max(-1) < 8)


def test_a_falling_held_out_loss_is_drawn_falling(tmp_path):
    curve_png([curve(0, [0.9, 0.7, 0.5, 0.4])], tmp_path / "curve.png")
    rows, columns = blue(read(tmp_path / "curve.png")).T
    middle = columns[rows > rows.min() + 5]  # below the dashed line of the control
    left, right = np.quantile(middle, 0.2), np.quantile(middle, 0.8)
    below = rows > rows.min() + 5
    assert rows[below & (columns < left)].mean() + 30 < rows[below & (columns > right)].mean()


def test_each_seed_has_a_colour_and_a_run_without_outer_losses_is_drawn_too(tmp_path):
    runs = [curve(0, [0.9, 0.5]), Curve(1, [], [(0, 0.8), (10, 0.6)])]
    curve_png(runs[:1], tmp_path / "one.png")
    curve_png(runs, tmp_path / "two.png")

    def has_orange(path):
        return (np.abs(read(path).astype(int) - (0xFF, 0x7F, 0x0E)).max(-1) < 8).any()

    assert has_orange(tmp_path / "two.png") and not has_orange(tmp_path / "one.png")


def test_a_picture_that_cannot_be_written_leaves_nothing(digits, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        images_png(digits, digits, SPACE, tmp_path / "file" / "images.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drawing_leaves_pyplot_unloaded():
    code = "import sys, krrst_dist.evaluation.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

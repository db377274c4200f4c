"""The augmentation of DSA (differentiable siamese augmentation; Zhao and Bilen, 2021), differentiable with respect to the images.

For each batch one of six operations is drawn; then its parameters, for each image its own or, siamese, once for all
images. Distillation by DSA or DM augments a real and a synthetic batch with the same seed, siamese, so that both
undergo the same; pre-training and data-free distillation on a synthetic set augment every batch with a new seed.
Acts on normalised images, so whatever is moved in is 0, the data set's mean. Knows no model, no data set and no
schedule of seeds.

What happens is a pure function of the seed, and is drawn on the CPU, so that it is the same on every device. Each
operation is an affine function of the images, so that gradients are exact; those of `scale` and `rotate` add up in no
fixed order on a GPU. b images, C channels, H x W pixels; parameters are [b], or [1] for all images alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from krrst_dist import seeds

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
BRIGHTNESS = 1.0  # width of the range of what is added
SATURATION = 2.0  # largest factor
CONTRAST = 0.5  # least factor; the largest is 1 more
CROP = 0.125  # largest shift, of the image's side
CUTOUT = 0.5  # side of the square, of the image's side
FLIP = 0.5
SCALE = 1.2  # largest factor; the least is its inverse
ROTATE = 15  # degrees, largest angle


def diff_augment(x: Tensor, *, seed: int, siamese: bool = False, operations: Sequence[str] = OPERATIONS) -> Tensor:
    """Augment a batch by one operation.

    Args:
        x: [b, C, H, W], floating point.
        seed: of the operation and its parameters. An image's parameters depend on the seed and its place in the batch.
        siamese: all images get the parameters of the first, so batches of any two sizes undergo the same.
        operations: those to draw from, each as likely; their order counts. `choose` tells which one a seed draws.

    Returns:
        [b, C, H, W], a new tensor with the dtype, the device and the memory format of `x`.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x: {x.dtype} {list(x.shape)}, should be floating-point images [b, C, H, W]")
    b, _, height, width = x.shape
    operation = choose(operations, seed=seed)
    params = draw(operation, 1 if siamese else b, seed=seed, height=height, width=width)
    memory_format = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    return _APPLY[operation](x, **params).contiguous(memory_format=memory_format)


def choose(operations: Sequence[str] = OPERATIONS, *, seed: int) -> str:
    """The operation that this seed draws."""
    unknown = [operation for operation in operations if operation not in OPERATIONS]
    if unknown or not operations:
        wrong = f"unknown {', '.join(map(repr, unknown))}" if unknown else "none given"
        raise ValueError(f"operations: {wrong}, should be one or more of {', '.join(OPERATIONS)}")
    return operations[seeds.derive(seed, "DSA operation") % len(operations)]


def draw(operation: str, count: int, *, seed: int, height: int, width: int) -> dict[str, Tensor]:
    """The parameters of an operation for `count` images, [count] each: the keyword arguments of the function of its name.

    The first n of them do not depend on `count`.
    """
    u, v, w = torch.rand(count, 3, generator=seeds.torch_rng(seed, f"DSA {operation}"), dtype=torch.float64).T  # [count] each
    match operation:
        case "color":
            return {"brightness": (u - 0.5) * BRIGHTNESS, "saturation": v * SATURATION, "contrast": w + CONTRAST}
        case "crop":
            most = [_share(CROP, side) for side in (height, width)]
            return {"down": _integer(u, -most[0], most[0]), "right": _integer(v, -most[1], most[1])}
        case "cutout":
            # The centre of a square of even side lies on the border of two pixels, of which there are one more than pixels.
            last = [side - _share(CUTOUT, side) % 2 for side in (height, width)]
            return {"row": _integer(u, 0, last[0]), "column": _integer(v, 0, last[1])}
        case "flip":
            return {"mirrored": u < FLIP}
        case "scale":
            return {"across": 1 / SCALE + u * (SCALE - 1 / SCALE), "down": 1 / SCALE + v * (SCALE - 1 / SCALE)}
        case "rotate":
            return {"degrees": (2 * u - 1) * ROTATE}
        case _:
            raise ValueError(f"operation: {operation!r}, should be one of {', '.join(OPERATIONS)}")


def color(x: Tensor, *, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    """Add `brightness`; then stretch by the factor `saturation` from each pixel's mean over the channels; then by `contrast`
    from each image's mean."""
    x = x + _per_image(brightness, x)
    gray = x.mean(1, keepdim=True)  # [b, 1, H, W]
    x = gray + _per_image(saturation, x) * (x - gray)
    mean = x.mean((1, 2, 3), keepdim=True)  # [b, 1, 1, 1]
    return mean + _per_image(contrast, x) * (x - mean)


def crop(x: Tensor, *, down: Tensor, right: Tensor) -> Tensor:
    """Show each image through a window of its own size, moved by so many pixels, int64: 0 beyond the border."""
    height, width = x.shape[2:]
    rows = down.to(x.device)[:, None] + torch.arange(height, device=x.device)  # [b, H] of x
    columns = right.to(x.device)[:, None] + torch.arange(width, device=x.device)  # [b, W]
    moved = x.gather(2, rows.clamp(0, height - 1)[:, None, :, None].expand(x.shape))
    moved = moved.gather(3, columns.clamp(0, width - 1)[:, None, None, :].expand(x.shape))
    inside = _both((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
    return moved.masked_fill(~inside, 0)


def cutout(x: Tensor, *, row: Tensor, column: Tensor) -> Tensor:
    """Put 0 into a rectangle of CUTOUT of the image's sides. Its middle pixel, the later of two, is at `row` and `column`, int64;
    what lies beyond the border is lost."""
    hidden = []
    for centre, side in zip((row, column), x.shape[2:], strict=True):
        first = centre.to(x.device)[:, None] - _share(CUTOUT, side) // 2  # [b, 1]
        places = torch.arange(side, device=x.device)
        hidden.append((places >= first) & (places < first + _share(CUTOUT, side)))  # [b, side]
    return x.masked_fill(_both(*hidden), 0)


def flip(x: Tensor, *, mirrored: Tensor) -> Tensor:
    """Exchange left and right where `mirrored`, bool."""
    return torch.where(_per_image(mirrored, x), x.flip(3), x)


def scale(x: Tensor, *, across: Tensor, down: Tensor) -> Tensor:
    """Shrink about the centre by these factors, which enlarge where they are below 1: bilinear, 0 beyond the border."""
    zero = torch.zeros_like(across)
    return _transform(x, across, zero, zero, down)


def rotate(x: Tensor, *, degrees: Tensor) -> Tensor:
    """Turn about the centre, anticlockwise as seen on a screen: bilinear, 0 beyond the border."""
    angle = degrees * (math.pi / 180)
    return _transform(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


_APPLY = {function.__name__: function for function in (color, crop, cutout, flip, scale, rotate)}


def _transform(x: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Each pixel at (right, down) of the centre takes what is at (xx right + xy down, yx right + yy down): bilinear, else 0.

    In pixels about the centre, so the two ways of `align_corners` come to the same, and an image that is not square is
    not sheared. Computed in single precision at least: a place is not known well enough in half of it.
    """
    b, _, height, width = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    xx, xy, yx, yy = (entry.to(x.device, dtype)[:, None, None] for entry in (xx, xy, yx, yy))
    right = torch.arange(width, device=x.device, dtype=dtype) - (width - 1) / 2  # [W]
    down = (torch.arange(height, device=x.device, dtype=dtype) - (height - 1) / 2)[:, None]  # [H, 1]
    # grid_sample counts from -1 to 1, from border to border
    grid = torch.stack([(xx * right + xy * down) * (2 / width), (yx * right + yy * down) * (2 / height)], dim=-1)  # [b, H, W, 2]
    return functional.grid_sample(x.to(dtype), grid.expand(b, -1, -1, -1), padding_mode="zeros", align_corners=False).to(x.dtype)


def _share(share: float, side: int) -> int:
    """So much of a side, in whole pixels; a half is rounded up."""
    return int(share * side + 0.5)


def _integer(u: Tensor, first: int, last: int) -> Tensor:
    """Uniform numbers in [0, 1) as int64 in first..last."""
    return first + (u * (last - first + 1)).long()


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    """bool [b, H] and [b, W] -> [b, 1, H, W]."""
    return rows[:, None, :, None] & columns[:, None, None, :]


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, 1], on the device of `like`, and in its dtype if they are floating point."""
    return values.to(like.device, like.dtype if values.is_floating_point() else values.dtype)[:, None, None, None]

"""Two random views of each image, as Barlow Twins takes them (Zbontar et al., 2021, Appendix A), on batched tensors.

Crop and resize, flip, colour jitter, grayscale, blur, solarise, in this order. The two views differ in how likely blur
and solarising are. All that is random is drawn up front for the whole batch, so that a worker which holds rows of a
global batch applies those rows of the same draw: how many workers there are changes nothing. Knows no model and no
data set. b images, 3 channels, r x r pixels; a drawn value is [b, 2]: an image, then a view.

Where this departs from the paper's 224-pixel recipe: bilinear instead of bicubic; the jitter's four steps keep their
order; the blur's kernel is a tenth of the image wide (as SimCLR's), at least 3 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

CROP_AREA = (0.08, 1.0)
CROP_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
CROP_TRIES = 10
FLIP = 0.5
JITTER = 0.8
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
GRAYSCALE = 0.2
BLUR = (1.0, 0.1)  # first view, second view
BLUR_SIGMA = (0.1, 2.0)  # pixels
SOLARISE = (0.0, 0.2)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class PairParams:
    """What was drawn for the two views of each image. `params[rows]` are those of some of the images."""

    box: Tensor
    """[b, 2, 4] top, left, height, width of the crop, as fractions of the image"""
    flip: Tensor
    """[b, 2] bool"""
    brightness: Tensor
    """[b, 2] factor, 1 leaves as is; so for contrast and saturation"""
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    """[b, 2] shift in turns of the colour circle, 0 leaves as is"""
    grayscale: Tensor
    """[b, 2] bool"""
    blur: Tensor
    """[b, 2] bool"""
    kernel: Tensor
    """[b, 2, taps] the blur's weights along a row or column, summing to 1"""
    solarise: Tensor
    """[b, 2] bool"""

    def __getitem__(self, rows: int | slice | Tensor) -> PairParams:
        return self._each(lambda drawn: drawn[rows])

    def to(self, device: torch.device) -> PairParams:
        return self._each(lambda drawn: drawn.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairParams:
        return PairParams(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def two_views(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two views of each image: [b, 3, r, r] float in [0, 1] -> twice the same."""
    return apply(images, draw(len(images), images.shape[-1], generator))


def two_normalised_views(x: Tensor, generator: torch.Generator, *, scale: Tensor | float, offset: Tensor | float) -> tuple[Tensor, Tensor]:
    """Two views of each image of a space in which x * scale + offset are pixels in [0, 1]: [b, 3, r, r] -> twice the same.

    Differentiable with respect to x almost everywhere: what is beyond [0, 1] is clipped and has no gradient, and solarising jumps.
    scale, offset: numbers, or [3, 1, 1].
    """
    first, second = two_views(x * scale + offset, generator)
    return (first - offset) / scale, (second - offset) / scale


def draw(batch: int, resolution: int, generator: torch.Generator) -> PairParams:
    """Draw the parameters of `batch` pairs of views of images of `resolution` pixels a side."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, 2, *shape, generator=generator, device=generator.device)

    def happens(probability: float | tuple[float, float]) -> Tensor:
        return uniform(0, 1) < torch.tensor(probability, device=generator.device)

    jitter = happens(JITTER)
    return PairParams(
        box=_crop_boxes(uniform(*CROP_AREA, CROP_TRIES), uniform(*CROP_LOG_RATIO, CROP_TRIES).exp(), uniform(0, 1), uniform(0, 1)),
        flip=happens(FLIP),
        brightness=torch.where(jitter, uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS), 1.0),
        contrast=torch.where(jitter, uniform(1 - CONTRAST, 1 + CONTRAST), 1.0),
        saturation=torch.where(jitter, uniform(1 - SATURATION, 1 + SATURATION), 1.0),
        hue=torch.where(jitter, uniform(-HUE, HUE), 0.0),
        grayscale=happens(GRAYSCALE),
        blur=happens(BLUR),
        kernel=_gaussian(uniform(*BLUR_SIGMA), radius=max(1, resolution // 20)),
        solarise=happens(SOLARISE),
    )


def apply(images: Tensor, params: PairParams) -> tuple[Tensor, Tensor]:
    """The two views that `params` describe: [b, 3, r, r] float in [0, 1] -> twice the same, contiguous.

    Row i of the result depends on row i of `images` and `params` alone.
    """
    params = params.to(images.device)
    return _one_view(images, params, 0), _one_view(images, params, 1)


def _one_view(images: Tensor, params: PairParams, view: int) -> Tensor:
    x = crop_and_flip(images, params.box[:, view], params.flip[:, view])
    x = brighten(x, params.brightness[:, view])
    x = contrast(x, params.contrast[:, view])
    x = saturate(x, params.saturation[:, view])
    x = shift_hue(x, params.hue[:, view])
    x = torch.where(_per_image(params.grayscale[:, view]), _gray(x), x)
    blurred = params.blur[:, view].nonzero().squeeze(1)  # rows; most rows of the second view are not
    x = x.index_copy(0, blurred, blur(x[blurred], params.kernel[blurred, view]))
    return torch.where(_per_image(params.solarise[:, view]) & (x >= 0.5), 1 - x, x)


def crop_and_flip(x: Tensor, box: Tensor, flip: Tensor) -> Tensor:
    """Resize the crop `box` [b, 4] to the whole image, bilinearly, mirrored where `flip` [b] says so."""
    size = x.shape[-1]
    centres = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5) / size  # [r] of the pixels, as fractions
    top, left, height, width = box.to(x.dtype).T[..., None]  # [b, 1] each
    rows = top + height * centres  # [b, r]
    columns = left + width * torch.where(flip[:, None], 1 - centres, centres)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1) * 2 - 1  # [b, r, r, 2]
    return functional.grid_sample(x.contiguous(), grid, padding_mode="border", align_corners=False).contiguous()


def brighten(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with black: [b, 3, r, r], factor [b]."""
    return (x * _per_image(factor, x)).clamp(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean gray."""
    return _blend(x, _gray(x).mean(3, keepdim=True).mean(2, keepdim=True), factor)


def saturate(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image in gray."""
    return _blend(x, _gray(x), factor)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn every pixel's hue (of hue, saturation, value) by `turns` [b] of the full circle."""
    red, green, blue = x.unbind(1)
    value, least = x.amax(1), x.amin(1)  # [b, r, r]
    spread = value - least
    safe = torch.where(spread > 0, spread, 1.0)
    hue = torch.where(value == red, (green - blue) / safe,
                      torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe))  # sixths of a turn
    hue = hue + 6 * turns.to(x.dtype)[:, None, None]
    # a channel is `value` near its own hue, `least` from a third of the circle on, and linear in between
    places = [(hue + offset) % 6 for offset in (5, 3, 1)]  # red, green, blue
    shifted = torch.stack([value - spread * torch.minimum(k, 4 - k).clamp(0, 1) for k in places], dim=1)
    return torch.where(_per_image(turns) != 0, shifted, x)


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve the rows, then the columns, of each image with its own kernel [b, taps]; the border is mirrored."""
    radius, size = kernel.shape[1] // 2, x.shape[-1]
    weights = kernel.to(x.dtype).T[:, :, None, None, None]  # [taps, b, 1, 1, 1]
    padded = functional.pad(x, (radius, radius, 0, 0), mode="reflect")
    x = sum(w * padded[..., t : t + size] for t, w in enumerate(weights))
    padded = functional.pad(x, (0, 0, radius, radius), mode="reflect")
    return sum(w * padded[..., t : t + size, :] for t, w in enumerate(weights)).clamp(0, 1)


def _crop_boxes(area: Tensor, ratio: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The first of the tried [b, 2, tries] areas and aspect ratios that fits into the image, placed at random: [b, 2, 4]."""
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    first = ((width <= 1) & (height <= 1)).int().argmax(-1, keepdim=True)
    width = width.gather(-1, first).squeeze(-1).clamp(max=1)  # clamped for the one in millions of which no try fits
    height = height.gather(-1, first).squeeze(-1).clamp(max=1)
    return torch.stack([down * (1 - height), right * (1 - width), height, width], dim=-1)


def _gaussian(sigma: Tensor, *, radius: int) -> Tensor:
    """[b, 2] standard deviations in pixels -> [b, 2, 2 radius + 1] weights."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device)
    return torch.softmax(-0.5 * (offsets / sigma[..., None]) ** 2, dim=-1)


def _gray(x: Tensor) -> Tensor:
    """[b, 3, r, r] -> [b, 1, r, r]."""
    red, green, blue = x.split(1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor, x)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _per_image(values: Tensor, like: Tensor | None = None) -> Tensor:
    """[b] -> [b, 1, 1, 1], in the dtype of `like`."""
    values = values[:, None, None, None]
    return values if like is None else values.to(like.dtype)

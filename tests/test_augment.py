"""Views can be made again anywhere; the pair of self-supervised training can be drawn in one place and applied in many."""

import itertools
import math

import pytest
import torch

from krrst_dist.augment import ssl_pair
from krrst_dist.augment.views import crop_flip
from krrst_dist.torchvision_ops import torchvision

pictures = torchvision.transforms.functional

# Stored views: crop and flip


def splitmix(word: int) -> int:
    """SplitMix64 on Python's own integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def naive_view(image, index, view, *, seed, padding):
    """One image [C, H, W], pixel by pixel."""
    word = splitmix((splitmix((splitmix(seed % 2**64) + index) % 2**64) + view) % 2**64)
    flip = word >= 2**63
    top, left = divmod(word % 2**62 % (2 * padding + 1) ** 2, 2 * padding + 1)
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        y, x = i + top - padding, (width - 1 - j if flip else j) + left - padding
        if 0 <= y < height and 0 <= x < width:
            out[:, i, j] = image[:, y, x]
    return out


def places_of(index, view, *, seed, padding=4):
    """(offset down, offset right, flipped) of each view, read off what it does to pixels that carry their own place."""
    side = 2 * padding + 3  # so that the middle row and column survive every crop
    here = torch.arange(1, side + 1, dtype=torch.int64)
    image = torch.stack([here[:, None].expand(side, side), here[None, :].expand(side, side)])  # [2, H, W]
    views = crop_flip(image.expand(len(index), -1, -1, -1), index, view, seed=seed, padding=padding)
    middle = views[:, :, side // 2, side // 2 : side // 2 + 2]  # [b, 2, 2]
    flip = middle[:, 1, 1] < middle[:, 1, 0]
    down = middle[:, 0, 0] - 1 - side // 2
    right = middle[:, 1, 0] - 1 - side // 2
    return down, right, flip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("shape", "padding"), [((3, 8, 8), 4), ((1, 5, 7), 2), ((3, 6, 6), 0)])
def test_a_view_is_that_of_the_naive_version_for_one_image(dtype, shape, padding):
    torch.manual_seed(0)
    images = (1 + 254 * torch.rand(12, *shape)).to(dtype)
    index = torch.tensor([0, 1, 2, 3, 4, 5, 49_999, 49_999, 1_281_166, 7, 7, 7])
    view = torch.tensor([0, 0, 0, 1, 2, 3, 0, 1, 5, 0, 1, 2**40])
    for seed in (0, 1, 2**63 - 1):
        found = crop_flip(images, index, view, seed=seed, padding=padding)
        assert found.dtype == dtype
        for b in range(12):
            assert torch.equal(found[b], naive_view(images[b], int(index[b]), int(view[b]), seed=seed, padding=padding))


def test_a_view_does_not_depend_on_its_batch_its_memory_format_or_other_generators():
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    index, view = torch.arange(100, 132), torch.arange(32) % 4
    before = images.clone()
    whole = crop_flip(images, index, view, seed=3)
    assert torch.equal(images, before)
    torch.manual_seed(99)
    shuffled = torch.randperm(32)
    assert torch.equal(crop_flip(images[shuffled], index[shuffled], view[shuffled], seed=3), whole[shuffled])
    assert torch.equal(crop_flip(images[5:6], index[5:6], view[5:6], seed=3), whole[5:6])
    assert torch.equal(crop_flip(images.to(memory_format=torch.channels_last), index, view, seed=3), whole)
    assert whole.is_contiguous(memory_format=torch.channels_last)


def test_seed_index_and_view_each_change_the_view():
    here = torch.arange(1000)
    zero = torch.zeros_like(here)
    base = torch.stack(places_of(here, zero, seed=5))
    for other in (places_of(here, zero, seed=6), places_of(here + 1, zero, seed=5), places_of(here, zero + 1, seed=5)):
        same = (torch.stack(other) == base).all(0).float().mean()
        assert same < 0.03  # 1 in 162 by chance


def test_every_offset_and_both_orientations_come_up_in_the_views_of_one_image():
    view = torch.arange(4000)
    down, right, flip = places_of(torch.full_like(view, 17), view, seed=0)
    seen = {(int(d), int(r), bool(f)) for d, r, f in zip(down, right, flip, strict=True)}
    assert seen == set(itertools.product(range(-4, 5), range(-4, 5), (False, True)))


@pytest.mark.parametrize("along", ["images", "views"])
def test_offsets_and_orientations_are_equally_likely_and_neighbours_are_independent(along):
    steps = torch.arange(40_000)
    fixed = torch.full_like(steps, 3)
    down, right, flip = places_of(*((steps, fixed) if along == "images" else (fixed, steps)), seed=11)
    cell = ((down + 4) * 9 + right + 4) * 2 + flip  # 162 of them
    assert chi_squared(cell, 162) < 161 + 4 * math.sqrt(2 * 161)
    assert chi_squared(flip[:-1] * 2 + flip[1:], 4) < 20
    assert chi_squared((down[:-1] + 4) * 9 + down[1:] + 4, 81) < 80 + 4 * math.sqrt(2 * 80)


def chi_squared(cells, count):
    expected = len(cells) / count
    return float(((torch.bincount(cells.long(), minlength=count) - expected) ** 2 / expected).sum())


# The pair of self-supervised training


def drawn(batch, resolution=32, seed=0):
    return ssl_pair.draw(batch, resolution, torch.Generator().manual_seed(seed))


def pictures_of(batch, resolution=32, dtype=torch.float32):
    return torch.rand(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("resolution", [16, 32, 45, 64])
def test_rows_of_the_draw_on_rows_of_the_images_are_the_rows_of_the_whole(resolution):
    images, params = pictures_of(24, resolution), drawn(24, resolution)
    whole = ssl_pair.apply(images, params)
    for rows in (slice(0, 1), slice(0, 8), slice(8, 24), slice(23, 24), slice(3, 20, 5), torch.tensor([9, 2, 2, 17])):
        for part, view in zip(ssl_pair.apply(images[rows], params[rows]), whole, strict=True):
            assert torch.equal(part, view[rows])
    for part, view in zip(ssl_pair.apply(images.to(memory_format=torch.channels_last), params), whole, strict=True):
        assert torch.equal(part, view)


def test_two_views_are_what_is_drawn_and_applied_and_depend_on_the_generator_alone():
    images = pictures_of(8)
    before = images.clone()
    first = ssl_pair.two_views(images, torch.Generator().manual_seed(0))
    torch.rand(3)
    again = ssl_pair.apply(images, drawn(8))
    other = ssl_pair.two_views(images, torch.Generator().manual_seed(1))
    assert torch.equal(images, before)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_are_pictures_like_the_images(dtype):
    images = pictures_of(200, dtype=dtype).round()  # extremes
    for view in ssl_pair.two_views(images, torch.Generator().manual_seed(0)):
        assert view.shape == images.shape
        assert view.dtype == dtype
        assert view.min() >= 0
        assert view.max() <= 1
        assert view.is_contiguous()


def test_each_step_is_as_likely_as_in_barlow_twins():
    params = drawn(20_000)

    def share(happened):
        return happened.float().mean(0).tolist()  # of each view

    near = pytest.approx
    assert share(params.flip) == near([0.5, 0.5], abs=0.015)
    assert share(params.grayscale) == near([0.2, 0.2], abs=0.015)
    assert share(params.blur) == near([1.0, 0.1], abs=0.015)
    assert share(params.solarise) == near([0.0, 0.2], abs=0.015)
    assert params.blur[:, 0].all()
    assert not params.solarise[:, 0].any()
    jittered = params.brightness != 1
    assert share(jittered) == near([0.8, 0.8], abs=0.015)
    assert torch.equal(params.hue != 0, jittered)  # a picture's colours are jittered in all four ways, or not at all
    for name, middle, reach in (("brightness", 1, 0.4), ("contrast", 1, 0.4), ("saturation", 1, 0.2), ("hue", 0, 0.1)):
        factor = getattr(params, name)[jittered]
        assert factor.min().item() == near(middle - reach, abs=0.01)
        assert factor.max().item() == near(middle + reach, abs=0.01)
        assert factor.mean().item() == near(middle, abs=0.01)


def test_the_two_views_of_an_image_are_drawn_independently():
    params = drawn(20_000)
    for values in (params.flip, params.brightness, params.box[..., 0], params.box[..., 2], params.kernel[..., 0]):
        assert abs(torch.corrcoef(values.float().T)[0, 1]) < 0.03


def test_crops_lie_in_the_image_and_have_the_area_and_shape_of_random_resized_crops():
    top, left, height, width = drawn(20_000).box.unbind(-1)
    for start, length in ((top, height), (left, width)):
        assert start.min() >= 0
        assert (start + length).max() <= 1 + 1e-6
    area, ratio = height * width, (width / height).log()
    assert 0.08 - 1e-6 <= area.min() < 0.09
    assert 0.97 < area.max() <= 1
    assert ratio.min().item() == pytest.approx(math.log(3 / 4), abs=0.01)
    assert ratio.max().item() == pytest.approx(math.log(4 / 3), abs=0.01)
    assert ratio.mean().item() == pytest.approx(0, abs=0.01)
    small = area[area < 0.5]  # where every aspect ratio fits, all areas are equally likely
    assert small.mean().item() == pytest.approx(0.29, abs=0.01)


def test_a_crop_of_a_ramp_is_the_ramp_between_the_crops_edges():
    size = 16
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    ramps = torch.stack([centres[:, None].expand(size, size), centres[None, :].expand(size, size), torch.zeros(size, size)])
    box = torch.tensor([[0.1, 0.3, 0.5, 0.6], [0.1, 0.3, 0.5, 0.6]])
    plain, mirrored = ssl_pair.crop_and_flip(ramps.expand(2, -1, -1, -1), box, torch.tensor([False, True]))
    torch.testing.assert_close(plain[0], (0.1 + 0.5 * centres)[:, None].expand(size, size), atol=1e-7, rtol=0)
    torch.testing.assert_close(plain[1], (0.3 + 0.6 * centres)[None, :].expand(size, size), atol=1e-7, rtol=0)
    torch.testing.assert_close(mirrored, plain.flip(2), atol=1e-7, rtol=0)


def test_the_whole_image_as_crop_is_the_image():
    images = pictures_of(2)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    found = ssl_pair.crop_and_flip(images, whole, torch.tensor([False, True]))
    torch.testing.assert_close(found, torch.stack([images[0], images[1].flip(2)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high", "tolerance"),
    [
        (ssl_pair.brighten, pictures.adjust_brightness, 0.2, 1.8, 1e-12),
        (ssl_pair.contrast, pictures.adjust_contrast, 0.2, 1.8, 1e-12),
        (ssl_pair.saturate, pictures.adjust_saturation, 0.2, 1.8, 1e-12),
        (ssl_pair.shift_hue, pictures.adjust_hue, -0.5, 0.5, 1e-5),  # theirs computes in float32
    ],
)
def test_colours_change_as_torchvision_changes_them_for_one_image(ours, theirs, low, high, tolerance):
    images = pictures_of(9, 8, torch.float64)
    images[:, :, 0] = images[:, :1, 0]  # gray pixels
    images[:, :, 1] = images[:, :, 1].round()  # black, white and pure colours
    factors = torch.linspace(low, high, 9, dtype=torch.float64)
    expected = torch.stack([theirs(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(ours(images, factors), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("resolution", "taps"), [(16, 3), (32, 3), (64, 7), (224, 23)])
def test_the_blur_is_a_gaussian_a_tenth_of_the_image_wide(resolution, taps):
    assert drawn(2, resolution).kernel.shape == (2, 2, taps)


def test_the_blur_is_torchvisions_with_each_images_own_sigma():
    images = pictures_of(3, 16, torch.float64)
    sigmas = [0.1, 0.7, 2.0]
    expected = torch.stack([pictures.gaussian_blur(image, [7, 7], [sigma] * 2) for image, sigma in zip(images, sigmas, strict=True)])
    found = ssl_pair.blur(images, ssl_pair._gaussian(torch.tensor(sigmas), radius=3))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # their kernel is float32


def test_a_view_is_torchvisions_steps_in_barlow_twins_order_one_image_at_a_time():
    images, params = pictures_of(40), drawn(40)
    for view, found in enumerate(ssl_pair.apply(images, params)):
        expected = ssl_pair.crop_and_flip(images, params.box[:, view], params.flip[:, view])
        for i, image in enumerate(expected):
            one = params[i]
            image = pictures.adjust_brightness(image, float(one.brightness[view]))
            image = pictures.adjust_contrast(image, float(one.contrast[view]))
            image = pictures.adjust_saturation(image, float(one.saturation[view]))
            image = pictures.adjust_hue(image, float(one.hue[view]))
            if one.grayscale[view]:
                image = pictures.rgb_to_grayscale(image, num_output_channels=3)
            if one.blur[view]:
                image = ssl_pair.blur(image[None], one.kernel[None, view])[0]
            if one.solarise[view]:
                image = pictures.solarize(image, 0.5)
            near_half = (found[i] - 0.5).abs() < 1e-4  # where rounding decides what is solarised
            torch.testing.assert_close(found[i][~near_half], image[~near_half], atol=1e-4, rtol=0)

"""DSA's augmentation: six operations that gradients pass through, drawn by a seed, for each image or for all alike."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from krrst_dist.augment import diff_augment as augmentation
from krrst_dist.augment.diff_augment import OPERATIONS, choose, diff_augment, draw

SHAPES = [(3, 8, 8), (1, 5, 5), (3, 7, 10), (2, 12, 9)]


def pictures_of(batch, *shape, dtype=torch.float64):
    """Normalised images, no pixel of which is 0."""
    images = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (images + images.sign() * 0.1).to(dtype)


def seeds_of(operation, count):
    """The first seeds that draw this operation of all six."""
    return [seed for seed in range(200) if choose(seed=seed) == operation][:count]


# What the operations do, one image [C, H, W] at a time


def naive_color(image, *, brightness, saturation, contrast):
    channels, height, width = image.shape
    out = image.clone()
    for c, i, j in itertools.product(range(channels), range(height), range(width)):
        out[c, i, j] = image[c, i, j] + brightness
    brighter = out.clone()
    for i, j in itertools.product(range(height), range(width)):
        gray = sum(brighter[c, i, j] for c in range(channels)) / channels
        for c in range(channels):
            out[c, i, j] = (brighter[c, i, j] - gray) * saturation + gray
    mean = sum(out.flatten().tolist()) / out.numel()
    return (out - mean) * contrast + mean


def naive_crop(image, *, down, right):
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        if 0 <= i + down < height and 0 <= j + right < width:
            out[:, i, j] = image[:, i + down, j + right]
    return out


def naive_cutout(image, *, row, column):
    """The indices of the square's pixels are clamped to the image, as DSA has them."""
    _, height, width = image.shape
    tall, wide = int(0.5 * height + 0.5), int(0.5 * width + 0.5)
    out = image.clone()
    for i, j in itertools.product(range(tall), range(wide)):
        out[:, min(max(row - tall // 2 + i, 0), height - 1), min(max(column - wide // 2 + j, 0), width - 1)] = 0
    return out


def naive_flip(image, *, mirrored):
    width = image.shape[2]
    return torch.stack([image[:, :, width - 1 - j if mirrored else j] for j in range(width)], dim=2)


def naive_scale(image, *, across, down):
    return sampled(image, lambda right, below: (across * right, down * below))


def naive_rotate(image, *, degrees):
    """A picture that turns anticlockwise shows at each place what was clockwise of it; rows count downwards."""
    angle = math.radians(degrees)
    return sampled(image, lambda right, below: (math.cos(angle) * right - math.sin(angle) * below,
                                                math.sin(angle) * right + math.cos(angle) * below))


def sampled(image, source):
    """Each pixel from `source` of its place relative to the centre: the four pixels around that, weighted by nearness."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i, j in itertools.product(range(height), range(width)):
        right, below = source(j - (width - 1) / 2, i - (height - 1) / 2)
        x, y = right + (width - 1) / 2, below + (height - 1) / 2
        for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                out[:, i, j] += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return out


NAIVE = {"color": naive_color, "crop": naive_crop, "cutout": naive_cutout, "flip": naive_flip, "scale": naive_scale,
         "rotate": naive_rotate}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_image_undergoes_the_naive_version_with_its_own_parameters(operation, shape):
    images = pictures_of(6, *shape)
    before = images.clone()
    params = draw(operation, 6, seed=3, height=shape[1], width=shape[2])
    found = getattr(augmentation, operation)(images, **params)
    assert torch.equal(images, before)
    for i, image in enumerate(images):
        expected = NAIVE[operation](image, **{name: values[i].item() for name, values in params.items()})
        torch.testing.assert_close(found[i], expected, atol=1e-12, rtol=0)
    assert not torch.allclose(found, images)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_parameters_of_one_are_for_every_image(operation):
    images = pictures_of(4, 3, 8, 8)
    params = draw(operation, 1, seed=seeds_of(operation, 2)[1], height=8, width=8)
    found = getattr(augmentation, operation)(images, **params)
    for i in range(4):
        expected = NAIVE[operation](images[i], **{name: values.item() for name, values in params.items()})
        torch.testing.assert_close(found[i], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_every_shift_and_every_place_of_the_square_is_as_in_the_naive_version(size):
    image = pictures_of(1, 1, size, size)
    for i, j in itertools.product(range(-size - 1, size + 2), repeat=2):
        found = augmentation.crop(image, down=torch.tensor([i]), right=torch.tensor([j]))
        assert torch.equal(found[0], naive_crop(image[0], down=i, right=j))
    last = size - int(0.5 * size + 0.5) % 2
    for i, j in itertools.product(range(last + 1), repeat=2):
        found = augmentation.cutout(image, row=torch.tensor([i]), column=torch.tensor([j]))
        assert torch.equal(found[0], naive_cutout(image[0], row=i, column=j))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("operation", ["scale", "rotate"])
def test_a_square_image_is_sampled_as_by_torchs_affine_grid_whichever_way_corners_are_aligned(operation, align_corners):
    images = pictures_of(5, 3, 9, 9)
    params = draw(operation, 5, seed=2, height=9, width=9)
    zero = torch.zeros(5, dtype=torch.float64)
    if operation == "scale":
        theta = torch.stack([params["across"], zero, zero, zero, params["down"], zero], dim=1)
    else:
        angle = params["degrees"] / 180 * math.pi
        theta = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)
    grid = functional.affine_grid(theta.reshape(5, 2, 3), list(images.shape), align_corners=align_corners)
    expected = functional.grid_sample(images, grid, align_corners=align_corners)
    torch.testing.assert_close(getattr(augmentation, operation)(images, **params), expected, atol=1e-12, rtol=0)


def test_a_quarter_turn_is_anticlockwise_and_a_factor_of_two_halves_the_picture():
    image = pictures_of(1, 3, 6, 6)
    turned = augmentation.rotate(image, degrees=torch.tensor([90.0], dtype=torch.float64))
    torch.testing.assert_close(turned, torch.rot90(image, 1, (2, 3)), atol=1e-12, rtol=0)
    two = torch.tensor([2.0], dtype=torch.float64)
    halved = functional.avg_pool2d(functional.pad(image, (3,) * 4), 2)
    torch.testing.assert_close(augmentation.scale(image, across=two, down=two), halved, atol=1e-12, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradients_with_respect_to_the_images_are_exact_and_can_be_differentiated_again(operation):
    images = pictures_of(2, 2, 4, 5).requires_grad_()
    params = draw(operation, 2, seed=4, height=4, width=5)

    def augment(x):
        return getattr(augmentation, operation)(x, **params)

    assert torch.autograd.gradcheck(augment, images)
    assert torch.autograd.gradgradcheck(augment, images)


@pytest.mark.parametrize("siamese", [False, True])
def test_gradients_reach_the_images_through_the_whole(siamese):
    for operation in OPERATIONS:
        images = pictures_of(3, 3, 8, 8).requires_grad_()
        augmented = diff_augment(images, seed=5, siamese=siamese, operations=(operation,))
        (gradient,) = torch.autograd.grad(augmented.square().sum(), images)
        assert (gradient.flatten(1) != 0).any(1).all()


# What a seed draws


@pytest.mark.parametrize("siamese", [False, True])
def test_the_whole_is_the_operation_that_the_seed_chooses_with_the_parameters_that_it_draws(siamese):
    images = pictures_of(5, 3, 8, 10)
    for seed in range(40):
        operation = choose(seed=seed)
        params = draw(operation, 1 if siamese else 5, seed=seed, height=8, width=10)
        expected = getattr(augmentation, operation)(images, **params)
        assert torch.equal(diff_augment(images, seed=seed, siamese=siamese), expected)


def test_what_happens_depends_on_the_seed_alone_and_leaves_torchs_generator_as_it_is():
    images = pictures_of(4, 3, 8, 8)
    first = [diff_augment(images, seed=seed) for seed in range(20)]
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = [diff_augment(images, seed=seed) for seed in range(20)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for operation in OPERATIONS:
        one, other = (diff_augment(images, seed=seed, operations=(operation,)) for seed in (1, 3))
        assert not torch.equal(one, other)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_siamese_batches_of_any_size_undergo_the_same_which_is_what_the_first_image_draws(operation):
    real = pictures_of(20, 3, 8, 8)
    synthetic = real[[7, 0, 19]]
    for seed in seeds_of(operation, 3):
        augmented = diff_augment(real, seed=seed, siamese=True)
        torch.testing.assert_close(diff_augment(synthetic, seed=seed, siamese=True), augmented[[7, 0, 19]], atol=1e-12, rtol=0)
        torch.testing.assert_close(diff_augment(real, seed=seed)[0], augmented[0], atol=1e-12, rtol=0)
        alike = diff_augment(real[:1].expand(6, -1, -1, -1), seed=seed, siamese=True)
        torch.testing.assert_close(alike, augmented[:1].expand(6, -1, -1, -1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_that_are_not_siamese_differ_in_their_parameters_and_keep_them_in_a_larger_batch(operation):
    params = draw(operation, 50, seed=6, height=32, width=32)
    for name, values in params.items():
        assert len(values.unique()) > {"crop": 4, "cutout": 10, "flip": 1}.get(operation, 49)
        assert torch.equal(draw(operation, 7, seed=6, height=32, width=32)[name], values[:7])
    same_image = pictures_of(1, 3, 8, 8).expand(50, -1, -1, -1)
    (seed,) = seeds_of(operation, 1)
    augmented = diff_augment(same_image, seed=seed)
    assert not torch.allclose(augmented, augmented[:1].expand_as(augmented))


def chi_squared(cells, count):
    expected = len(cells) / count
    return float(((torch.bincount(cells.long(), minlength=count) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("operations", [OPERATIONS, ("flip", "crop", "rotate")])
def test_operations_are_equally_likely_and_those_of_successive_seeds_are_independent(operations):
    count = len(operations)
    chosen = torch.tensor([operations.index(choose(operations, seed=seed)) for seed in range(12_000)])
    for cells, kinds in ((chosen, count), (chosen[:-1] * count + chosen[1:], count**2)):
        assert chi_squared(cells, kinds) < kinds - 1 + 4 * math.sqrt(2 * (kinds - 1))


def test_the_parameters_of_successive_seeds_are_independent():
    degrees = torch.cat([draw("rotate", 1, seed=seed, height=8, width=8)["degrees"] for seed in range(4000)])
    assert abs(torch.corrcoef(torch.stack([degrees[:-1], degrees[1:]]))[0, 1]) < 0.05
    assert degrees.std().item() == pytest.approx(30 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize(
    ("operation", "name", "low", "high"),
    [
        ("color", "brightness", -0.5, 0.5),
        ("color", "saturation", 0, 2),
        ("color", "contrast", 0.5, 1.5),
        ("scale", "across", 1 / 1.2, 1.2),
        ("scale", "down", 1 / 1.2, 1.2),
        ("rotate", "degrees", -15, 15),
    ],
)
def test_strengths_are_uniform_between_dsas_bounds(operation, name, low, high):
    values = draw(operation, 40_000, seed=0, height=32, width=32)[name]
    assert values.min() >= low
    assert values.max() <= high
    cell = (values - low) / (high - low) * 50
    assert chi_squared(cell.floor(), 50) < 49 + 4 * math.sqrt(2 * 49)
    assert cell.min() < 0.05
    assert cell.max() > 49.95


@pytest.mark.parametrize(
    ("operation", "side", "first", "last"),
    [
        ("crop", 32, -4, 4),
        ("crop", 64, -8, 8),
        ("crop", 28, -4, 4),  # 3.5, rounded up
        ("crop", 3, 0, 0),
        ("cutout", 32, 0, 32),  # a square of even side, 16, about one of the 33 borders of pixels
        ("cutout", 64, 0, 64),
        ("cutout", 5, 0, 4),  # of odd side, 3, about one of the 5 pixels
    ],
)
def test_places_are_uniform_between_dsas_bounds_and_each_axis_has_its_own(operation, side, first, last):
    other = 16  # crop: -2..2, cutout: 0..16
    kinds, others = last - first + 1, 5 if operation == "crop" else 17
    down, right = draw(operation, 40_000, seed=1, height=side, width=other).values()
    assert down.dtype == right.dtype == torch.int64
    assert (down.min(), down.max()) == (first, last)
    cells = (down - first) * others + right - right.min()
    assert chi_squared(cells, kinds * others) < kinds * others - 1 + 4 * math.sqrt(2 * (kinds * others - 1))
    across = list(draw(operation, 40_000, seed=1, height=other, width=side).values())[1]
    assert (across.min(), across.max()) == (first, last)


def test_half_of_the_images_are_mirrored():
    mirrored = draw("flip", 40_000, seed=0, height=32, width=32)["mirrored"]
    assert mirrored.dtype == torch.bool
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert chi_squared(mirrored[:-1] * 2 + mirrored[1:], 4) < 20


@pytest.mark.parametrize("operation", ["color", "scale"])
def test_the_strengths_of_one_operation_are_independent(operation):
    values = torch.stack(list(draw(operation, 20_000, seed=0, height=32, width=32).values()))
    off_diagonal = torch.corrcoef(values) - torch.eye(len(values), dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.03


# What goes in and what comes out


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_shape_dtype_and_memory_format_are_kept_and_values_agree_with_double_precision(operation, dtype, memory_format):
    images = pictures_of(6, 3, 16, 16, dtype=dtype).contiguous(memory_format=memory_format)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.1)
    for siamese in (False, True):
        found = diff_augment(images, seed=8, siamese=siamese, operations=(operation,))
        assert found.dtype == dtype
        assert found.shape == images.shape
        assert found.is_contiguous(memory_format=memory_format)
        assert found.data_ptr() != images.data_ptr()
        expected = diff_augment(images.double(), seed=8, siamese=siamese, operations=(operation,))
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_stay_on_their_device(operation):
    images = torch.empty(4, 3, 8, 8, device="meta")
    for siamese in (False, True):
        found = diff_augment(images, seed=0, siamese=siamese, operations=(operation,))
        assert found.device == images.device
        assert found.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_comes_to_the_same():
    images = pictures_of(6, 3, 32, 32, dtype=torch.float32)
    for operation, siamese, seed in itertools.product(OPERATIONS, (False, True), range(5)):
        found = diff_augment(images.cuda(), seed=seed, siamese=siamese, operations=(operation,))
        assert found.is_cuda
        expected = diff_augment(images, seed=seed, siamese=siamese, operations=(operation,))
        torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 1, 1), (1, 1, 1, 6)])
def test_no_image_and_the_least_of_images_pass(operation, shape):
    found = diff_augment(torch.ones(shape), seed=0, operations=(operation,))
    assert found.shape == shape
    assert found.isfinite().all()


@pytest.mark.parametrize("images", [torch.zeros(3, 8, 8), torch.zeros(2, 3, 3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)])
def test_what_is_not_a_batch_of_floating_point_images_is_refused(images):
    with pytest.raises(ValueError, match=r"x: torch\.\w+ \[.*\], should be floating-point images \[b, C, H, W\]"):
        diff_augment(images, seed=0)


def test_an_unknown_operation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="operations: unknown 'colour', 'blur', should be one or more of color, crop, cutout, flip"):
        diff_augment(pictures_of(1, 3, 8, 8), seed=0, operations=("colour", "crop", "blur"))
    with pytest.raises(ValueError, match="operations: none given, should be one or more of color"):
        choose((), seed=0)
    with pytest.raises(ValueError, match="operation: 'colour', should be one of color, crop"):
        draw("colour", 1, seed=0, height=8, width=8)

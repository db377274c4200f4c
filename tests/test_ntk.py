"""The tangent kernel: its recursion against literal sums and wide networks, its gradient against finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from krrst_dist.algorithm.ntk import Convolutional, FullyConnected, ntk, ntk_pull_back

TWICE = (False, True, True)
ARCHITECTURES = [FullyConnected(1), FullyConnected(3), Convolutional((True,)), Convolutional((False, True)), Convolutional(TWICE)]


def images(n: int, side: int, seed: int = 0, channels: int = 2) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rectified(s: float, theta: float, a: float, b: float) -> tuple[float, float]:
    r = max(-1.0, min(1.0, s / math.sqrt(a * b)))
    angle = math.pi - math.acos(r)
    return math.sqrt(a * b) / (2 * math.pi) * (math.sqrt(1 - r * r) + r * angle), theta * angle / (2 * math.pi)


def literal(pooled: tuple[bool, ...], x: Tensor, other: Tensor) -> float:
    """BASELINES 7 for one pair of images [C, H, W], with every pair of pixels: S, Theta [H, W, H, W]."""

    def convolve(s: Tensor) -> Tensor:
        padded, side = F.pad(s, [1] * 8), len(s)
        shifts = [(i, j) for i in range(3) for j in range(3)]
        return 2 / 9 * sum(padded[i:i + side, j:j + side, i:i + side, j:j + side] for i, j in shifts)

    def pool(s: Tensor) -> Tensor:
        return sum(s[i::2, j::2, k::2, m::2] for i in (0, 1) for j in (0, 1) for k in (0, 1) for m in (0, 1)) / 16

    pairs = {"xx": (x, x), "yy": (other, other), "xy": (x, other)}
    s = {key: torch.einsum("chw,cij->hwij", *pair) / len(x) for key, pair in pairs.items()}
    theta = {key: torch.zeros_like(value) for key, value in s.items()}
    for pooling in pooled:
        s = {key: convolve(value) + 0.01 for key, value in s.items()}
        theta = {key: s[key] + convolve(value) for key, value in theta.items()}
        side, before = len(s["xy"]), {key: value.clone() for key, value in s.items()}
        for key in pairs:
            for h, w, i, j in torch.cartesian_prod(*[torch.arange(side)] * 4).tolist():
                a, b = before[key[0] * 2][h, w, h, w].item(), before[key[1] * 2][i, j, i, j].item()
                s[key][h, w, i, j], theta[key][h, w, i, j] = rectified(before[key][h, w, i, j].item(), theta[key][h, w, i, j].item(), a, b)
        if pooling:
            s, theta = ({key: pool(value) for key, value in values.items()} for values in (s, theta))
    ends = [torch.einsum("hwhw->", values["xy"]).item() / len(values["xy"]) ** 2 for values in (s, theta)]
    return 2 * ends[0] + 0.01 + 2 * ends[1]


@pytest.mark.parametrize(("pooled", "side"), [((False,), 4), ((True,), 4), ((False, True), 4), (TWICE, 4), (TWICE, 8)])
def test_the_offsets_that_are_needed_give_what_every_pair_of_pixels_gives(pooled, side):
    x, other = images(2, side), images(1, side, seed=1)
    found = ntk(Convolutional(pooled), x, other)
    assert found[1, 0].item() == pytest.approx(literal(pooled, x[1], other[0]), rel=1e-12)
    assert ntk(Convolutional(pooled), x)[0, 0].item() == pytest.approx(literal(pooled, x[0], x[0]), rel=1e-12)


def test_three_pools_need_225_offsets_of_each_pixel():
    assert Convolutional((False, True, True, True)).numbers((3, 32, 32)) == 15**2 * 32**2
    assert Convolutional((False, True)).numbers((3, 4, 4)) == 3**2 * 4**2
    assert FullyConnected(2).numbers((3, 4, 4)) == 1


def test_the_fully_connected_recursion_is_the_literal_one():
    x, other = images(1, 3), images(1, 3, seed=1)
    s = {key: (a * b).mean().item() for key, a, b in (("xx", x, x), ("yy", other, other), ("xy", x, other))}
    theta = 0.0
    for _ in range(3):
        s = {key: 2 * value + 0.01 for key, value in s.items()}
        theta = s["xy"] + 2 * theta
        after, theta = rectified(s["xy"], theta, s["xx"], s["yy"])
        s = {"xx": s["xx"] / 2, "yy": s["yy"] / 2, "xy": after}
    assert ntk(FullyConnected(3), x, other).item() == pytest.approx(2 * s["xy"] + 0.01 + 2 * theta, rel=1e-12)


def empirical(pooled: tuple[bool, ...] | None, x: Tensor, width: int, seed: int) -> Tensor:
    """The tangent kernel [n, n] of one random wide network; pooled None: one hidden fully connected layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    weights: list[Tensor] = []

    def dense(h: Tensor, out: int, number: int) -> Tensor:
        if len(weights) <= 2 * number:
            weights.extend([draw(out, h.shape[1]), draw(out)])
        w, b = weights[2 * number:2 * number + 2]
        return math.sqrt(2 / h.shape[1]) * h @ w.T + 0.1 * b

    def network(h: Tensor) -> Tensor:
        if pooled is None:
            return dense(dense(h.flatten(1), width, 0).relu(), 1, 1)
        for number, pooling in enumerate(pooled):
            if len(weights) <= 2 * number:
                weights.extend([draw(width, h.shape[1], 3, 3), draw(width)])
            w, b = weights[2 * number:2 * number + 2]
            h = F.conv2d(h, math.sqrt(2 / (9 * h.shape[1])) * w, 0.1 * b, padding=1).relu()
            h = F.avg_pool2d(h, 2) if pooling else h
        return dense(h.flatten(1), 1, len(pooled))

    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(network(image[None]).sum(), weights)]) for image in x]
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize(("pooled", "width", "draws"), [(None, 4000, 5), ((False, True), 160, 12)])
def test_it_is_the_mean_tangent_kernel_of_wide_networks(pooled, width, draws):
    x = images(3, 4)
    exact = ntk(FullyConnected(1) if pooled is None else Convolutional(pooled), x)
    found = torch.stack([empirical(pooled, x, width, seed) for seed in range(draws)])
    error = found.std(0) / math.sqrt(draws)
    assert (error / exact).max() < 0.05
    assert ((found.mean(0) - exact).abs() < 4 * error + 0.02 * exact).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_give_the_whole_and_half_of_a_symmetric_kernel_all_of_it(architecture):
    x, other, g = images(5, 4), images(4, 4, seed=1), images(1, 5, seed=2, channels=1)[0, 0]
    whole, symmetric = ntk(architecture, x, other), ntk(architecture, x)
    torch.testing.assert_close(symmetric, ntk(architecture, x, x.clone()))
    pulled = ntk_pull_back(architecture, x, g), ntk_pull_back(architecture, x, g[:, :4], other)
    for pairs in (1, 3, 7, 11):
        block, blocks = pairs * architecture.numbers(x.shape[1:]), itertools.count()
        torch.testing.assert_close(ntk(architecture, x, other, block=block, alive=blocks.__next__), whole)
        assert next(blocks) >= 20 / pairs
        torch.testing.assert_close(ntk(architecture, x, block=block), symmetric)
        torch.testing.assert_close(ntk_pull_back(architecture, x, g, block=block), pulled[0])
        torch.testing.assert_close(ntk_pull_back(architecture, x, g[:, :4], other, block=block), pulled[1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pull_back_is_the_gradient_by_finite_differences(architecture):
    x, other, direction = images(3, 4), images(2, 4, seed=1), images(3, 4, seed=2)
    x[1, :, :2] = x[0, :, :2] + 0.1  # nearly alike in part
    g = images(1, 3, seed=3, channels=1)[0, 0]
    for second, weight in ((other, g[:, :2]), (None, g)):
        value = [(weight * ntk(architecture, x + e * direction, second)).sum().item() for e in (1e-6, -1e-6)]
        found = (ntk_pull_back(architecture, x, weight, second) * direction).sum().item()
        assert found == pytest.approx((value[0] - value[1]) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_of_an_image_with_itself_or_its_copy_has_a_finite_gradient(architecture):
    x = images(2, 4)
    x[1, :, :, 2:] = 0  # half of it is black
    among = ntk_pull_back(architecture, x, torch.eye(2, dtype=torch.float64))
    value = [ntk(architecture, x + e * torch.ones_like(x)).trace().item() for e in (1e-6, -1e-6)]
    assert among.sum().item() == pytest.approx((value[0] - value[1]) / 2e-6, rel=1e-6)
    with_a_copy = ntk_pull_back(architecture, x, torch.eye(2, dtype=torch.float64), x.clone())
    torch.testing.assert_close(with_a_copy, among / 2)  # of the two directions the mean
    assert ntk_pull_back(architecture, x.float(), torch.eye(2)).isfinite().all()


def test_the_deviations_and_the_kernel_agree_on_the_diagonal():
    x = images(3, 8)
    for architecture in (FullyConnected(2), Convolutional(TWICE)):
        deviations = architecture.deviations(x)
        one = architecture.kernel(x, deviations, x, deviations)
        assert torch.linalg.eigvalsh(one).min() > 0 and torch.equal(ntk(architecture, x).diagonal(), one.diagonal())

"""Theorem 1 on a small problem: what random views in the inner loss do to the meta-gradient."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from krrst_dist.config import ConfigError
from krrst_dist.evaluation.theorem1 import (
    Problem,
    Views,
    all_views,
    augmentations,
    digits,
    draw,
    expected_moments,
    inner_minimiser,
    main,
    masks,
    mean_gradient,
    mean_loss,
    moments,
    plot,
    regression_bias,
    relative_bias,
    table,
    theorem1,
    true_gradient,
)
from krrst_dist.seeds import torch_rng

VIEWS = pytest.mark.parametrize("views", [augmentations(), masks()], ids=["augmentation", "masking"])


def problem(views: Views, m: int = 16) -> Problem:
    return Problem(*digits(m, 100, seed=0), views)


@pytest.fixture(scope="module")
def result():
    return theorem1(repetitions=300)


# the problem


def test_an_augmented_image_is_the_image_flipped_and_shifted():
    image = torch.arange(16.0, dtype=torch.float64)
    views = augmentations()
    pictures = {tuple((a @ image).int().tolist()) for a in views.seen}
    rows = image.reshape(4, 4)
    assert pictures == {tuple(v.flatten().int().tolist()) for v in (rows, rows.flip(1), rows.roll(2, 1), rows.flip(1).roll(2, 1))}
    assert len({tuple((torch.cat([a, b]) @ image).tolist()) for a, b in zip(views.seen, views.wanted, strict=True)}) == 16


def test_a_mask_leaves_two_quarters_of_the_image_and_all_of_it_is_wanted():
    views = masks()
    kept = (views.seen @ torch.ones(16, dtype=torch.float64)).reshape(-1, 4, 4)
    assert len(views.seen) == 6 and (kept.sum((1, 2)) == 8).all()
    assert (kept.reshape(-1, 2, 2, 2, 2).std((2, 4)) == 0).all(), "whole quarters"
    assert torch.equal(views.wanted, torch.eye(16, dtype=torch.float64).expand(6, -1, -1))


def loss_written_out(w: Tensor, views: Views, x: Tensor) -> Tensor:
    """Mean over images and all views of |W seen(x) - wanted(x)|^2."""
    return torch.stack([(w @ a @ image - b @ image).square().sum() for image in x
                        for a, b in zip(views.seen, views.wanted, strict=True)]).mean()


@VIEWS
def test_the_inner_minimiser_is_where_the_expected_loss_is_flat(views):
    p = problem(views, m=3)
    w = inner_minimiser(expected_moments(views, p.x_syn), p.ridge).requires_grad_()
    loss = loss_written_out(w, views, p.x_syn) + p.ridge * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-12


@VIEWS
def test_every_view_counted_alike_is_the_expected_loss(views):
    x = problem(views).x_syn
    torch.testing.assert_close(moments(views, x).mean(1).sum(0), expected_moments(views, x), rtol=0, atol=1e-14)


@VIEWS
def test_the_outer_loss_is_the_real_images_squared_error_but_for_a_constant(views):
    p = Problem(*digits(3, 5, seed=0), views)
    constant = (p.views.wanted @ p.x_real.T).square().sum(1).mean()
    w = inner_minimiser(expected_moments(views, p.x_syn), p.ridge)
    assert mean_loss(p, p.x_syn, all_views(p)) == pytest.approx(float(loss_written_out(w, views, p.x_real) - constant), rel=1e-12)


@VIEWS
def test_the_true_gradient_agrees_with_finite_differences(views):
    p = problem(views)
    step = torch.randn(p.x_syn.shape, dtype=torch.float64, generator=torch_rng(0, "direction")) * 1e-5
    ahead, behind = (float(mean_loss(p, p.x_syn + sign * step, all_views(p))) for sign in (1, -1))
    assert (ahead - behind) / 2 == pytest.approx(float((true_gradient(p) * step).sum()), rel=1e-6)


# the estimators


def test_n_views_are_drawn_for_each_image_by_itself_and_each_view_is_as_likely():
    p = problem(masks())
    shares = draw(p, n=4, repetitions=3000, rng=torch_rng(0, "draws"))
    assert (shares * 4 == (shares * 4).round()).all() and torch.equal(shares.sum(2), torch.ones(3000, 16, dtype=torch.float64))
    assert (shares.mean(0) - 1 / 6).abs().max() < 0.02
    centred = shares[:, :, 0] - 1 / 6
    assert ((centred.T @ centred / 3000).fill_diagonal_(0)).abs().max() < 0.004, "images do not share their draws"


def test_an_estimate_is_the_gradient_through_the_views_that_were_drawn():
    p = problem(masks(), m=2)
    shares = torch.zeros(1, 2, 6, dtype=torch.float64)
    shares[0, 0, 4], shares[0, 1, 1] = 1, 1
    x = p.x_syn.clone().requires_grad_()
    seen, wanted = (torch.stack([maps[4] @ x[0], maps[1] @ x[1]]) for maps in (p.views.seen, p.views.wanted))
    w = torch.linalg.solve(seen.T @ seen / 2 + p.ridge * torch.eye(16, dtype=torch.float64), seen.T @ wanted / 2).T
    expected, = torch.autograd.grad(loss_written_out(w, p.views, p.x_real), x)
    torch.testing.assert_close(mean_gradient(p, shares), expected, rtol=1e-9, atol=1e-12)


def test_the_measured_bias_is_that_of_the_expectation_over_all_draws():
    p = problem(masks(), m=2)
    every = torch.stack([torch.eye(6, dtype=torch.float64)[list(choice)] for choice in product(range(6), repeat=2)])  # [36, 2, 6]
    true = true_gradient(p)
    exact = float((mean_gradient(p, every) - true).norm() / true.norm())
    bias, error = relative_bias(p, n=1, draws=20_000, rng=torch_rng(0, "draws"))
    assert exact > 0.05 and abs(bias - exact) < 3 * error < 0.2 * exact


@pytest.mark.parametrize("n", [1, 16])
@VIEWS
def test_with_one_view_alone_nothing_is_random_and_there_is_no_bias(views, n):
    bias, error = relative_bias(problem(Views(views.seen[1:2], views.wanted[1:2])), n=n, draws=64, rng=torch_rng(0, "draws"))
    assert bias < 1e-12 and error < 1e-12


# the theorem


@pytest.mark.parametrize("name", ["augmentation", "masking"])
def test_averaging_gradients_of_one_sample_each_does_not_shrink_the_bias(result, name):
    curve = getattr(result, name).averaged
    assert 0.8 < curve.bias[-1] / curve.bias[0] < 1.25
    assert curve.bias[-1] > 20 * curve.error[-1]
    assert abs(curve.slope) < 0.1


@pytest.mark.parametrize("name", ["augmentation", "masking"])
def test_samples_inside_the_inner_loss_shrink_the_bias_as_1_over_n(result, name):
    curve = getattr(result, name).inside
    assert -1.25 < curve.slope < -0.75
    assert all(bias > 4 * error for bias, error in zip(curve.bias, curve.error, strict=True))


def test_the_mse_to_fixed_targets_has_no_bias(result):
    assert result.regression < 1e-12
    assert regression_bias(*digits(30, 50, seed=3), seed=3) < 1e-12, "more images than features"


# what comes out


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    few = {"samples": (1, 2), "repetitions": 32}
    first, again, other = (theorem1(seed=seed, **few) for seed in (1, 1, 2))
    assert first == again
    assert first.masking.inside.bias != other.masking.inside.bias


def test_the_command_prints_the_numbers_and_writes_them_and_the_plot(capsys, tmp_path):
    main(["--out", str(tmp_path / "new"), "--seed", "1", "--samples", "1", "2", "--repetitions", "32"])
    result = theorem1(seed=1, samples=(1, 2), repetitions=32)
    assert capsys.readouterr().out.strip() == table(result)
    about = json.loads((tmp_path / "new" / "theorem1.json").read_text())
    assert about["masking"]["inside"] == {"samples": [1, 2], "bias": [*result.masking.inside.bias], "error": [*result.masking.inside.error]}
    assert about["slopes"]["augmentation"]["averaged"] == result.augmentation.averaged.slope
    assert (about["seed"], about["repetitions"]) == (1, 32) and len(about["commit"]) == 40
    assert Image.open(tmp_path / "new" / "theorem1.png").size[0] > 500


def test_the_plot_shows_all_three_in_both_cases(result, tmp_path):
    plot(result, tmp_path / "theorem1.png")
    picture = np.asarray(Image.open(tmp_path / "theorem1.png").convert("RGB")).astype(int)
    for side in np.array_split(picture, 2, axis=1):
        for colour in ((214, 39, 40), (31, 119, 180), (44, 160, 44)):  # averaged, inside, MSE
            assert (abs(side - colour).max(-1) < 10).sum() > 50


def test_a_slope_takes_two_numbers_of_samples_and_an_error_takes_repetitions():
    with pytest.raises(ConfigError, match=r"samples = \(4, 4\): a slope takes two numbers of samples"):
        theorem1(samples=(4, 4))
    with pytest.raises(ConfigError, match="repetitions = 8: a standard error takes 32 at least"):
        theorem1(repetitions=8)

"""The ridge head and its factorisation."""

from __future__ import annotations

import pytest
import torch

from krrst_dist.algorithm import RidgeError, meta_gradient, ridge_head, with_bias
from krrst_dist.algorithm.ridge import MORE_RIDGE, RETRIES, FeaturesError, ridge_system


def features(m: int, d: int = 12, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return with_bias(torch.randn(m, d, generator=torch.Generator().manual_seed(m), dtype=dtype))


@pytest.mark.parametrize("m", [1, 5, 13, 14, 60])
def test_the_head_is_that_of_both_systems_whichever_is_factorised(m):
    f, y = features(m), torch.randn(m, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ridge = 1e-6 * (f @ f.T).trace()
    dual = f.T @ torch.linalg.solve(f @ f.T + ridge * torch.eye(m, dtype=f.dtype), y)
    primal = torch.linalg.solve(f.T @ f + ridge * torch.eye(13, dtype=f.dtype), f.T @ y)
    head = ridge_head(f, y)
    assert head.shape == (13, 4)
    for expected in (dual, primal):
        assert (head - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("m", [5, 60])
def test_the_head_minimises_the_ridge_objective(m):
    """The gradient of |F W - Y|^2 + lambda |W|^2 vanishes at W: bias weighed like the rest."""
    f, y = features(m), torch.randn(m, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    head = ridge_head(f, y, ridge=1e-3)
    slope = f.T @ (f @ head - y) + 1e-3 * f.square().sum() * head
    assert slope.abs().max() < 1e-9


@pytest.mark.parametrize(("m", "dual"), [(13, True), (14, False)])
def test_the_smaller_system_is_factorised(m, dual):
    system = ridge_system(features(m, d=12))
    assert system.dual is dual and len(system.cholesky) == 13


def singular(m: int, d: int) -> torch.Tensor:
    """Features that are all alike: K has rank 1, and float32 rounding makes some of its eigenvalues negative."""
    return with_bias(torch.randn(1, d, generator=torch.Generator().manual_seed(3)).expand(m, d).contiguous())


@pytest.mark.parametrize("shape", [(64, 100), (100, 40)], ids=["dual", "primal"])
def test_a_failed_factorisation_is_retried_with_more_ridge_and_counted(shape):
    f = singular(*shape)
    system = ridge_system(f, ridge=1e-10)
    assert 1 <= system.retries <= RETRIES
    used = 1e-10 * MORE_RIDGE**system.retries
    gram = f @ f.T if system.dual else f.T @ f
    rebuilt = system.cholesky @ system.cholesky.T
    assert torch.allclose(rebuilt, gram + used * gram.trace() * torch.eye(len(gram)), atol=1e-5 * gram.trace().item())


def test_the_count_reaches_the_meta_gradient():
    x = singular(64, 108)[:, :-1].view(64, 3, 6, 6)
    y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert meta_gradient(lambda images: images.flatten(1), x, y, x, y, ridge=1e-10).retries >= 1


@pytest.mark.parametrize("shape", [(64, 100), (100, 40)], ids=["dual", "primal"])
def test_a_system_that_cannot_be_factorised_says_what_to_do(shape):
    with pytest.raises(RidgeError, match=r"raise the ridge \(distill.ridge = 1e-20\)"):
        ridge_system(singular(*shape), ridge=1e-20)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("m", [5, 60])
def test_features_that_are_not_finite_are_named_as_such(m, value):
    """1e30 is finite, but its square is not in float32."""
    f = features(m, dtype=torch.float32)
    f[2, 3] = value
    with pytest.raises(FeaturesError, match="not finite.*lower learning rate"):
        ridge_head(f, torch.zeros(m, 2))

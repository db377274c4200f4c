"""Kernel ridge regression from features to targets: the head that the outer loss is measured with.

Knows matrices only. The system that is factorised is the smaller of two with the same solution (METHOD 2):
the dual [m, m], K = F F^T, or the primal [d+1, d+1], P = F^T F.

Shapes: m synthetic images, d features, k target dimensions; F = [f, 1] is [m, d+1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MORE_RIDGE = 10.0  # factor on lambda after a failed factorisation
RETRIES = 5


class RidgeError(ArithmeticError):
    """The ridge system could not be factorised even with more ridge; says what to do."""


class FeaturesError(RidgeError):
    """The synthetic features are not finite: what they come from has diverged."""


def with_bias(features: Tensor) -> Tensor:
    """[n, d] -> [n, d+1]: a column of ones, whose weight is the bias (regularised like the rest)."""
    return torch.cat([features, features.new_ones(len(features), 1)], dim=1)


@dataclass(frozen=True)
class RidgeSystem:
    """F F^T + lambda I or F^T F + lambda I, factorised; lambda = ridge * trace(F F^T)."""

    features: Tensor  # F [m, d+1]
    cholesky: Tensor  # lower factor, [m, m] or [d+1, d+1]
    dual: bool
    ridge: float
    """lambda over trace(F F^T), with which the factorisation did not fail"""
    retries: int
    """factorisations that failed before this one"""

    def solve(self, right: Tensor) -> Tensor:
        """(K + lambda I)^-1 right, or (P + lambda I)^-1 right."""
        return torch.cholesky_solve(right, self.cholesky)


def ridge_system(f_syn: Tensor, ridge: float = 1e-6) -> RidgeSystem:
    """Build and factorise the smaller system for F = f_syn [m, d+1].

    A factorisation that fails is tried again with 10x the ridge, 5 times at most.

    Raises:
        FeaturesError: features that are not finite, or whose squares are not.
        RidgeError: not factorisable with 1e5 x the ridge.
    """
    dual = f_syn.shape[0] <= f_syn.shape[1]
    gram = f_syn @ f_syn.T if dual else f_syn.T @ f_syn  # [m, m] or [d+1, d+1]
    trace = gram.detach().diagonal().sum()  # lambda is a constant, under autograd too
    if not torch.isfinite(trace):
        raise FeaturesError("the synthetic features are not finite, or too large to compute with: their network or the images have "
                            "diverged; what did needs a lower learning rate")
    for attempt in range(RETRIES + 1):
        regularised = gram.clone()
        tried = ridge * MORE_RIDGE**attempt
        regularised.diagonal().add_(tried * trace)
        cholesky, failed = torch.linalg.cholesky_ex(regularised)
        if not failed:
            return RidgeSystem(f_syn, cholesky, dual, tried, retries=attempt)
    raise RidgeError(f"K + lambda I could not be factorised with lambda up to {ridge * MORE_RIDGE**RETRIES:g} trace(K): raise the ridge "
                     f"(distill.ridge = {ridge:g}), or look for features that are all alike")


def ridge_head(f_syn: Tensor, y_syn: Tensor, ridge: float = 1e-6) -> Tensor:
    """The ridge-regression head W on (F, Y_s): argmin |F W - Y_s|^2 + lambda |W|^2, lambda = ridge * trace(F F^T).

    f_syn: F [m, d+1], the column of ones included (`with_bias`). y_syn: [m, k]. Returns W [d+1, k].
    Raises RidgeError when the system cannot be factorised. (3.2; METHOD 2, steps 4-5)
    """
    system = ridge_system(f_syn, ridge)
    return f_syn.T @ system.solve(y_syn) if system.dual else system.solve(f_syn.T @ y_syn)

"""The outer loss of KRR-ST and its gradient with respect to X_s and Y_s, in closed form (METHOD 2).

Another loss of features takes the place of KRR-ST's as an `Objective`. Knows one model, one real batch and the synthetic set; nothing
of pools, optimisers or processes. Only the feature extractor is differentiated by autograd, as a vector-Jacobian product, image by
image, so that memory is bounded by `chunk_size` and not by m, and so that rows can be cut into slices for several processes.

Shapes: m synthetic, b real images, d features, k target dimensions; F = [f, 1] has d+1 columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from krrst_dist.algorithm.ridge import ridge_system, with_bias

Objective = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, int]]
"""(f_syn [m, d], y_syn [m, k], f_real [b, d], y_real [b, k], ridge) -> L, dL/df_syn, dL/dY_s, failed factorisations; under no_grad"""
TILE = 32 * 32 * 32
"""pixels that pass the network at once on a CPU where nothing is kept: a layer's output is then still in the cache for the next"""


@dataclass(frozen=True)
class MetaGradient:
    """One meta-gradient. loss: scalar; x: like x_syn; y: like y_syn; retries: factorisations that failed."""

    loss: Tensor
    x: Tensor
    y: Tensor
    retries: int


def meta_gradient(extractor: Callable[[Tensor], Tensor], x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor, *,
                  ridge: float = 1e-6, chunk_size: int | None = None, slices: int = 1, f_real: Tensor | None = None,
                  objective: Objective | None = None) -> MetaGradient:
    """L = mean((F_b W - Y_b)^2) with W the ridge head on (X_s, Y_s), and dL/dX_s, dL/dY_s. (Algorithm 1, eq. 6)

    extractor: images [n, C, H, W] -> features [n, d]; a module (or a method of one) is used in eval mode and left
    as it was found.
    x_syn [m, C, H, W], y_syn [m, k], x_real [b, C, H, W], y_real [b, k]. ridge: lambda / trace(K), lambda constant.
    chunk_size: images whose activations are held at once; None holds them all. slices: P, the images pass the extractor in that many
    parts, as where each is another process's. Both change rounding only.
    f_real: the real images' features, where they are known already (`real_features`).
    objective: another L; default: `ridge_objective`.

    Raises ValueError for shapes that do not fit, RidgeError when the ridge system cannot be factorised.
    """
    _check(x_syn, y_syn, x_real, y_real, chunk_size)
    if f_real is None:
        f_real = real_features(extractor, x_real, chunk_size=chunk_size, slices=slices)  # [b, d]
    parts = [Pullable(extractor, part, chunk_size) for part in cut(x_syn, slices)]
    loss, g_features, g_y, retries = head_gradient(torch.cat([part.features for part in parts]), y_syn, f_real, y_real, ridge, objective)
    x = [part.pull_back(g_part) for part, g_part in zip(parts, cut(g_features, slices), strict=True)]
    return MetaGradient(loss, torch.cat(x), g_y, retries)


def cut(rows: Tensor, slices: int) -> list[Tensor]:
    """[n, ...] -> P parts of about n / P rows, or n of one row where there are fewer."""
    return list(rows.tensor_split(max(1, min(slices, len(rows)))))


def real_features(extractor: Callable[[Tensor], Tensor], x_real: Tensor, *, chunk_size: int | None = None, slices: int = 1) -> Tensor:
    """Features [b, d] of x_real [b, C, H, W], as `meta_gradient` computes them."""
    with _evaluating(extractor):
        return torch.cat([_features(extractor, part, chunk_size) for part in cut(x_real, slices)])


def head_gradient(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: float,
                  objective: Objective | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(L, dL/df_syn, dL/dY_s, failed factorisations) of an objective, without a graph and in the features' own precision."""
    with torch.no_grad(), torch.autocast(f_syn.device.type, enabled=False):
        return (objective or ridge_objective)(f_syn, y_syn, f_real, y_real, ridge)


class Pullable:
    """Features [m, d] of synthetic images x [m, C, H, W], and the way back from dL/dfeatures to dL/dx."""

    def __init__(self, extractor: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None = None) -> None:
        self._extractor = extractor
        with _evaluating(extractor):
            self.features, self._pull_back = _features_and_pull_back(extractor, x, chunk_size)

    def pull_back(self, g: Tensor) -> Tensor:
        """dL/dfeatures [m, d] -> dL/dx. Once."""
        with _evaluating(self._extractor):
            return self._pull_back(g)


def ridge_objective(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """KRR-ST's: regression with a bias."""
    loss, g_features, g_y, retries = ridge_gradient(with_bias(f_syn), y_syn, with_bias(f_real), y_real, ridge)
    return loss, g_features[:, :-1], g_y, retries  # the last column is the constant 1


def ridge_gradient(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: float, *,
                   constant: bool = True) -> tuple[Tensor, Tensor, Tensor, int]:
    """(L, dL/dF_s [m, d], dL/dY_s [m, k], failed factorisations) for features F_s [m, d], F_b [b, d], of which the last may be ones.

    constant: lambda is a constant; else it is ridge * trace(F_s F_s^T) in the gradient, too (FRePo).
    """
    system = ridge_system(f_syn, ridge)
    if system.dual:
        a = system.solve(y_syn)  # A = (K + lambda I)^-1 Y_s [m, k]
        w = f_syn.T @ a  # W [d+1, k]
        loss, g = _outer_loss(f_real, y_real, w)
        v = system.solve(f_syn @ g)  # V [m, k] = dL/dY_s
        g_features = a @ (g - f_syn.T @ v).T - v @ w.T  # A G^T - (V A^T + A V^T) F_s, with F_s^T A = W
        if not constant:
            g_features -= 2 * system.ridge * (v * a).sum() * f_syn  # dL/dlambda = -<V, A>
        return loss, g_features, v, system.retries
    w = system.solve(f_syn.T @ y_syn)
    loss, g = _outer_loss(f_real, y_real, w)
    u = system.solve(g)  # U = P^-1 G [d+1, k]
    g_y = f_syn @ u  # [m, k]
    g_features = (y_syn - f_syn @ w) @ u.T - g_y @ w.T
    if not constant:
        g_features -= 2 * system.ridge * (u * w).sum() * f_syn  # dL/dlambda = -<U, W>
    return loss, g_features, g_y, system.retries


def _outer_loss(f_real: Tensor, y_real: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """L = mean((F_b W - Y_b)^2) and G = dL/dW [d+1, k]."""
    error = f_real @ w - y_real  # [b, k]
    return error.square().mean(), f_real.T @ error * (2 / error.numel())


def _features(extractor: Callable[[Tensor], Tensor], x: Tensor, chunk_size: int | None) -> Tensor:
    """Features [n, d] without a graph, in at least float32."""
    at_once = TILE // x.shape[2:].numel() if x.device.type == "cpu" else len(x)
    images = max(1, min(chunk_size or len(x), max(1, at_once)))
    with torch.no_grad():
        return torch.cat([_at_least_float32(extractor(part)) for part in x.split(images)])


def _features_and_pull_back(extractor: Callable[[Tensor], Tensor], x: Tensor,
                            chunk_size: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Features [m, d] and the map from dL/dfeatures to dL/dx. In chunks, the activations are computed anew."""

    def vector_jacobian(part: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            features = _at_least_float32(extractor(leaf))
        return features.detach(), lambda g: torch.autograd.grad(features, leaf, g)[0]

    if chunk_size is None or chunk_size >= len(x):
        return vector_jacobian(x)

    def pull_back(g: Tensor) -> Tensor:
        return torch.cat([vector_jacobian(part)[1](g_part) for part, g_part in zip(x.split(chunk_size), g.split(chunk_size), strict=True)])

    return _features(extractor, x, chunk_size), pull_back


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


@contextmanager
def _evaluating(extractor: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Eval mode and frozen parameters (no activation is kept for a weight's gradient) inside; as before outside."""
    network = getattr(extractor, "__self__", extractor)  # `network.features` stands for `network`
    if not isinstance(network, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in network.modules()]
    needs = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in needs:
            parameter.requires_grad_(required)


def _check(x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor, chunk_size: int | None) -> None:
    for x, y, name in ((x_syn, y_syn, "syn"), (x_real, y_real, "real")):
        if y.ndim != 2 or x.ndim != 4 or len(x) != len(y) or len(x) == 0:
            raise ValueError(f"x_{name} {tuple(x.shape)} and y_{name} {tuple(y.shape)} must be [n, C, H, W] and [n, k] with the same n > 0")
    if y_syn.shape[1] != y_real.shape[1]:
        raise ValueError(f"y_syn has {y_syn.shape[1]} target dimensions, y_real {y_real.shape[1]}: both come from one target model")
    if x_syn.shape[1:] != x_real.shape[1:]:
        raise ValueError(f"x_syn holds images of {tuple(x_syn.shape[1:])}, x_real of {tuple(x_real.shape[1:])}: they must be of one shape")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: at least 1 image, or None for all at once")

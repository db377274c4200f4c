"""Theorem 1 as an experiment: random views in the inner loss bias the meta-gradient, and the MSE to fixed targets does not.

The problem is as small as the theorem allows, so that nothing is approximated. A linear model W predicts one view of an
image from another, its minimiser W* has a closed form, and a finite set of views lets the expected loss be summed up:

    inner loss   mean over images and views of |W seen(x) - wanted(x)|^2, plus ridge |W|^2
    outer loss   L(W): the same on real images, over all views, without the ridge
    true         gradient of L(W*(X_s)), W* the minimiser of the inner loss over *all* views
    estimated    gradient of L(W_xi(X_s)), W_xi the minimiser of the inner loss over the views xi that were drawn

Knows nothing of networks, pools or files of images. Everything is float64.

Letters: m synthetic and b real images of p pixels [p], g views, n views drawn for each image, R minimisers W [p, p].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import combinations, product
from pathlib import Path
from statistics import linear_regression

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor

from krrst_dist import storage
from krrst_dist.algorithm import meta_gradient, with_bias
from krrst_dist.config import ConfigError
from krrst_dist.paths import resolve
from krrst_dist.provenance import revision
from krrst_dist.seeds import torch_rng

SIDE = 4  # pixels a side of an image
BATCHES = 32  # independent means whose spread is the standard error
AT_ONCE = 2000  # minimisers in memory


@dataclass(frozen=True)
class Views:
    """What the inner loss may draw for an image, each with the same chance; all are linear maps of its pixels.

    seen, wanted: [g, p, p]; the model predicts `wanted[i] @ x` from `seen[i] @ x`.
    """

    seen: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class Problem:
    """x_syn: X_s [m, p]. x_real: [b, p]. ridge: of the inner loss, a constant."""

    x_syn: Tensor
    x_real: Tensor
    views: Views
    ridge: float = 1.0


@dataclass(frozen=True)
class Curve:
    """How far the expectation of an estimator is from the true gradient, over the latter's norm.

    samples: n or N. bias: |mean of many estimates - true|. error: the norm of that mean's standard error; where the bias is
    not well above it, none was seen.
    """

    samples: tuple[int, ...]
    bias: tuple[float, ...]
    error: tuple[float, ...]

    @property
    def slope(self) -> float:
        """Of the straight line through log bias over log samples: -1 where the bias falls as 1/n."""
        return linear_regression(*(torch.tensor(values, dtype=torch.float64).log().tolist() for values in (self.samples, self.bias))).slope


@dataclass(frozen=True)
class Case:
    """averaged: the mean of N gradients, one view an image in each. inside: one gradient, n views an image in its inner loss."""

    averaged: Curve
    inside: Curve


@dataclass(frozen=True)
class Result:
    """regression: the relative difference of the package's own meta-gradient, for the MSE inner loss, from the true one."""

    augmentation: Case
    masking: Case
    regression: float
    seed: int
    repetitions: int


def theorem1(*, seed: int = 0, samples: Sequence[int] = (1, 4, 16, 64), repetitions: int = 1000) -> Result:
    """Measure the three inner losses. An estimate's expectation is the mean of `repetitions` of it, n times as many for n inside."""
    if len(set(samples)) < 2 or min(samples) < 1:
        raise ConfigError(f"samples = {tuple(samples)}: a slope takes two numbers of samples, each at least 1; take samples = 1 4 16 64")
    if repetitions < BATCHES:
        raise ConfigError(f"repetitions = {repetitions}: a standard error takes {BATCHES} at least; take repetitions = 1000")
    x_syn, x_real = digits(16, 500, seed=seed)
    cases = [_case(Problem(x_syn, x_real, views), samples, repetitions, seed, name)
             for name, views in (("augmentation", augmentations()), ("masking", masks()))]
    return Result(*cases, regression=regression_bias(x_syn, x_real, seed=seed), seed=seed, repetitions=repetitions)


def _case(problem: Problem, samples: Sequence[int], repetitions: int, seed: int, name: str) -> Case:
    def curve(kind: str, inside: bool) -> Curve:
        rngs = [torch_rng(seed, f"theorem 1, {name}, {kind}", n) for n in samples]
        found = [relative_bias(problem, n=n if inside else 1, draws=n * repetitions, rng=rng) for n, rng in zip(samples, rngs, strict=True)]
        return Curve(tuple(samples), *zip(*found, strict=True))

    return Case(curve("averaged", False), curve("inside", True))


# the problem


def digits(m: int, b: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Different real handwritten digits of 4x4 pixels, centred, with a variance of 1 on average: [m, 16] and [b, 16]."""
    images = torch.from_numpy(load_digits().images).double()  # [1797, 8, 8]
    x = torch.nn.functional.avg_pool2d(images, images.shape[-1] // SIDE).flatten(1)  # [1797, p]
    x = (x - x.mean(0)) / x.var(0).mean().sqrt()
    chosen = torch.randperm(len(x), generator=torch_rng(seed, "theorem 1, images"))[:m + b]
    return x[chosen[:m]], x[chosen[m:]]


def augmentations() -> Views:
    """One augmentation of an image from another: any pair of flip or not, and shift by half the width (cyclic) or not."""
    pixels = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    eye = torch.eye(SIDE * SIDE, dtype=torch.float64)
    group = [eye[turned.roll(shift, 1).flatten()] for turned in (pixels, pixels.flip(1)) for shift in (0, SIDE // 2)]
    seen, wanted = zip(*product(group, repeat=2), strict=True)
    return Views(torch.stack(seen), torch.stack(wanted))


def masks() -> Views:
    """The whole image from two of its four quarters, any two."""
    half = torch.arange(SIDE) // (SIDE // 2)
    quarter = (2 * half[:, None] + half).flatten()  # [p]
    seen = [torch.diag(torch.isin(quarter, torch.tensor(kept)).double()) for kept in combinations(range(4), 2)]
    return Views(torch.stack(seen), torch.eye(len(quarter), dtype=torch.float64).expand(len(seen), -1, -1))


def moments(views: Views, x: Tensor) -> Tensor:
    """All that the squared error depends on, by image and view: seen seen^T and wanted seen^T, over the number of images.

    x: [m, p]. Returns [m, g, 2, p, p].
    """
    seen, wanted = _seen_and_wanted(views, x)
    return torch.stack([torch.einsum("mgq,mgp->mgqp", view, seen) for view in (seen, wanted)], dim=2) / len(x)


def expected_moments(views: Views, x: Tensor) -> Tensor:
    """The same summed over the images and averaged over the views: [2, p, p]."""
    seen, wanted = (view.flatten(0, 1) for view in _seen_and_wanted(views, x))  # [m g, p]
    return torch.stack([seen.T @ seen, wanted.T @ seen]) / len(seen)


def _seen_and_wanted(views: Views, x: Tensor) -> list[Tensor]:
    return [torch.einsum("gqp,mp->mgq", maps, x) for maps in (views.seen, views.wanted)]


def inner_minimiser(sums: Tensor, ridge: float) -> Tensor:
    """W = (sum of wanted seen^T) (sum of seen seen^T + ridge I)^-1: [..., 2, p, p] -> [..., p, p]."""
    seen, cross = sums.unbind(-3)
    return torch.linalg.solve(seen + ridge * torch.eye(seen.shape[-1], dtype=seen.dtype), cross, left=False)


def outer_loss(w: Tensor, sums: Tensor) -> Tensor:
    """The squared error of W on the real images' moments [2, p, p], up to a constant: [..., p, p] -> [...]."""
    seen, cross = sums
    return (w @ seen * w - 2 * w * cross).sum((-2, -1))


# the gradients


def mean_loss(problem: Problem, x_syn: Tensor, shares: Tensor) -> Tensor:
    """The mean over R of L(W_r), W_r the minimiser of an inner loss on x_syn [m, p], in which each view of an image has a share.

    shares: [R, m, g], each image's adding up to 1. All of them 1/g, as `all_views` gives: the expected inner loss.
    """
    table = moments(problem.views, x_syn)  # [m, g, 2, p, p]
    sums = shares.flatten(1) @ table.flatten(0, 1).flatten(1)  # [R, 2 p p]
    w = inner_minimiser(sums.unflatten(1, table.shape[2:]), problem.ridge)  # [R, p, p]
    return outer_loss(w, expected_moments(problem.views, problem.x_real)).mean()


def mean_gradient(problem: Problem, shares: Tensor) -> Tensor:
    """The mean over R of the gradients of L(W_r(X_s)), [m, p]: the gradient of the mean."""
    x = problem.x_syn.clone().requires_grad_()
    return torch.autograd.grad(mean_loss(problem, x, shares), x)[0]


def all_views(problem: Problem) -> Tensor:
    """The shares [1, m, g] of the expected inner loss."""
    g = len(problem.views.seen)
    return torch.full((1, len(problem.x_syn), g), 1 / g, dtype=torch.float64)


def true_gradient(problem: Problem) -> Tensor:
    """Of L(W*(X_s)), W* the minimiser of the expected inner loss: [m, p]."""
    return mean_gradient(problem, all_views(problem))


def draw(problem: Problem, *, n: int, repetitions: int, rng: torch.Generator) -> Tensor:
    """The shares [R, m, g] of inner losses that each draw n views for each image, with replacement."""
    m, g = len(problem.x_syn), len(problem.views.seen)
    drawn = torch.randint(g, (repetitions, m, n), generator=rng)
    return torch.zeros(repetitions, m, g, dtype=torch.float64).scatter_add_(2, drawn, torch.full(drawn.shape, 1 / n, dtype=torch.float64))


def relative_bias(problem: Problem, *, n: int, draws: int, rng: torch.Generator) -> tuple[float, float]:
    """Bias of the gradient with n views an image in its inner loss, and its standard error (see `Curve`), from that many gradients."""
    size = min(AT_ONCE, draws // BATCHES)
    means = torch.stack([mean_gradient(problem, draw(problem, n=n, repetitions=size, rng=rng)) for _ in range(draws // size)])
    true = true_gradient(problem)
    error = (means.var(0).sum() / len(means)).sqrt()
    return float((means.mean(0) - true).norm() / true.norm()), float(error / true.norm())


def regression_bias(x_syn: Tensor, x_real: Tensor, *, seed: int, ridge: float = 1e-3) -> float:
    """For the inner loss |W f(x) - y|^2 + lambda |W|^2 with targets y: how far `meta_gradient` is from the true gradient, relatively.

    The features are the pixels. The true gradient, for X_s [m, p] and Y_s [m, k] together, is autograd's through the normal equations.
    """
    weights = torch.randn(2, x_syn.shape[1], x_syn.shape[1], dtype=torch.float64, generator=torch_rng(seed, "theorem 1, target"))

    def target(x: Tensor) -> Tensor:
        return torch.tanh(x @ weights[0] / 4) @ weights[1]  # [n, p] -> [n, k]

    x, y = (leaf.clone().requires_grad_() for leaf in (x_syn, target(x_syn)))
    f = with_bias(x)  # [m, p+1]
    gram = f.T @ f
    w = torch.linalg.solve(gram + ridge * gram.detach().trace() * torch.eye(len(gram), dtype=torch.float64), f.T @ y)
    loss = (with_bias(x_real) @ w - target(x_real)).square().mean()
    true = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (x, y))])

    as_images = [images.reshape(-1, 1, SIDE, SIDE) for images in (x_syn, x_real)]
    ours = meta_gradient(lambda images: images.flatten(1), as_images[0], target(x_syn), as_images[1], target(x_real), ridge=ridge)
    return float((torch.cat([ours.x.flatten(), ours.y.flatten()]) - true).norm() / true.norm())


# what is shown


def table(result: Result) -> str:
    """The curves as text."""
    lines = [f"{'inner loss':<14}{'estimator':<26}{'samples':>8}{'bias':>11}  standard error"]
    for name, case in _cases(result):
        for kind, curve in (("mean of N gradients", case.averaged), ("n samples in one loss", case.inside)):
            lines += [f"{name:<14}{kind:<26}{n:>8}{bias:>11.5f}  {error:.5f}"
                      for n, bias, error in zip(curve.samples, curve.bias, curve.error, strict=True)]
            lines += [f"{name:<14}{kind:<26}{'slope':>8}{curve.slope:>11.2f}"]
    lines += [f"{'MSE':<14}{'none are drawn':<26}{'':>8}{result.regression:>11.1e}"]
    return "\n".join([*lines, f"bias: over the true gradient's norm; seed {result.seed}, {result.repetitions} repetitions a sample"])


def plot(result: Result, path: str | Path) -> None:
    """Write both cases side by side, each with the MSE inner loss, as a PNG. path: file or URI."""
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set_ylabel("bias of the meta-gradient / its norm")
    for axes, (name, case) in zip((left, right), _cases(result), strict=True):
        _draw_case(axes, case, result.regression)
        axes.set_title(name, fontsize=10)
    seen = [bias for _, case in _cases(result) for bias in (*case.averaged.bias, *case.inside.bias)]
    floor = 10.0 ** math.floor(math.log10(min(seen)))
    left.set_yscale("symlog", linthresh=floor, linscale=0.5)  # logarithmic above `floor`, and shows 0
    left.set_ylim(-0.2 * floor, 3 * max(seen))
    left.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="center left", bbox_to_anchor=(0, 0.25))
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    storage.write_whole(path, buffer.getvalue())


def _cases(result: Result) -> tuple[tuple[str, Case], ...]:
    return ("augmentation", result.augmentation), ("masking", result.masking)


def _draw_case(axes: Axes, case: Case, regression: float) -> None:
    curves = ((case.averaged, "mean of N gradients, one sample each", "C3"), (case.inside, "n samples in one inner loss", "C0"))
    for curve, label, colour in curves:
        axes.errorbar(curve.samples, curve.bias, curve.error, color=colour, marker="o", markersize=4, capsize=3, label=label)
    n = case.inside.samples
    axes.plot(n, [case.inside.bias[-1] * n[-1] / k for k in n], color="C0", linestyle=":", linewidth=1, label="1/n")
    axes.plot(n, [regression] * len(n), color="C2", linewidth=2, label=f"MSE to targets: {regression:.0e}")
    axes.set_xscale("log")
    axes.set_xticks(n, [str(k) for k in n])
    axes.minorticks_off()
    axes.set_xlabel("samples, n or N")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: list[str]) -> None:
    """`krrst theorem1 --out FOLDER [--seed --samples --repetitions]`."""
    tyro.cli(_run, args=arguments, prog="krrst theorem1")


def _run(*, out: str, seed: int = 0, samples: tuple[int, ...] = (1, 4, 16, 64), repetitions: int = 1000) -> None:
    """Theorem 1 on a small problem: does averaging gradients, or drawing more views inside the loss, remove the bias?

    Prints a table and writes theorem1.png and theorem1.json. Takes about ten seconds of one core.

    Args:
        out: folder or URI for the two files.
        seed: of the images and the draws.
        samples: the numbers n and N.
        repetitions: estimates averaged at one sample; n times as many at n.
    """
    folder = resolve(out, name="--out")
    result = theorem1(seed=seed, samples=samples, repetitions=repetitions)
    print(table(result))
    plot(result, storage.join(folder, "theorem1.png"))
    slopes = {name: {"averaged": case.averaged.slope, "inside": case.inside.slope} for name, case in _cases(result)}
    about = asdict(result) | {"slopes": slopes} | revision()._asdict()
    storage.write_whole(storage.join(folder, "theorem1.json"), json.dumps(about, indent=2).encode())

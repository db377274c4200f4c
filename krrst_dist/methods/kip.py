"""KIP: kernel inducing points (Nguyen, Chen and Lee, 2021; Nguyen, Novak, Xiao and Lee, 2021; BASELINES 7).

Kernel ridge regression on the synthetic images, with the tangent kernel of an infinitely wide network, is to predict the classes of
real images. No network is trained or drawn: X_s, and Y_s if it is learned, follow the gradient of that one loss, by Adam. Images are
neither whitened (ZCA) nor augmented, which the paper that this package follows leaves out, too.

Of S shards each predicts its own part of the real batch, and each computes K_ss of all synthetic images for itself: that part of the
work is done S times, which matters where m is not small beside batch / S. S changes rounding only.

What it costs at the published size (m = 1000, batch 5000, conv, 32 px): a step needs 5.5 million image pairs, each of them twice and
differentiated once. A pair takes about 50 ms of an AVX-512 core (23 ms without the extra convolution), so that a step takes 76 core hours
and 1000 steps 76,000; the authors had large clusters. Memory is no obstacle: 0.1 GB for matrices and 0.3 GB for a block. What fits two
cores is a fully connected kernel, or a convolutional one of small images, as in the presets cifar100-cpu and quickstart: stand-ins of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from pydantic import Field
from torch import Tensor

from krrst_dist import seeds
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.algorithm.contribution import mean
from krrst_dist.algorithm.ntk import Architecture, Convolutional, FullyConnected, ntk, ntk_pull_back
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError, MethodSettings, Positive
from krrst_dist.data.stream import centred
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.protocol import Method, Read, Stateless
from krrst_dist.methods.common.source import Source


class KIPSettings(MethodSettings):
    """The published values for CIFAR-100, 10 images a class, labels fixed. None is published for another source of ours."""

    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 1000
    """outer steps; the set that DC-BENCH evaluates has had as many, the authors' longest runs 50,000"""
    kernel: Literal["conv", "fc"] = "conv"
    """the infinitely wide network: convolutional, or fully connected as in the authors' notebook"""
    depth: Positive = 3
    """conv: convolutions with a pool; fc: hidden layers (1 in the notebook)"""
    extra_convolution: bool = True
    """a convolution without a pool before those with one: ConvNet; without it: ConvNet3 (conv only)"""
    batch: Positive = 5000
    """real images a step, over all shards, equally many of each class; all of a class that has fewer"""
    lr: Annotated[float, Field(gt=0)] = 0.04
    """Adam's learning rate for X_s, in the normalised space, and for Y_s"""
    learn_labels: bool = False
    """learn Y_s, too, or keep each image's own class"""
    ridge: Annotated[float, Field(gt=0)] = 1e-6
    """lambda over the mean of K_ss's diagonal, which is differentiated"""
    pretrain_steps: Positive = 10_000
    """steps of 500 images that networks are pre-trained for on the set: a part of its recipe"""
    block: Positive = 2**20
    """numbers of a kernel's layer that are computed at once, at least those of a pair of images; bounds memory, changes rounding only.
    Ours"""

    def architecture(self) -> Architecture:
        """The network of the kernel."""
        if self.kernel == "fc":
            return FullyConnected(self.depth)
        return Convolutional((False,) * self.extra_convolution + (True,) * self.depth)


def kip_loss(k_ss: Tensor, k_st: Tensor, y_syn: Tensor, y_real: Tensor, ridge: float = 1e-6) -> Tensor:
    """Half the mean squared error, over images and classes, of kernel ridge regression on the synthetic images; a scalar.

    k_ss: [m, m]; k_st: [m, b]; y_syn: [m, C]; y_real: [b, C]. ridge: lambda over trace(K_ss) / m, differentiable.
    Raises torch.linalg.LinAlgError where K_ss + lambda I is not positive definite.
    """
    regularised = k_ss + ridge * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    weights = torch.cholesky_solve(y_syn, torch.linalg.cholesky(regularised))  # [m, C]
    return 0.5 * (k_st.T @ weights - y_real).square().mean()


def kip_gradient(architecture: Architecture, x_syn: Tensor, y_syn: Tensor, x_real: Tensor, y_real: Tensor, *, ridge: float = 1e-6,
                 block: int = 2**20, alive: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor, Tensor]:
    """(L, dL/dX_s, dL/dY_s). Kernel matrices are held, their layers only for a block at a time. Raises LinAlgError."""
    work = {"block": block, "alive": alive}
    k_ss, k_st = ntk(architecture, x_syn, **work), ntk(architecture, x_syn, x_real, **work)
    leaves = [value.detach().requires_grad_() for value in (k_ss, k_st, y_syn)]
    loss = kip_loss(*leaves, y_real, ridge)
    g_ss, g_st, g_y = torch.autograd.grad(loss, leaves)
    g_x = ntk_pull_back(architecture, x_syn, g_ss, **work) + ntk_pull_back(architecture, x_syn, g_st, x_real, **work)
    return loss.detach(), g_x, g_y


class KIPPart(Stateless):
    """Its part of every step's real batch. Nothing is left between steps."""

    def __init__(self, config: Config, source: Source, start: DistilledSet, index: int, device: torch.device) -> None:
        super().__init__(index)
        self._config, self._settings, self._source, self._device = config, config.distill, source, device
        self._y = torch.from_numpy(start.y_syn)
        self._architecture = config.distill.architecture()

    def rows(self, step: int) -> np.ndarray:
        """Places of its real images of a step in the training part, int64 [b]."""
        seed, classes = self._config.seed, self._source.classes
        wanted = real_images.shares(self._settings.batch, len(classes), seeds.derive(seed, "classes of a batch", step))
        chosen = [members[seeds.numpy_rng(seed, "real of class", label, step).permutation(len(members))[:count]]
                  for label, (members, count) in enumerate(zip(classes, wanted, strict=True))]
        return np.concatenate(chosen)[self.index::self._settings.shards]

    def contribute(self, step: int, x_syn: Tensor, *learned: Tensor) -> Contribution:
        """The gradient with respect to X_s, and Y_s where it is learned, computed in float64. Raises DivergedError."""
        settings, rows = self._settings, self.rows(step)
        (y_syn,) = learned or (self._y,)
        x_real, y_real = self._source.training_images(rows), torch.from_numpy(centred(self._source.labels[rows], len(self._source.classes)))
        try:
            loss, *gradients = kip_gradient(
                self._architecture, *(value.to(self._device, torch.float64) for value in (x_syn, y_syn, x_real, y_real)),
                ridge=settings.ridge, block=settings.block, alive=self.alive)
        except torch.linalg.LinAlgError:
            raise DivergedError(f"update {step}, shard {self.index}: K_ss + lambda I is not positive definite: X_s is not finite, or has "
                                f"images that are alike. The learning rate is too high (distill.lr = {settings.lr:g}), or distill.ridge = "
                                f"{settings.ridge:g} too low") from None
        if not all(value.isfinite().all() for value in (loss, *gradients)):
            raise DivergedError(f"update {step}, shard {self.index}: loss {loss.item():g}, or its gradient, is not finite; the learning "
                                f"rate is too high (distill.lr = {settings.lr:g})")
        return Contribution(loss.item(), tuple(g.to(x_syn.dtype) for g in gradients[:1 + len(learned)]), len(rows))


class KIP(Method):
    """Kernel inducing points. Its set has soft labels: the classes, centred, or what has been learned from them."""

    title = "KIP"
    settings = KIPSettings
    combine = staticmethod(mean)

    def needs_labels(self, settings: MethodSettings) -> bool:
        """It predicts them."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, two classes, one for each class, a real image for every shard, a resolution that can be pooled, float32.

        Raises ConfigError.
        """
        settings, resolution = config.distill, config.source.resolution
        real_images.check_enough(config, training, classes)
        real_images.check_several_classes(config, classes, self.title)
        if classes is not None and settings.m < len(classes):
            raise ConfigError(f"distill.m = {settings.m}: KIP starts with real images of each of the {len(classes)} classes; take at least "
                              f"{len(classes)}")
        there = sum(min(images, max(1, settings.batch // len(classes))) for images in classes) if classes else settings.batch
        if min(settings.batch, there) < settings.shards:
            raise ConfigError(f"distill.shards = {settings.shards}: each predicts its own real images, and a step has "
                              f"{min(settings.batch, there)} (distill.batch = {settings.batch}); lower it")
        multiple = 2**settings.depth
        if settings.kernel == "conv" and resolution % multiple:
            raise ConfigError(f"source.resolution = {resolution}: {settings.depth} pools take a multiple of {multiple}; change it, lower "
                              f"distill.depth, or take distill.kernel = fc")
        if config.engine.precision != "float32":
            raise ConfigError(f"engine.precision = {config.engine.precision!r}: KIP computes in float64, whatever it is; leave it out")

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images of each class."""
        rows = real_images.balanced(config, source)
        x, y = source.training_images(rows).contiguous().numpy(), centred(source.labels[rows], len(source.classes))
        return DistilledSet(x, y, "soft", real_images.soft_recipe(config.distill.pretrain_steps), source.space, source.class_names)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """Adam with a constant learning rate."""
        settings = config.distill
        values = {"x_syn": torch.from_numpy(start.x_syn)} | ({"y_syn": torch.from_numpy(start.y_syn)} if settings.learn_labels else {})
        return Outer(values, lr=dict.fromkeys(values, settings.lr), optimizer=torch.optim.Adam)

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read | None = None,
             device: torch.device | str = "cpu") -> KIPPart:
        """Shard `index`."""
        return KIPPart(config, source, start, index, torch.device(device))


METHOD = KIP()

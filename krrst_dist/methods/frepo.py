"""FRePo: distillation by neural feature regression with pooling (Zhou, Nezhadarya and Ba, 2022; BASELINES 6).

KRR-ST's pool, ridge regression and shards with class labels for targets. What differs is said here: no bias in the regression, and a
ridge that is differentiated; a loss that keeps each label's largest entry apart from the next; members that start untrained, train by Adam
and are replaced sooner; LAMB on X_s and Y_s. Images are normalised and not whitened (ZCA), as KRR-ST's authors ran it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import tyro
from pydantic import Field, model_validator
from torch import Tensor, nn

from krrst_dist import networks
from krrst_dist.algorithm import ModelPool, Outer, Shard
from krrst_dist.algorithm.contribution import Contribution, mean
from krrst_dist.algorithm.lamb import Lamb
from krrst_dist.algorithm.meta_gradient import ridge_gradient
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError, MethodSettings, NetworkSettings, Positive, Settings
from krrst_dist.data.stream import centred
from krrst_dist.methods.common import real_images
from krrst_dist.methods.common.class_wise import check_network
from krrst_dist.methods.common.protocol import Method, Read
from krrst_dist.methods.common.source import Source

FLOOR = 0.1  # the learning rate's last value over its first


class FRePoPool(Settings):
    """The pool of networks."""

    network: NetworkSettings = NetworkSettings(widths=(128, 256, 512), norm_before=True)
    """published for 32 px; a fourth width of 1024 for 64 px"""
    size: Positive = 10
    """networks a shard"""
    max_steps: Positive = 100
    """a network is replaced after more steps than that; at the start network i counts i / size of them, untrained"""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Adam's"""
    batch: Positive = 1000
    """synthetic images of a training step, at random, where there are more"""


class FRePoSettings(MethodSettings):
    """The published values for CIFAR-100, 10 images a class. How many steps KRR-ST's authors ran is not known."""

    m: Annotated[int, Field(ge=2)] = 1000
    """synthetic images; batch norm in the pool's networks cannot be trained on a single one"""
    batch: Positive = 1024
    """real images an outer step, over all shards"""
    updates: Annotated[Positive, tyro.conf.arg(aliases=("--updates",))] = 500_000
    """outer steps"""
    lr_x: Annotated[float, Field(gt=0)] = 3e-4
    """LAMB's learning rate for X_s, in the normalised space; a cosine takes it to a tenth"""
    lr_y: Annotated[float, Field(gt=0)] = 3e-4
    """LAMB's learning rate for Y_s"""
    ridge: Annotated[float, Field(gt=0)] = 1e-6
    """lambda over the mean of K_ss's diagonal, which is differentiated"""
    flip: bool = False
    """each synthetic image counts mirrored, too; published where there is one of each class (CIFAR-100, TinyImageNet)"""
    chunk_size: Positive | None = None
    """synthetic images whose activations are held at once; bounds memory, changes rounding only"""
    pretrain_steps: Positive = 10_000
    """steps of 500 images that networks are pre-trained for on the set: a part of its recipe"""
    pool: FRePoPool = FRePoPool()

    @model_validator(mode="after")
    def _batch_splits_evenly(self) -> FRePoSettings:
        if self.batch % self.shards:
            raise ValueError(f"batch = {self.batch} is not a multiple of shards = {self.shards}: every shard reads batch / shards images; "
                             f"take batch = {max(1, round(self.batch / self.shards)) * self.shards}")
        return self


def label_margin_loss(y: Tensor) -> Tensor:
    """Mean over images of -min(largest - second largest entry, 1 / C): y [m, C] -> scalar, at least -1 / C."""
    top = y.topk(2, dim=1).values
    return -(top[:, 0] - top[:, 1]).clamp(max=1 / y.shape[1]).mean()


def frepo_objective(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Half the squared error of ridge regression, summed over classes, mean over images, plus the label margin loss: an `Objective`."""
    scale = y_syn.shape[1] / 2  # ridge_gradient's loss is a mean over classes
    loss, g_features, g_y, retries = ridge_gradient(f_syn, y_syn, f_real, y_real, ridge / len(f_syn), constant=False)
    with torch.enable_grad():
        leaf = y_syn.detach().requires_grad_()
        margin = label_margin_loss(leaf)
        (g_margin,) = torch.autograd.grad(margin, leaf)
    return scale * loss + margin.detach(), scale * g_features, scale * g_y + g_margin, retries


def member_loss(predicted: Tensor, y: Tensor) -> Tensor:
    """What the pool's networks train on: half the squared error, summed over classes, mean over images; a scalar."""
    return 0.5 * (predicted - y).square().sum(1).mean()


def lecun_normal(module: nn.Module) -> None:
    """The start of flax: weights of variance 1 / fan-in, cut at two deviations, no biases; batch norm's statistics follow fast."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = 1 / math.sqrt(layer.weight[0].numel()) / 0.87962566103423978  # of a normal that is cut there
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.9  # the new statistics' share


class FRePoShard(Shard):
    """KRR-ST's shard, to which each synthetic image may count as two: itself and its mirror image."""

    def warm_up(self, x_syn: Tensor, y_syn: Tensor) -> None:
        super().warm_up(*_mirrored(x_syn, y_syn))

    def contribute(self, step: int, x_syn: Tensor, y_syn: Tensor) -> Contribution:
        part = super().contribute(step, *_mirrored(x_syn, y_syn))
        (x, x_mirrored), (y, y_mirrored) = (g.chunk(2) for g in part.gradients)
        return Contribution(part.loss, (x + x_mirrored.flip(3), y + y_mirrored), part.images, part.retries)

    def advance(self, step: int, x_syn: Tensor, y_syn: Tensor) -> None:
        super().advance(step, *_mirrored(x_syn, y_syn))


def _mirrored(x_syn: Tensor, y_syn: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x_syn, x_syn.flip(3)]), torch.cat([y_syn, y_syn])


class FRePo(Method):
    """Feature regression with pooling, on classes."""

    title = "FRePo"
    settings = FRePoSettings
    combine = staticmethod(mean)

    def needs_labels(self, settings: MethodSettings) -> bool:
        """It regresses them."""
        return True

    def check(self, config: Config, *, training: int, classes: Sequence[int] | None) -> None:
        """Enough images, two classes, a batch for every shard, a network that takes the resolution, float32. Raises ConfigError."""
        settings = config.distill
        real_images.check_enough(config, training, classes)
        real_images.check_several_classes(config, classes, self.title)
        owned, asked = training // settings.shards, settings.batch // settings.shards
        if asked > owned:
            raise ConfigError(f"distill.batch = {settings.batch}: each of the {settings.shards} shard(s) reads {asked} images a batch but "
                              f"owns {owned}; lower distill.batch to at most {owned * settings.shards}")
        check_network(config.model_copy(update={"distill": settings.pool}), self.title)
        if config.engine.precision != "float32":
            raise ConfigError(f"engine.precision = {config.engine.precision!r}: FRePo computes in float32 alone; leave it out")

    def start(self, config: Config, source: Source, read: Read | None = None) -> DistilledSet:
        """Random real images of each class; Y_s = (one-hot - 1 / C) / sqrt(C / 10)."""
        rows, classes = real_images.balanced(config, source), len(source.classes)
        x, y = source.training_images(rows).contiguous().numpy(), centred(source.labels[rows], classes) / math.sqrt(classes / 10)
        recipe = real_images.soft_recipe(config.distill.pretrain_steps)
        return DistilledSet(x, y.astype("float32"), "soft", recipe, source.space, source.class_names)

    def outer(self, config: Config, start: DistilledSet, *, horizon: int) -> Outer:
        """LAMB; its learning rate follows a cosine to a tenth."""
        def cosine(step: int) -> float:
            return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * min(step, horizon) / horizon)) / 2

        return Outer({"x_syn": torch.from_numpy(start.x_syn), "y_syn": torch.from_numpy(start.y_syn)},
                     lr={"x_syn": config.distill.lr_x, "y_syn": config.distill.lr_y}, optimizer=Lamb, schedule=cosine)

    def part(self, config: Config, source: Source, start: DistilledSet, index: int, *, read: Read | None = None,
             device: torch.device | str = "cpu") -> Shard:
        """Logical shard `index`: its pool of fresh networks and its reader."""
        settings, network, classes = config.distill, config.distill.pool.network, len(source.classes)

        def fresh_model() -> nn.Module:
            model = networks.with_head(networks.build(network.name, resolution=config.source.resolution, **network.options()), classes)
            lecun_normal(model)
            return model.to(device, memory_format=torch.channels_last)

        pool = ModelPool(fresh_model, size=settings.pool.size, max_steps=settings.pool.max_steps + 1, ages="counted", loss=member_loss,
                         optimizer=partial(torch.optim.Adam, lr=settings.pool.lr), batch=settings.pool.batch, seed=config.seed,
                         shard=index)
        kind = FRePoShard if settings.flip else Shard
        return kind(index, pool, source.batches("class", config, index, device=device), ridge=settings.ridge,
                    chunk_size=settings.chunk_size, device=device, objective=frepo_objective)


METHOD = FRePo()

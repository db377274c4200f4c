"""Pre-training: a fresh network trained on a small set of images, with their labels or by a self-supervised loss.

What a distilled set is for. The set says by itself how it is trained on: the kind of its labels gives the loss and the
head, its recipe the rest. Everything is in memory; knows no data set and no method.

Letters: m images [C, H, W], k target dimensions (or classes), d features.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.algorithm.barlow_twins import barlow_twins, projector
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.augment import ssl_pair
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import ConfigError, NetworkSettings, PretrainSettings
from krrst_dist.evaluation.training import Loss, Watch, optimizer_of, shuffled_batches, train
from krrst_dist.networks import Headed, Network
from krrst_dist.recipes import OFF_DIAGONAL, PROJECTOR


def soft_label_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the squared error, summed over the classes, averaged over the images (REFERENCE 4). outputs, labels: [b, c]."""
    return (outputs - labels).square().sum(1).mean() / 2


def pair_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """Barlow Twins of outputs [2 b, p]: the first views of all images, then their second ones. There are no labels."""
    return barlow_twins(*outputs.chunk(2), OFF_DIAGONAL)


LOSSES: dict[str, Loss] = {"features": F.mse_loss, "soft": soft_label_loss, "class": F.cross_entropy}
"""by the kind of a set's labels"""


def fresh(settings: NetworkSettings, *, resolution: int, channels: int, outputs: int, seed: int) -> Headed:
    """The untrained network, with a linear head, that `pretrain` starts from.

    The network's weights depend on the settings and the seed alone, not on `outputs`.
    Raises ConfigError for an unknown network, or a resolution it cannot take.
    """
    with seeds.seeded(seed, "pretrain weights"):
        network = networks.build(settings.name, resolution=resolution, channels=channels, **settings.options())
        return networks.with_head(network, outputs)


def pretrain_on(distilled: DistilledSet, settings: NetworkSettings, recipe: PretrainSettings, *, seed: int,
                device: torch.device | str = "cpu", watch: Watch | None = None) -> Network:
    """Pre-train on a distilled set, by the loss that its labels, or their absence, ask for."""
    x = torch.tensor(distilled.x_syn)
    if distilled.label_kind == "none":
        return pretrain_unlabelled(settings, x, distilled.space, recipe, seed=seed, device=device, watch=watch)
    return pretrain(settings, x, torch.tensor(distilled.y_syn), recipe, seed=seed, device=device, loss=LOSSES[distilled.label_kind],
                    outputs=head_width(distilled), watch=watch)


def head_width(distilled: DistilledSet) -> int:
    """Outputs of the linear head that is trained on a set with labels: k, or the number of classes."""
    if distilled.label_kind != "class":
        return distilled.y_syn.shape[1]
    return max(int(distilled.y_syn.max()) + 1, len(distilled.class_names or ()))


def pretrain(settings: NetworkSettings, x: Tensor, y: Tensor, recipe: PretrainSettings, *, seed: int,
             device: torch.device | str = "cpu", loss: Loss = F.mse_loss, outputs: int | None = None,
             watch: Watch | None = None) -> Network:
    """Train a fresh network on (X_s, Y_s) for `recipe.steps` optimiser steps (METHOD 3).

    x: [m, C, H, W] float32, used as it is (DESIGN, Spaces). y: [m, k] float32, or what `loss` takes.
    outputs: width of the head; default k. Returns the network without its head, on `device`, in eval mode; the
    same for the same arguments, on one kind of processor.
    Raises ConfigError for a network that does not fit, ValueError where x and y differ in number, DivergedError where
    `watch` is given and the loss is not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"x holds {len(x)} images but y {len(y)} targets: pre-training takes one target an image; "
                         f"give both from the same distilled set")
    _, channels, _, resolution = x.shape
    model = fresh(settings, resolution=resolution, channels=channels, outputs=outputs or y.shape[1], seed=seed)
    model = model.to(device, memory_format=torch.channels_last)
    batches = _batches(x.to(device), y.to(device), recipe, seed)
    train(model, islice(batches, recipe.steps), loss, *optimizer_of(model, recipe), watch=watch)
    return model.network.eval()


def pretrain_unlabelled(settings: NetworkSettings, x: Tensor, space: Space, recipe: PretrainSettings, *, seed: int,
                        device: torch.device | str = "cpu", watch: Watch | None = None) -> Network:
    """Train a fresh network, with a projector, on images x [m, 3, H, W] of `space` alone: Barlow Twins on two views of each.

    Both views pass at once, so batch norm's statistics are common to them. For what comes back, and what else is raised, see `pretrain`.
    Raises ConfigError for fewer than 2 images, or images without 3 channels.
    """
    m, channels, _, resolution = x.shape
    if m < 2 or channels != 3:
        raise ConfigError(f"a set without labels of {m} image(s) with {channels} channel(s): its loss correlates over images and changes "
                          f"their colours; it takes at least 2 images of 3 channels")
    network = fresh(settings, resolution=resolution, channels=channels, outputs=1, seed=seed).network
    with seeds.seeded(seed, "pretrain projector"):
        model = nn.Sequential(network, projector(network.feature_dim, PROJECTOR))
    model = model.to(device, memory_format=torch.channels_last)
    scale, offset = (torch.from_numpy(values).to(device) for values in (space.scale(), space.offset()))
    batches = in_pairs(_batches(x.to(device), x.new_empty(m, 0).to(device), recipe, seed), scale=scale, offset=offset, seed=seed)
    train(model, islice(batches, recipe.steps), pair_loss, *optimizer_of(model, recipe), watch=watch)
    return network.eval()


def _batches(x: Tensor, y: Tensor, recipe: PretrainSettings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = shuffled_batches(x.to(memory_format=torch.channels_last), y, batch=recipe.batch, seed=seed)
    return augmented(batches, seed=seed) if recipe.augment == "dsa" else batches


def augmented(batches: Iterator[tuple[Tensor, Tensor]], *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with DSA's augmentation: one operation a batch, other parameters for every image."""
    for step, (x, y) in enumerate(batches):
        yield diff_augment(x, seed=seeds.derive(seed, "training augmentation", step)), y


def in_pairs(batches: Iterator[tuple[Tensor, Tensor]], *, scale: Tensor, offset: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches with the first views of all images followed by their second ones, [2 b, 3, H, W]. See `two_normalised_views`."""
    for step, (x, y) in enumerate(batches):
        pair = ssl_pair.two_normalised_views(x, seeds.torch_rng(seed, "training views", step), scale=scale, offset=offset)
        yield torch.cat(pair).contiguous(memory_format=torch.channels_last), y

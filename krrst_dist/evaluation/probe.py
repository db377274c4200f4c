"""Linear probes: how much a frozen network's features say about labels it never saw.

Takes uint8 images and labels that are already in memory; knows no data set and nothing of how the network was
trained. The row "from scratch" is the same probe on the untrained network that pre-training starts from
(`pretrain.fresh`).

Letters: n images [C, H, W], d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist import seeds
from krrst_dist.config import ProbeSettings
from krrst_dist.data.normalise import normalise
from krrst_dist.evaluation.labelled import LabelledImages, check_labels, few_label_subset
from krrst_dist.evaluation.training import Watch, shuffled_batches, train
from krrst_dist.networks import Network


def probes(network: Network, data: LabelledImages, recipe: ProbeSettings, *, few_labels: Sequence[float] = (),
           seed: int) -> dict[float, float]:
    """Test accuracy in [0, 1] by the fraction of training labels used: 1.0, and each of `few_labels`.

    The network is used as it is, on its own device: put it in eval mode first.
    """
    train_f = extract(network, data.train_images, mean=data.mean, std=data.std)
    test_f = extract(network, data.test_images, mean=data.mean, std=data.std)
    accuracy = {}
    for fraction in (1.0, *few_labels):
        chosen = few_label_subset(data.train_labels, fraction, seed)
        accuracy[fraction] = linear_probe(train_f[chosen], data.train_labels[chosen], test_f, data.test_labels,
                                          classes=data.classes, recipe=recipe, seed=seed,
                                          device=next(network.parameters()).device)
    return accuracy


@torch.no_grad()
def extract(network: Network, images: Tensor, *, mean: Sequence[float], std: Sequence[float],
            chunk: int = 512) -> Tensor:
    """Features [n, d] float32, on the CPU, of uint8 images [n, C, H, W] normalised with the given statistics."""
    device = next(network.parameters()).device
    features = torch.empty(len(images), network.feature_dim)
    for part, into in zip(images.split(chunk), features.split(chunk), strict=True):
        x = normalise(part.to(device, memory_format=torch.channels_last), mean, std)
        into.copy_(network.features(x))
    return features


def linear_probe(train_f: Tensor, train_y: Tensor, test_f: Tensor, test_y: Tensor, *, classes: int,
                 recipe: ProbeSettings, seed: int, device: torch.device | str = "cpu", watch: Watch | None = None) -> float:
    """Test accuracy in [0, 1] of a linear classifier on frozen features (METHOD 3).

    Cross-entropy, SGD without weight decay, cosine to 0; the features are used as they are.
    train_f, test_f: [n, d]; train_y, test_y: int64 [n]. Raises ValueError for labels outside 0 .. classes - 1.
    """
    for name, labels in (("training", train_y), ("test", test_y)):
        check_labels(labels, classes, name)
    with seeds.seeded(seed, "probe weights"):
        head = nn.Linear(train_f.shape[1], classes)
    head = head.to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    batches = shuffled_batches(train_f.to(device), train_y.to(device), batch=recipe.batch, seed=seed)
    train(head, islice(batches, recipe.steps), F.cross_entropy, optimizer, schedule, watch=watch)
    with torch.no_grad():
        right = sum(int((head(f.to(device)).argmax(1).cpu() == y).sum())
                    for f, y in zip(test_f.split(4096), test_y.split(4096), strict=True))
    return right / len(test_y)

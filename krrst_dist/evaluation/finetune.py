"""Transfer: all of a network trained on a labelled target, then tested (Tables 1-3 and 5-8 of the paper).

"From scratch" is the same on the untrained network that pre-training starts from (`pretrain.fresh`). Knows neither
where the network nor where the images come from.

Letters: b images [C, H, W] of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from krrst_dist import networks, seeds
from krrst_dist.augment.views import crop_flip
from krrst_dist.data.normalise import normalise
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.training import Watch, epoch_parts, train
from krrst_dist.networks import Headed, Network
from krrst_dist.recipes import FinetuneSettings


@dataclass(frozen=True)
class Tested:
    """What a classifier does on test images: the share it gets right, and its mean cross-entropy."""

    accuracy: float
    loss: float


def finetune(network: Network, data: LabelledImages, recipe: FinetuneSettings, *, seed: int, watch: Watch | None = None) -> Headed:
    """Put a fresh classifier on the network and train all of it, on the network's device (METHOD 3).

    The network itself is trained: give a copy to keep it. Returns the classifier, in eval mode. The same for the same
    arguments, on one kind of processor. Raises DivergedError where `watch` is given and the loss is not finite.
    """
    device = next(network.parameters()).device
    with seeds.seeded(seed, "classifier weights"):
        model = networks.with_head(network, data.classes)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    batches = islice(_views(data, recipe, seed=seed, device=device), recipe.steps)
    train(model, batches, F.cross_entropy, optimizer, schedule, watch=watch)
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, data: LabelledImages, *, chunk: int = 512) -> Tested:
    """Accuracy and loss on the test images, `chunk` at a time, in whatever mode the model is: in train mode batch norm takes
    the statistics of each chunk."""
    device = next(model.parameters()).device
    right, loss = 0, 0.0
    for images, labels in zip(data.test_images.split(chunk), data.test_labels.split(chunk), strict=True):
        outputs = model(normalise(images.to(device, memory_format=torch.channels_last), data.mean, data.std))
        right += int((outputs.argmax(1).cpu() == labels).sum())
        loss += float(F.cross_entropy(outputs, labels.to(device), reduction="sum"))
    return Tested(right / len(data.test_labels), loss / len(data.test_labels))


def _views(data: LabelledImages, recipe: FinetuneSettings, *, seed: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless shuffled epochs of normalised images, each cropped and flipped anew in every epoch, with labels."""
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    everything = torch.arange(len(images))
    for epoch in count():
        for part in epoch_parts(len(images), batch=recipe.batch, seed=seed, epoch=epoch):
            index = (everything if part is None else part).to(device)
            views = crop_flip(images[index], index, torch.full_like(index, epoch), seed=seeds.derive(seed, "fine-tuning views"),
                              padding=recipe.padding)  # [b, C, H, W] uint8
            yield normalise(views, data.mean, data.std), labels[index]

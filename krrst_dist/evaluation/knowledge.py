"""Target-data-free knowledge distillation (Table 4): a student learns a teacher's answers on synthetic images alone.

The teacher knows the target; the student never sees a target image before it is tested. Where there is no distilled set the
images are Gaussian noise, the paper's baseline. Batch norm takes the mini-batch's own statistics at all times, in teacher and
student, in training and testing (METHOD 4).

Letters: b images [C, H, W] of a batch, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from krrst_dist import networks, seeds
from krrst_dist.augment.diff_augment import diff_augment
from krrst_dist.config import NetworkSettings
from krrst_dist.evaluation.finetune import finetune
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.pretrain import fresh
from krrst_dist.evaluation.training import Watch, epoch_parts, train
from krrst_dist.networks import Headed, Network
from krrst_dist.recipes import KDSettings, TeacherSettings


def train_teacher(recipe: TeacherSettings, data: LabelledImages, *, device: torch.device | str = "cpu",
                  watch: Watch | None = None) -> Headed:
    """A classifier trained on the labelled target from scratch."""
    _, channels, _, resolution = data.train_images.shape
    network = fresh(recipe.network, resolution=resolution, channels=channels, outputs=1, seed=recipe.seed).network
    return finetune(network.to(device), data, recipe.training, seed=recipe.seed, watch=watch)


def untrained_classifier(settings: NetworkSettings, *, resolution: int, channels: int, classes: int) -> Headed:
    """A network to load a teacher's weights into."""
    return networks.with_head(networks.build(settings.name, resolution=resolution, channels=channels, **settings.options()), classes)


def distil_knowledge(student: Network, teacher: Headed, images: Tensor | tuple[int, ...], recipe: KDSettings, *, classes: int, seed: int,
                     watch: Watch | None = None) -> Headed:
    """Put a fresh classifier on the student and train all of it on the teacher's answers, on the student's device.

    images: X_s [m, C, H, W], used as stored and augmented (DSA); or a shape (m, C, H, W): fresh Gaussian noise in every
        batch, not augmented, with the noise's own learning rate.

    The student itself is trained; the teacher's weights stay, its running statistics do not matter. Returns the student's
    classifier in train mode, as it is to be tested. Raises DivergedError where `watch` is given and the loss is not finite.
    """
    device = next(student.parameters()).device
    with seeds.seeded(seed, "classifier weights"):
        model = networks.with_head(student, classes)
    model = model.to(device, memory_format=torch.channels_last)
    noise = not isinstance(images, Tensor)
    m = images[0] if noise else len(images)
    steps_per_epoch = len(epoch_parts(m, batch=recipe.batch, seed=seed, epoch=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.noise_lr if noise else recipe.lr, weight_decay=recipe.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    teacher.train()

    def answered(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return x, teacher(x).softmax(1)  # [b, c]

    batches = map(answered, _noise(images, recipe, seed, device) if noise else _augmented(images, recipe, seed, device))
    train(model, batches, soft_cross_entropy, optimizer, _EveryEpoch(cosine, steps_per_epoch), watch=watch)
    return model


def soft_cross_entropy(outputs: Tensor, answers: Tensor) -> Tensor:
    """- sum over the classes of answers * log softmax(outputs), averaged over the images. Both [b, c]."""
    return -(answers * outputs.log_softmax(1)).sum(1).mean()


class _EveryEpoch:
    """A schedule that is stepped at every optimiser step and steps its own at the end of every epoch."""

    def __init__(self, schedule: torch.optim.lr_scheduler.LRScheduler, steps_per_epoch: int) -> None:
        self._schedule, self._steps_per_epoch, self._steps = schedule, steps_per_epoch, 0

    def step(self) -> None:
        self._steps += 1
        if self._steps % self._steps_per_epoch == 0:
            self._schedule.step()


def _augmented(x_syn: Tensor, recipe: KDSettings, seed: int, device: torch.device) -> Iterator[Tensor]:
    """All epochs of X_s, shuffled, with DSA's augmentation."""
    x_syn = x_syn.to(device, memory_format=torch.channels_last)
    step = 0
    for epoch in range(recipe.epochs):
        for part in epoch_parts(len(x_syn), batch=recipe.batch, seed=seed, epoch=epoch):
            x = x_syn if part is None else x_syn[part.to(device)]
            yield diff_augment(x, seed=seeds.derive(seed, "training augmentation", step))
            step += 1


def _noise(shape: tuple[int, ...], recipe: KDSettings, seed: int, device: torch.device) -> Iterator[Tensor]:
    """As many batches of N(0, 1) as `shape[0]` images make, of their sizes."""
    m, *image = shape
    step = 0
    for epoch in range(recipe.epochs):
        for part in epoch_parts(m, batch=recipe.batch, seed=seed, epoch=epoch):
            b = m if part is None else len(part)
            x = torch.randn(b, *image, generator=seeds.torch_rng(seed, "noise images", step))
            yield x.to(device, memory_format=torch.channels_last)
            step += 1

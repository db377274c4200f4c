"""How networks are trained in evaluation: recipes as data, the published ones as defaults (METHOD 3 and 4; REFERENCE 3 and 4).

Knows numbers only: which loss goes with which labels, and what the steps do, is evaluation's business.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from krrst_dist.config import ConfigError, NetworkSettings, NonNegative, Positive, PretrainSettings, Settings

PRETRAIN = {
    "features": PretrainSettings(),
    "class": PretrainSettings(lr=0.01, weight_decay=5e-4, schedule="halfway", augment="dsa"),
    "soft": PretrainSettings(steps=10_000, batch=500, optimizer="adamw", lr=3e-4, weight_decay=0, schedule="cosine", warmup_steps=500,
                             augment="dsa"),
    "none": PretrainSettings(optimizer="adamw", lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup_steps=50),
}
"""the published recipe for 1,000 images, by the kind of a distilled set's labels; without any, the target model's own (ours)"""

PROJECTOR, OFF_DIAGONAL = (512, 512), 0.0051
"""widths, and weight of the redundancy term, of Barlow Twins on a set without labels: the widths are ours, the weight is published"""

FINETUNE_STEPS = {"cifar10": 10_000, "cifar100": 10_000, "tinyimagenet": 10_000}
"""by target; 5,000 on the others"""


def pretrain_recipe(stored: dict[str, Any], **changes: Any) -> PretrainSettings:
    """The recipe that a distilled set carries, with some settings changed. Raises ConfigError for one that cannot be used."""
    known = {name: value for name, value in stored.items() if name != "loss"}
    try:
        return PretrainSettings(**known | changes)
    except ConfigError as error:
        raise ConfigError(f"the set's recipe, with pretrain = {changes!r}: {error}") from None


class FinetuneSettings(Settings):
    """All layers trained on a labelled target: cross-entropy, SGD, cosine to 0, random crop and flip (METHOD 3)."""

    steps: Positive | None = None
    """optimiser steps; default: as published for the target"""
    batch: Positive = 256
    """64 in the paper for ResNet-18 at 224 px"""
    lr: Annotated[float, Field(gt=0)] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    padding: NonNegative = 4
    """pixels of black around an image before it is cropped at random"""

    def for_target(self, name: str) -> FinetuneSettings:
        """The recipe for one target, its steps filled in."""
        return self.model_copy(update={"steps": self.steps or FINETUNE_STEPS.get(name, 5000)})


class TeacherSettings(Settings):
    """The classifier to be distilled from: trained on the target from scratch. How the published one was trained, beyond its
    network, is not known: these numbers are ours."""

    network: NetworkSettings = NetworkSettings(name="resnet18")
    seed: NonNegative = 0
    training: FinetuneSettings = FinetuneSettings(steps=20_000, lr=0.1)


class KDSettings(Settings):
    """Target-data-free knowledge distillation (METHOD 4): cross-entropy between softmaxes, AdamW, cosine by epoch, batch statistics."""

    epochs: Positive = 1000
    batch: Annotated[int, Field(ge=2)] = 512
    """images a step, in training and in testing"""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    noise_lr: Annotated[float, Field(gt=0)] = 1e-3
    """lr where the images are Gaussian noise, as there is no distilled set"""
    noise_images: Annotated[int, Field(ge=2)] = 2000
    """images of noise that make an epoch"""
    weight_decay: Annotated[float, Field(ge=0)] = 0
    teacher: TeacherSettings = TeacherSettings()

"""What can be measured of a distilled set, by name: one function a task, numbers out.

A task takes what it needs from `Materials`, which fetches nothing before it is asked for. Adding a task is adding a
function to TASKS (and its settings to the grid's). Knows no files, no cluster and no table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import ProbeSettings
from krrst_dist.evaluation.finetune import finetune, score
from krrst_dist.evaluation.knn import knn_accuracy
from krrst_dist.evaluation.knowledge import distil_knowledge
from krrst_dist.evaluation.labelled import LabelledImages, few_label_subset
from krrst_dist.evaluation.probe import linear_probe
from krrst_dist.evaluation.training import Watch
from krrst_dist.networks import Headed, Network
from krrst_dist.recipes import FinetuneSettings, KDSettings


@dataclass(frozen=True)
class Measured:
    """metrics: name -> value (accuracies in [0, 1]). n_test: images they were taken on. steps: optimiser steps, without pre-training."""

    metrics: dict[str, float]
    n_test: int
    steps: int = 0


class Materials(Protocol):
    """What tasks work with."""

    device: torch.device
    """that they work on"""

    def encoder(self) -> Network:
        """A copy of the pre-trained network (or of the untrained one, where there is no set), to train or to use."""

    def target(self) -> LabelledImages:
        """The target's images; the training split with all its labels."""

    def features(self) -> tuple[Tensor, Tensor]:
        """The encoder's features [n, d] of the target's two splits, on the CPU."""

    def distilled(self) -> DistilledSet | None: ...

    def teacher(self) -> Headed:
        """A classifier trained on the target."""

    def source(self) -> Iterable[Tensor]:
        """All real images that the set was made of, uint8 [b, C, H, W] at a time."""

    def feature_network(self) -> nn.Module:
        """The network that FID compares features of."""


Task = Callable[[Materials, Any, float, int, Watch], Measured]
"""(materials, the task's settings, share of the target's labels, evaluation seed, watch) -> what was measured"""


def _finetune(materials: Materials, recipe: FinetuneSettings, fraction: float, seed: int, watch: Watch) -> Measured:
    data = materials.target()
    model = finetune(materials.encoder(), data.with_few_labels(fraction, seed), recipe, seed=seed, watch=watch)
    found = score(model, data)
    return Measured({"accuracy": found.accuracy, "test_loss": found.loss}, len(data.test_labels), recipe.steps)


def _probe(materials: Materials, recipe: ProbeSettings, fraction: float, seed: int, watch: Watch) -> Measured:
    data, (train_f, test_f) = materials.target(), materials.features()
    chosen = few_label_subset(data.train_labels, fraction, seed)
    accuracy = linear_probe(train_f[chosen], data.train_labels[chosen], test_f, data.test_labels, classes=data.classes, recipe=recipe,
                            seed=seed, device=materials.device, watch=watch)
    return Measured({"accuracy": accuracy}, len(data.test_labels), recipe.steps)


def _knn(materials: Materials, recipe: Any, fraction: float, seed: int, watch: Watch) -> Measured:
    data, (train_f, test_f) = materials.target(), materials.features()
    accuracy = knn_accuracy(train_f, data.train_labels, test_f, data.test_labels, k=recipe.k)
    return Measured({"accuracy": accuracy}, len(data.test_labels))


def _kd(materials: Materials, recipe: KDSettings, fraction: float, seed: int, watch: Watch) -> Measured:
    data, distilled, steps = materials.target(), materials.distilled(), [0]

    def counted(step: int, loss: float) -> None:
        steps[0] = step
        watch(step, loss)

    images = (recipe.noise_images, *data.test_images.shape[1:]) if distilled is None else torch.tensor(distilled.x_syn)
    student = distil_knowledge(materials.encoder(), materials.teacher(), images, recipe, classes=data.classes, seed=seed, watch=counted)
    found, teacher = (score(model, data, chunk=recipe.batch) for model in (student, materials.teacher().train()))
    metrics = {"accuracy": found.accuracy, "test_loss": found.loss, "teacher_accuracy": teacher.accuracy}
    return Measured(metrics, len(data.test_labels), steps[0])


def _fid(materials: Materials, recipe: Any, fraction: float, seed: int, watch: Watch) -> Measured:
    from krrst_dist.evaluation.fid import fid, to_uint8  # here, because it takes seconds and no other task needs it

    images = to_uint8(materials.distilled())
    return Measured({"fid": fid(images, materials.source(), network=materials.feature_network(), device=materials.device)}, len(images))


TASKS: dict[str, Task] = {"finetune": _finetune, "probe": _probe, "knn": _knn, "kd": _kd, "fid": _fid}


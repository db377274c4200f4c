"""What one trial of a grid does, in whichever process it runs: train a network, or compute a cell and store its row.

A process serves many trials, one after the other: it keeps the last target's images and the last encoder's features, and
nothing else. Knows the plan's files; not how trials are scheduled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from ray import tune
from torch import Tensor, nn

from krrst_dist import provenance, storage
from krrst_dist.algorithm import DivergedError
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import EngineSettings
from krrst_dist.data.cache import Cache
from krrst_dist.data.normalise import normalise
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import read_all, read_in_order
from krrst_dist.evaluation.knowledge import train_teacher, untrained_classifier
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.pretrain import fresh, pretrain_on
from krrst_dist.evaluation.probe import extract
from krrst_dist.evaluation.target_model import load_target
from krrst_dist.evaluation.tasks import TASKS
from krrst_dist.evaluation.weights import load_weights, save_weights
from krrst_dist.networks import Headed, Network
from krrst_dist.on_ray import assembly
from krrst_dist.on_ray.grid_work import Model, Planned, Target
from krrst_dist.on_ray.trial_log import TrialLog, trial_log
from krrst_dist.results import Outcome, ResultStore


@dataclass(frozen=True)
class Workshop:
    """What every trial of a grid has in common. trials: where Ray Tune keeps their records, a path or URI."""

    cache: Cache
    results: ResultStore
    trials: str
    resolution: int
    cpus: int
    gpus: float

    def device(self) -> torch.device:
        """Where this process computes, its threads set."""
        torch.set_num_threads(self.cpus)
        return assembly.device(EngineSettings(threads=self.cpus, gpus=self.gpus))

    def trial_path(self) -> str:
        """Where the records of the trial are that this process is doing."""
        context = tune.get_context()
        return storage.join(self.trials, context.get_experiment_name(), context.get_trial_name())


class Curve:
    """The learning curve of a trial: reported to Tune as it goes, noted in its log, and its last point kept."""

    def __init__(self, log: TrialLog) -> None:
        self.steps, self.loss, self._log = 0, float("nan"), log

    def __call__(self, step: int, loss: float) -> None:
        self.steps, self.loss = step, loss
        self._log.progress(step, loss)
        tune.report({"step": step, "loss": loss})


def model_trial(config: dict[str, str], *, workshop: Workshop, work: dict[str, Model]) -> None:
    """Train one network and store its weights. One that diverges, or that cannot be trained as asked, is reported as such."""
    model = work[config["key"]]
    with trial_log(model.title) as log:
        how, curve, device = {"status": "ok", "error": ""}, Curve(log), workshop.device()
        try:
            module = _trained(model, workshop, device, curve)
            save_weights(model.uri, module, about={"title": model.title, "steps": curve.steps, "loss": curve.loss})
        except DivergedError as error:
            how = {"status": "diverged", "error": str(error)}
    tune.report(how | {"step": curve.steps, "loss": curve.loss})


def cell_trial(config: dict[str, str], *, workshop: Workshop, work: dict[str, Planned]) -> None:
    """Compute one cell and store its rows, whole, before it counts as done."""
    planned = work[config["key"]]
    cell = planned.cell
    with trial_log(planned.title) as log:
        curve, device = Curve(log), workshop.device()
        started, memory = time.monotonic(), PeakMemory(device)
        try:
            found = TASKS[cell.task](Bench(planned, workshop, device), planned.recipe, cell.label_fraction, cell.evaluation_seed, curve)
            how = {"status": "ok", "metrics": found.metrics, "n_test": found.n_test, "steps": found.steps}
        except DivergedError as error:
            how = {"status": "diverged", "metrics": {"train_loss": curve.loss}, "steps": curve.steps, "error": str(error)}
        outcome = Outcome(**how, seconds=time.monotonic() - started, device=_name(device), peak_memory=memory.peak(),
                          trial_path=workshop.trial_path())
        workshop.results.write(cell, outcome)
    tune.report({"status": outcome.status, "error": outcome.error, "step": curve.steps, "loss": curve.loss} | outcome.metrics)


def trivial_trial(config: dict[str, str], *, work: dict[str, None]) -> None:
    """Nothing: what is left is what a trial costs."""
    tune.report({"status": "ok", "error": ""})


class Bench:
    """`Materials` of one cell."""

    def __init__(self, planned: Planned, workshop: Workshop, device: torch.device) -> None:
        self._planned, self._workshop, self.device = planned, workshop, device

    def encoder(self) -> Network:
        model = self._planned.encoder
        network = fresh(model.network, resolution=self._workshop.resolution, channels=3, outputs=1, seed=model.seed).network
        if model.trained:
            load_weights(model.uri, network)
        return network.to(self.device, memory_format=torch.channels_last).eval()

    def target(self) -> LabelledImages:
        return _labelled(self._planned.target, self._workshop.cache)

    def features(self) -> tuple[Tensor, Tensor]:
        return _features(self._planned.encoder, self._planned.target, self)

    def distilled(self) -> DistilledSet | None:
        return DistilledSet.load(self._planned.set_path) if self._planned.set_path else None

    def teacher(self) -> Headed:
        return _teacher(self._planned.teacher, self._workshop, self.device)

    def source(self) -> Iterable[Tensor]:
        prepared = self._workshop.cache.fetch_prepared(self._planned.source)
        return (batch.images for batch in read_in_order(prepared, np.arange(prepared.count), batch=256, threads=self._workshop.cpus))

    def feature_network(self) -> nn.Module:
        settings = self._planned.recipe
        if settings.network == "inception":
            from krrst_dist.evaluation.fid import inception  # here, because it takes seconds

            return inception(settings.weights)
        prepared = Prepared.load(self._planned.source)
        return _OfPixels(load_target(settings.network, resolution=self._workshop.resolution), prepared.mean, prepared.std)


class _OfPixels(nn.Module):
    """A network of normalised images, as one of uint8 pixels."""

    def __init__(self, network: Network, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network, self._mean, self._std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self._mean, self._std))


def _trained(model: Model, workshop: Workshop, device: torch.device, curve: Curve) -> nn.Module:
    if model.target is not None:
        return train_teacher(model.recipe, _labelled(model.target, workshop.cache), device=device, watch=curve)
    return pretrain_on(DistilledSet.load(model.set_path), model.network, model.recipe, seed=model.seed, device=device, watch=curve)


@lru_cache(maxsize=1)
def _labelled(target: Target, cache: Cache) -> LabelledImages:
    train, test = (cache.fetch_prepared(path) for path in (target.train, target.test))
    (train_x, train_y), (test_x, test_y) = (read_all(split, np.arange(split.count)) for split in (train, test))
    data = LabelledImages(train_x, torch.from_numpy(train_y), test_x, torch.from_numpy(test_y), train.mean, train.std, target.classes)
    return data.validation() if target.validation else data


_kept_features: dict[tuple[str, str, int], tuple[Tensor, Tensor]] = {}


def _features(model: Model, target: Target, bench: Bench) -> tuple[Tensor, Tensor]:
    key = (model.uri, target.fingerprint, model.seed)
    if key not in _kept_features:
        data, network = bench.target(), bench.encoder()
        _kept_features.clear()
        _kept_features[key] = tuple(extract(network, images, mean=data.mean, std=data.std)
                                    for images in (data.train_images, data.test_images))
    return _kept_features[key]


def _teacher(model: Model, workshop: Workshop, device: torch.device) -> Headed:
    teacher = untrained_classifier(model.network, resolution=workshop.resolution, channels=3, classes=model.target.classes)
    load_weights(model.uri, teacher)
    return teacher.to(device, memory_format=torch.channels_last)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else provenance.cpu_name()


class PeakMemory:
    """The most memory that is held from now on: a GPU's allocations, or this process's resident set."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _write_if_possible("/proc/self/clear_refs", "5")  # resets VmHWM

    def peak(self) -> int | None:
        """Bytes; None where it cannot be told."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        try:
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        except OSError:
            return None
        return int(lines["VmHWM"].split()[0]) * 1024


def _write_if_possible(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError:
        pass

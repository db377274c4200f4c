"""`krrst bench serial`: from images to transfer on one device, with the serial loop and all images in memory, neither Ray nor FFCV.

What a stretch of time on one device buys at a preset's sizes: the target is trained, its representations are taken, X_s and
Y_s are distilled by Algorithm 1, and networks pre-trained on them are probed and fine-tuned beside their controls. The
numbers of steps are given, so that the result is a function of them and of the seed; the time that each stage took is printed.
A run that was cut short goes on from the last stage that left a file.

Letters: n images, k target dimensions, m synthetic images.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from krrst_dist import networks, paths, seeds, storage
from krrst_dist.algorithm import ModelPool, OuterOptimizer, Shard, distill
from krrst_dist.algorithm.barlow_twins import TwinsTrainer, train
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.bench import measure
from krrst_dist.config import Config, ConfigError
from krrst_dist.data.memory_reader import InMemory, MemoryReader, load_images
from krrst_dist.data.normalise import normalise
from krrst_dist.data.order import global_batch
from krrst_dist.data.prefetch import Prefetcher
from krrst_dist.data.prepared import held_out_split
from krrst_dist.data.reader import channels_first
from krrst_dist.data.stream import TargetedBatches
from krrst_dist.data.targets import TargetFile
from krrst_dist.evaluation.finetune import finetune, score
from krrst_dist.evaluation.held_out import loss_of_mean, ridge_loss
from krrst_dist.evaluation.knn import knn_accuracy
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.pretrain import fresh, pretrain
from krrst_dist.evaluation.probe import extract, linear_probe, probes
from krrst_dist.evaluation.target_model import load_target, save_target, untrained
from krrst_dist.networks import Network
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.recipes import FinetuneSettings

Rows = dict[str, dict[str, float]]
"""row -> column -> value"""


@dataclass(frozen=True)
class SerialRun:
    """Test accuracies in [0, 1] of the target model's features and of each row of the transfer table, held-out ridge losses by row, and
    seconds by stage."""

    target: dict[str, float]
    held_out: dict[str, float]
    transfer: Rows
    seconds: dict[str, float] = field(default_factory=dict)


def bench_serial(*, out: Path, preset: str = "cifar100", data: str | None = None, device: str = "cpu",
                 precision: Literal["float32", "tf32", "bfloat16"] = "float32", target_steps: int | None = None,
                 target_batch: int | None = None, updates: int | None = None, pretrain_steps: int | None = None,
                 finetune_steps: int | None = None, seed: int = 0) -> SerialRun:
    """Train a target, distil and transfer on one device, everything in memory, and print what came of it and how long it took.

    Args:
        out: folder for the target model and the distilled set; those that a run with the same settings left there are taken.
        preset: whose sizes and networks.
        data: folder of the data sets; default: $KRRST_DATA, else `data` in the project.
        device: cpu, cuda, cuda:1, ...
        precision: of the pool's forward and backward passes; the ridge regression is float32, evaluation too.
        target_steps: of Barlow Twins, instead of the preset's; warm-up is a tenth of them at most.
        target_batch: images a step of it, instead of the preset's.
        updates: meta-updates, instead of the preset's; the learning rates decay over them.
        pretrain_steps: of a network on a set, instead of the preset's.
        finetune_steps: of a network on a labelled target, instead of the published ones; 0 leaves fine-tuning out.
        seed: of the distillation and of the evaluation.
    """
    measure.ready(device)
    config = _settings(preset, seed, {"engine.precision": precision, "target.steps": target_steps, "target.batch": target_batch,
                                      "distill.updates": updates, "evaluate.pretrain.steps": pretrain_steps})
    _claim(out, config)
    run = _Run(config, torch.device(device), paths.data_directory(data))
    target = run.target(out / "target.safetensors")
    quality = run.quality(target)
    start = run.start(target)
    learnt = run.learnt(out / "distilled.safetensors", start)
    rows = {"from scratch": None, "Random + targets": start, "KRR-ST": learnt}
    held_out, transfer = run.transfer(rows, finetune_steps)
    result = SerialRun(quality, held_out, transfer, run.seconds)
    print(_report(result, config, device))
    return result


def _settings(preset: str, seed: int, given: dict[str, str | int | None]) -> Config:
    changes = {name: value for name, value in given.items() if value is not None} | {"seed": seed, "distill.shards": 1, "distill.views": 0}
    if steps := changes.get("target.steps"):
        changes["target.warmup_steps"] = min(load_preset(preset).target.warmup_steps, steps // 10)
    return load_preset(preset, **changes)


def _claim(out: Path, config: Config) -> None:
    """Raises ConfigError where a run with other settings has been; how networks are evaluated does not count."""
    path, settings = out / "settings.json", json.dumps(config.model_dump(mode="json", exclude={"evaluate"}), indent=1)
    if path.exists() and path.read_text() != settings:
        raise ConfigError(f"out = {str(out)!r}: holds files of a run with other settings (settings.json there); name another folder")
    storage.write_whole(path, settings.encode())


class _Run:
    """The stages, each told its predecessors' results."""

    def __init__(self, config: Config, device: torch.device, root: Path) -> None:
        self.config, self.device, self.root = config, device, root
        self.seconds: dict[str, float] = {}
        with self._stage("reading"):
            self._read: dict[tuple[str, str], InMemory] = {}
            self.source = self._images(config.source.dataset, "train")
            self.tests = {name: self._labelled(name) for name in dict.fromkeys((config.source.dataset, *config.evaluate.datasets))}
        self.training, self.held_out = held_out_split(len(self.source.images), config.source.held_out, config.source.split_seed)

    def target(self, path: Path) -> Network:
        """g_phi, trained by Barlow Twins on the training part (METHOD 5), in eval mode; the one in the file, if it is there."""
        settings, resolution = self.config.target, self.config.source.resolution
        if not path.exists():
            about = {"target": settings.model_dump(mode="json"), "source": self.config.source.model_dump(mode="json")}
            save_target(path, self._trained_target(), settings.network, resolution=resolution, about=about)
        return load_target(path, resolution=resolution).to(self.device, memory_format=torch.channels_last)

    def _trained_target(self) -> Network:
        settings, source = self.config.target, self.source
        network = untrained(settings, resolution=self.config.source.resolution)
        if settings.steps == 0:
            return network
        trainer = TwinsTrainer(network, projector_widths=settings.projector, batch=settings.batch, steps=settings.steps, lr=settings.lr,
                               warmup_steps=settings.warmup_steps, weight_decay=settings.weight_decay, off_diagonal=settings.off_diagonal,
                               mean=source.mean, std=source.std, seed=settings.seed, device=self.device)
        images = channels_first(source.images).to(self.device)

        def batch(step: int) -> Tensor:
            index = global_batch(self.training, batch=settings.batch, seed=settings.seed, step=step)
            return images[torch.from_numpy(index).to(self.device)]

        with self._stage("target"):
            train(trainer, batch, after_step=self._progress("target", settings.steps))
        return trainer.network

    @torch.no_grad()
    def represent(self, target: Network) -> Tensor:
        """g_phi of every image of the source, float32 [n, k], on the CPU."""
        mean, std = self.source.mean, self.source.std
        parts = channels_first(self.source.images).split(1024)
        return torch.cat([target(normalise(part.to(self.device, memory_format=torch.channels_last), mean, std)).cpu() for part in parts])

    def quality(self, target: Network) -> dict[str, float]:
        """What the target's features say about the source's own labels: k-NN (k = 20) and linear probe, on its test split."""
        data, recipe = self.tests[self.config.source.dataset], self.config.evaluate.probe
        with self._stage("target's accuracy"):
            known, asked = (extract(target, images, mean=data.mean, std=data.std) for images in (data.train_images, data.test_images))
            probe = linear_probe(known, data.train_labels, asked, data.test_labels, classes=data.classes, recipe=recipe, seed=0,
                                 device=self.device)
            found = {"k-NN": knn_accuracy(known, data.train_labels, asked, data.test_labels), "linear probe": probe}
            print(found, flush=True)
            return found

    def start(self, target: Network) -> tuple[Tensor, Tensor]:
        """Where distillation starts: m training images and their representations; keeps everybody's for the batches."""
        with self._stage("representations"):
            self._targets = self.represent(target)
            if self.config.target.standardise:
                known = self._targets[torch.from_numpy(self.training)]
                self._targets = (self._targets - known.mean(0)) / known.std(0).clamp(min=1e-12)
        chosen = seeds.numpy_rng(self.config.seed, "start").permutation(self.training)[: self.config.distill.m]
        return self._normalised(chosen), self._targets[torch.from_numpy(chosen)]

    def learnt(self, path: Path, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """X_s and Y_s after the last update; those in the file, if it is there."""
        if path.exists():
            found = DistilledSet.load(path)
            return torch.from_numpy(found.x_syn), torch.from_numpy(found.y_syn)
        x_syn, y_syn = self._distil(start)
        config, source = self.config, self.source
        origin = {"method": "krr_st", "seed": config.seed, "source": config.source.dataset, "config": config.model_dump(mode="json")}
        DistilledSet(x_syn.contiguous().numpy(), y_syn.contiguous().numpy(), "features", config.evaluate.pretrain.recipe(),
                     Space("normalised", source.mean, source.std), source.class_names or None, origin).save(path)
        return x_syn, y_syn

    def _distil(self, start: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Algorithm 1, in one process."""
        config, settings, source = self.config, self.config.distill, self.source
        side = TargetFile(Path("in memory"), "in memory", self._targets.numpy()[:, None], 0, config.source.split_seed, None, None)
        reader = MemoryReader(source.images, source.labels, self.training, batch=settings.batch, seed=config.seed, purpose_index=0)
        batches = TargetedBatches(Prefetcher(reader), side, source, view_seed=config.source.split_seed, device=self.device)
        pool = ModelPool(self._fresh_model, **settings.pool.model_dump(exclude={"network"}), seed=config.seed, shard=0)
        shard = Shard(0, pool, batches, ridge=settings.ridge, chunk_size=settings.chunk_size, precision=config.engine.precision,
                      device=self.device)
        outer = OuterOptimizer(*(value.to(self.device) for value in start), lr_x=settings.lr_x, lr_y=settings.lr_y,
                               decay_updates=settings.horizon,
                               scale=torch.tensor(source.std, device=self.device)[:, None, None])
        told = self._progress("distillation", settings.updates)
        with self._stage("distillation"):
            x_syn, y_syn = distill(outer, [shard], updates=settings.updates, on_update=lambda step, update: told(step + 1, update.loss))
        batches.close()
        return x_syn.cpu(), y_syn.cpu()

    def transfer(self, sets: dict[str, tuple[Tensor, Tensor] | None], finetune_steps: int | None) -> tuple[dict[str, float], Rows]:
        """Pre-train a network on each set; its held-out ridge loss, and its probe and fine-tuning on each labelled data set."""
        config, held_out, rows = self.config, {"predicting the mean": loss_of_mean(self._held_out_targets())}, {}
        for name, pairs in sets.items():
            with self._stage(f"transfer, {name}"):
                network = self._pretrained(pairs)
                if pairs is not None:
                    held_out[name] = ridge_loss(network, *pairs, self._normalised(self.held_out), self._held_out_targets(),
                                                ridge=config.distill.ridge)
                rows[name] = {}
                for dataset in config.evaluate.datasets:
                    data = self.tests[dataset]
                    found = probes(network, data, config.evaluate.probe, few_labels=config.evaluate.few_labels, seed=config.seed)
                    rows[name] |= {f"{dataset}, probe, {fraction:.0%} of labels": value for fraction, value in found.items()}
                for dataset in config.evaluate.datasets if finetune_steps != 0 else ():
                    recipe = FinetuneSettings(steps=finetune_steps).for_target(dataset)
                    model = finetune(deepcopy(network), self.tests[dataset], recipe, seed=config.seed)
                    rows[name][f"{dataset}, fine-tuned"] = score(model, self.tests[dataset]).accuracy
                print(name, rows[name], flush=True)
        return held_out, rows

    def _pretrained(self, pairs: tuple[Tensor, Tensor] | None) -> Network:
        network, recipe = self.config.distill.pool.network, self.config.evaluate.pretrain
        if pairs is not None:
            return pretrain(network, *pairs, recipe, seed=self.config.seed, device=self.device)
        left = fresh(network, resolution=self.config.source.resolution, channels=3, outputs=1, seed=self.config.seed).network
        return left.to(self.device, memory_format=torch.channels_last).eval()

    def _fresh_model(self) -> networks.Headed:
        settings = self.config.distill.pool.network
        network = networks.build(settings.name, resolution=self.config.source.resolution, **settings.options())
        return networks.with_head(network, self._targets.shape[1]).to(self.device, memory_format=torch.channels_last)

    def _normalised(self, chosen: np.ndarray) -> Tensor:
        return normalise(channels_first(self.source.images[chosen]), self.source.mean, self.source.std)

    def _held_out_targets(self) -> Tensor:
        return self._targets[torch.from_numpy(self.held_out)]

    def _images(self, name: str, split: Literal["train", "test"]) -> InMemory:
        if (name, split) not in self._read:
            self._read[name, split] = load_images(name, split, root=self.root, resolution=self.config.source.resolution)
        return self._read[name, split]

    def _labelled(self, name: str) -> LabelledImages:
        train, test = self._images(name, "train"), self._images(name, "test")
        return LabelledImages(channels_first(train.images), torch.from_numpy(train.labels), channels_first(test.images),
                              torch.from_numpy(test.labels), train.mean, train.std, len(train.class_names))

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = time.monotonic() - started
        print(f"{name}: {self.seconds[name]:.1f} s", flush=True)

    def _progress(self, stage: str, steps: int) -> Callable[[int, float | Tensor], None]:
        """Prints twenty lines in all."""
        started, every = time.monotonic(), max(1, steps // 20)

        def told(done: int, loss: float | Tensor) -> None:
            if done % every == 0:
                print(f"{stage}: {done} of {steps}, loss {float(loss):.4g}, {time.monotonic() - started:.1f} s", flush=True)

        return told


def _report(run: SerialRun, config: Config, device: str) -> str:
    settings, columns = config.distill, list(run.transfer["KRR-ST"])
    steps = (f"{config.target.steps} steps of {config.target.batch} images for the target, {settings.updates} updates, "
             f"{config.evaluate.pretrain.steps} steps of pre-training")
    return "\n".join([
        "", measure.circumstances(device, torch.get_num_threads()),
        f"sizes    {config.preset}: m = {settings.m}, b = {settings.batch}; {steps}; seed {config.seed}; pool in {config.engine.precision}",
        "target   " + ", ".join(f"{name} {value:.1%}" for name, value in run.target.items()) + f" on {config.source.dataset}'s test split",
        "held-out ridge loss, one network: " + ", ".join(f"{name} {value:.4f}" for name, value in run.held_out.items()),
        "", f"| test accuracy (%) | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns),
        *(f"| {name} | {' | '.join(f'{100 * row[column]:.2f}' for column in columns)} |" for name, row in run.transfer.items()),
        "", "seconds  " + ", ".join(f"{name} {value:.1f}" for name, value in run.seconds.items())])

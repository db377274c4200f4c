"""A method's run put together: small picklable recipes that open a node's own copy of the prepared files.

They put the rooms below together; nothing here knows Ray's API, only that its arguments travel.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from krrst_dist import plugins, sheets, storage
from krrst_dist.algorithm import Outer, Slice
from krrst_dist.artifacts import DistilledSet
from krrst_dist.config import Config, ConfigError, EngineSettings
from krrst_dist.data.cache import Cache
from krrst_dist.data.reader import read_all
from krrst_dist.evaluation import held_out, pretrain
from krrst_dist.evaluation.labelled import LabelledImages
from krrst_dist.evaluation.probe import probes
from krrst_dist.methods.common.protocol import Method, Part, Tensors
from krrst_dist.methods.common.source import Source
from krrst_dist.on_ray.work import Work
from krrst_dist.recipes import pretrain_recipe

RIDGE = 1e-6
"""lambda over trace(K) of the held-out loss, for methods that have no ridge of their own"""


def device(engine: EngineSettings) -> torch.device:
    """The GPU that Ray gave this process, when the settings ask for one, else the CPU. Convolutions on it are float32 unless a shard's
    own precision says otherwise.

    Raises ConfigError when a GPU is asked for and torch cannot use one.
    """
    torch.backends.cudnn.allow_tf32 = False
    if not engine.gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"engine.gpus = {engine.gpus:g}: torch {torch.__version__} finds no GPU on {socket.gethostname()}; install a "
                          f"build with CUDA and a driver there (krrst doctor), or set engine.gpus = 0")
    return torch.device("cuda")


@dataclass
class Assembly:
    """One run of a method: its data, opened on first use in the process that uses it, and what the engine has to do for it.

    beton: manifest of the prepared source.
    targets: side file of representations, None where the method needs none. out: where chores are kept, for all seeds of the run.
    """

    config: Config
    cache: Cache
    beton: Path
    targets: Path | None
    out: str
    _opened: dict[str, object] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, object]:
        return vars(self) | {"_opened": {}}  # opened files stay in their process

    @property
    def method(self) -> Method:
        """The method that is run."""
        return plugins.load(self.config.method)

    @property
    def measured(self) -> bool:
        """Has its set a held-out ridge loss?"""
        return self.method.measured(self.config.distill)

    @property
    def source(self) -> Source:
        """The images, and their targets where there are any, from this node's disk."""
        return self._once("source", self._open)

    @property
    def start(self) -> DistilledSet:
        """Where distillation starts. It may need the method's chores."""
        return self._once("start", lambda: self.method.start(self.config, self.source, self.read))

    def work(self) -> Work:
        """What the engine does for the method."""
        method, config = self.method, self.config
        return Work(outer=self.outer, build=self.build, combine=method.combine, chores=method.chores(config, self.source), do=self.do,
                    measure=self.measure if self.measured else None, draw=self.draw, warm_up=method.warm_up_steps(config),
                    slices=getattr(config.distill, "slices", 1), slice=self.slice)

    def outer(self, horizon: int) -> Outer:
        """The learned tensors at their start."""
        return self.method.outer(self.config, self.start, horizon=horizon)

    def build(self, shard: int) -> Part:
        """Logical shard number `shard`."""
        return self.method.part(self.config, self.source, self.start, shard, read=self.read, device=device(self.config.engine))

    def slice(self, shard: int, p: int) -> Slice:
        """Slice p > 0 of logical shard number `shard`."""
        return self.method.slice(self.config, self.source, shard, p, device=device(self.config.engine))

    def do(self, chore: str, alive: Callable[[], None]) -> None:
        """Compute one of the method's chores, unless it is there."""
        if storage.exists(self._chore(chore)):
            return
        made = self.method.do(self.config, self.source, chore, device=device(self.config.engine), alive=alive)
        storage.write_whole(self._chore(chore), safetensors.torch.save({name: value.cpu().contiguous() for name, value in made.items()}))

    def read(self, chore: str) -> Tensors:
        """What a chore made."""
        return safetensors.torch.load(storage.read_whole(self._chore(chore)))

    def measure(self, network: int, values: tuple[Tensor, ...], alive: Callable[[], None]) -> float:
        """The held-out ridge loss of network number `network`, pre-trained on the set that is learned by then.

        alive: called after each of its training steps. Raises DivergedError, FeaturesError where the pre-training diverges.
        """
        config, made = self.config, self.method.result(self.start, values)
        x_syn, y_syn = torch.tensor(made.x_syn), torch.tensor(made.y_syn)
        held_out_images, held_out_targets = self._once("held out", self._held_out)
        with _telling(alive):
            trained = pretrain.pretrain(self.method.network(config), x_syn, y_syn, config.evaluate.pretrain, seed=network,
                                        device=device(config.engine), watch=lambda step, loss: None)  # watched: it must not diverge
        return held_out.ridge_loss(trained, x_syn, y_syn, held_out_images, held_out_targets, ridge=getattr(config.distill, "ridge", RIDGE))

    def draw(self, values: tuple[Tensor, ...]) -> bytes:
        """The images of the set that is learned by then, as a sheet; the first ones, where all would be too many to be looked at."""
        made = self.method.result(self.start, values)
        shown = made.x_syn[:sheets.fitting(*made.x_syn.shape[2:])]
        return sheets.sheet(sheets.to_pixels(shown, made.space), columns=20)

    def of_mean(self) -> float | None:
        """The held-out loss of predicting the mean; None where nothing is held out."""
        return held_out.loss_of_mean(self.source.targets.look_up(self.source.held_out)) if self.measured else None

    def _once(self, name: str, make: Callable[[], object]) -> object:
        if name not in self._opened:
            self._opened[name] = make()
        return self._opened[name]

    def _open(self) -> Source:
        prepared = self.cache.fetch_prepared(self.beton)
        if self.targets:
            self.cache.fetch(self.targets, self.targets.with_name(self.targets.name + ".json"))
        return Source.of(self.config, prepared, self.targets)

    def _held_out(self) -> tuple[Tensor, Tensor]:
        held = self.source.held_out
        return self.source.images(held), self.source.targets.look_up(held)

    def _chore(self, name: str) -> str:
        """Its file, in a folder named by all that it may depend on."""
        depends = {key: value for key, value in self.config.trajectory().items()
                   if key != "seed" and key.startswith(self.method.chores_read)}
        targets = self.source.targets and self.source.targets.fingerprint
        depends |= {"images": self.source.prepared.fingerprint, "targets": targets}
        code = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:8]
        return storage.join(self.out, f"{self.config.method}-{code}", f"{name}.safetensors")


@contextmanager
def _telling(alive: Callable[[], None]) -> Iterator[None]:
    """Calls it after every training step."""
    after_step = register_optimizer_step_post_hook(lambda *_: alive())
    try:
        yield
    finally:
        after_step.remove()


def probe(config: Config, cache: Cache, datasets: dict[str, tuple[Path, Path]], distilled: DistilledSet | None, seed: int,
          alive: Callable[[], None]) -> dict[tuple[str, float], float]:
    """Test accuracy, by (data set, fraction of its labels), of probes on one network pre-trained on `distilled` (None: left untrained).

    datasets: name -> manifests of the prepared training and test split. alive: called after each training step.
    """
    torch.set_num_threads(config.engine.threads)
    where = device(config.engine)
    network, resolution = plugins.load(config.method).network(config), config.source.resolution
    accuracy = {}
    with _telling(alive):
        if distilled is None:
            trained = pretrain.fresh(network, resolution=resolution, channels=3, outputs=1, seed=seed).network.to(where).eval()
        else:
            trained = pretrain.pretrain_on(distilled, network, pretrain_recipe(distilled.recipe), seed=seed, device=where)
        for name, paths in datasets.items():
            found = probes(trained, _probe_data(cache, *paths), config.evaluate.probe, few_labels=config.evaluate.few_labels, seed=seed)
            accuracy |= {(name, fraction): value for fraction, value in found.items()}
    return accuracy


def _probe_data(cache: Cache, train: Path, test: Path) -> LabelledImages:
    splits = [cache.fetch_prepared(path) for path in (train, test)]
    (train_images, train_labels), (test_images, test_labels) = (read_all(split, np.arange(split.count)) for split in splits)
    return LabelledImages(train_images, torch.from_numpy(train_labels), test_images, torch.from_numpy(test_labels), splits[0].mean,
                          splits[0].std, len(splits[0].class_names))

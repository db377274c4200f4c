"""A tiny distillation problem for the engine's tests, importable by Ray's workers, and a driver to be killed.

`python tests/engine_parts.py DIRECTORY UPDATES CLUSTER` runs (or goes on with) the problem on a running cluster.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from krrst_dist import networks, seeds
from krrst_dist.algorithm import ModelPool, OuterOptimizer, Shard, Slice, distill
from krrst_dist.algorithm.contribution import mean
from krrst_dist.config import Config, EngineSettings, EvaluateSettings, NetworkSettings, SourceSettings
from krrst_dist.methods.krr_st import DistillSettings, PoolSettings
from krrst_dist.on_ray.coordinator import Coordinator
from krrst_dist.on_ray.stopping import Stopped
from krrst_dist.on_ray.work import Outcome, Work

M, K, RESOLUTION, BATCH = 12, 6, 8, 24
SCALE = torch.tensor([0.2, 0.25, 0.3])[:, None, None]


def config(*, updates: int = 12, shards: int = 3, actors: int = 1, seed: int = 0, lr: float = 1e-2, checkpoint_every: int = 4,
           keep: int = 3, decay_updates: int | None = None, every: int = 1000, pool_lr: float = 0.05, slices: int = 1,
           aggregate: str | None = None) -> Config:
    """S shards of 3 ConvNets with batch norm, replaced after 8 steps."""
    pool = PoolSettings(network=NetworkSettings(widths=(4, 8)), size=3, max_steps=8, lr=pool_lr)
    return Config(preset="test", seed=seed, source=SourceSettings(dataset="digits", resolution=RESOLUTION),
                  distill=DistillSettings(m=M, batch=BATCH, updates=updates, decay_updates=decay_updates, lr_x=lr, lr_y=lr, shards=shards,
                                          slices=slices, pool=pool),
                  engine=EngineSettings(actors=actors, aggregate=aggregate, checkpoint_every=checkpoint_every, keep=keep),
                  evaluate=EvaluateSettings(networks=3, every=every))


def start(seed: int = 0) -> tuple[Tensor, Tensor]:
    """X_s [m, 3, 8, 8] and Y_s [m, k]."""
    generator = seeds.torch_rng(seed, "start")
    return torch.randn(M, 3, RESOLUTION, RESOLUTION, generator=generator), torch.randn(M, K, generator=generator)


class Stream:
    """Real batches, each a function of (seed, shard, position). The last of four is short."""

    def __init__(self, seed: int, shard: int, size: int) -> None:
        self._identity, self._size, self._position = (seed, "stream", shard), size, 0

    def next(self) -> tuple[Tensor, Tensor]:
        generator = seeds.torch_rng(*self._identity, self._position)
        size = self._size if self._position % 4 else self._size - 2 - self._identity[2]
        self._position += 1
        return torch.randn(size, 3, RESOLUTION, RESOLUTION, generator=generator), torch.randn(size, K, generator=generator)

    def state(self) -> dict[str, int]:
        return {"batch": self._position}

    def restore(self, state: dict[str, int]) -> None:
        self._position = state["batch"]


@dataclass(frozen=True)
class Parts:
    """Builds the shards of a config. slow: seconds slept in every batch."""

    config: Config
    slow: float = 0.0

    def __call__(self, shard: int) -> Shard:
        settings, pool = self.config.distill, self.config.distill.pool
        stream = self._stream(shard)
        if self.slow:
            read = stream.next
            stream.next = lambda: (time.sleep(self.slow), read())[1]
        return Shard(shard, ModelPool(self._factory, size=pool.size, max_steps=pool.max_steps, lr=pool.lr, momentum=pool.momentum,
                                      weight_decay=pool.weight_decay, seed=self.config.seed, shard=shard), stream, ridge=settings.ridge,
                     slices=settings.slices)

    def slice(self, shard: int, p: int) -> Slice:
        """Slice p of a shard."""
        return Slice(p, self.config.distill.slices, self._factory().network, self._stream(shard))

    def _factory(self) -> torch.nn.Module:
        return networks.with_head(networks.build("convnet", resolution=RESOLUTION, widths=self.config.distill.pool.network.widths), K)

    def _stream(self, shard: int) -> Stream:
        return Stream(self.config.seed, shard, self.config.distill.batch // self.config.distill.shards)


def measure(network: int, values: tuple[Tensor, Tensor], alive: Callable[[], None] = lambda: None) -> float:
    """Stands for a held-out loss: depends on the network, X_s and Y_s."""
    x_syn, y_syn = values
    return float(network + x_syn.abs().mean() + y_syn.abs().mean())


def outer(settings: Config, horizon: int) -> OuterOptimizer:
    """X_s and Y_s at their start."""
    return OuterOptimizer(*start(settings.seed), lr_x=settings.distill.lr_x, lr_y=settings.distill.lr_y, decay_updates=horizon, scale=SCALE)


def serial(settings: Config) -> tuple[Tensor, Tensor]:
    """The same run by the serial loop, in this process."""
    return distill(outer(settings, settings.distill.horizon),
                   [Parts(settings)(shard) for shard in range(settings.distill.shards)], updates=settings.distill.updates)


def run(settings: Config, directory: Path | str, *, build=None, resume: bool = False, measure=None, images: str = "digits") -> Outcome:
    """The run by the engine."""
    return Coordinator(settings, work(settings, build=build, measure=measure), directory=str(directory), data={"images": images},
                       resume=resume).run()


def work(settings: Config, *, build=None, measure=None) -> Work:
    """What the engine has to do."""
    return Work(outer=partial(outer, settings), build=build or Parts(settings), combine=mean, measure=measure,
                warm_up=settings.distill.shards * settings.distill.pool.size * settings.distill.pool.max_steps // 2,
                slices=settings.distill.slices, slice=getattr(build, "slice", Parts(settings).slice))


if __name__ == "__main__":
    import ray

    directory, updates, address = sys.argv[1:]
    torch.set_num_threads(1)
    ray.init(address=address, logging_level="warning", log_to_driver=False)
    settings = config(updates=int(updates), checkpoint_every=3)
    try:
        run(settings, directory, build=Parts(settings, slow=0.02), resume=True)
    except Stopped as stopped:
        sys.exit(stopped.status)

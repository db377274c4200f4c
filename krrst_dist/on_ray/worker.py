"""The actor: hosts logical shards and does what the coordinator asks of them.

Knows its shards and nothing of the others, of the outer optimiser or of the run's progress. Ray makes an actor of
this class (`group.py`); the class itself is plain Python. What is learned ("values": X_s [m, C, H, W], Y_s [m, k], or
what else a method learns) and its gradients come and go as NumPy arrays, which Ray moves without copying.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch
from torch import Tensor

from krrst_dist import storage
from krrst_dist.algorithm import Contribution, DivergedError
from krrst_dist.algorithm.ridge import FeaturesError
from krrst_dist.artifacts import ArtifactError
from krrst_dist.methods.common.protocol import Part
from krrst_dist.provenance import code_fingerprint, versions

Build = Callable[[int], Part]
"""Shard index -> shard. Picklable; called in the actor."""
Do = Callable[[str, Callable[[], None]], None]
"""(chore, alive): computes and stores it. Picklable; called in the actor. It calls `alive` whenever it has got further."""
Measure = Callable[[int, tuple[Tensor, ...], Callable[[], None]], float]
"""(network index, values, alive) -> held-out ridge loss of that network. Picklable; called in the actor. Calls `alive`, too."""


@dataclass(frozen=True)
class Host:
    """Where an actor lives."""

    name: str
    pid: int
    cpu_capability: str
    code: str
    """fingerprint of the krrst_dist it imported"""
    versions: tuple[tuple[str, str], ...]
    """of what results depend on, by name"""

    @classmethod
    def of_this_process(cls) -> Host:
        """Where this process lives."""
        return cls(socket.gethostname(), os.getpid(), torch.backends.cpu.get_cpu_capability(), code_fingerprint(), versions())


@dataclass(frozen=True)
class Packed:
    """A shard's contribution on its way to the coordinator."""

    shard: int
    loss: float
    gradients: tuple[np.ndarray, ...]
    images: int
    retries: int

    @classmethod
    def pack(cls, shard: int, c: Contribution) -> Packed:
        """Contiguous arrays, so that Ray can move them out of band."""
        return cls(shard, c.loss, tuple(g.contiguous().cpu().numpy() for g in c.gradients), c.images, c.retries)

    def unpack(self) -> Contribution:
        """As tensors (copies: what Ray hands out is read-only)."""
        return Contribution(self.loss, _tensors(self.gradients), self.images, self.retries)


@dataclass(frozen=True)
class Answer:
    """What one actor did for one meta-update."""

    parts: tuple[Packed, ...]
    train_seconds: float
    contribute_seconds: float


@dataclass(frozen=True)
class SavedShard:
    """A shard's file in a checkpoint, and its reader's position."""

    shard: int
    name: str
    size: int
    sha256: str
    position: Mapping[str, Any]


class Worker:
    """Some shards in one process.

    What follows an update in a shard is done when the new values arrive, which is with the next call: one round trip
    an update.
    """

    def host(self) -> Host:
        """Where this actor lives."""
        return Host.of_this_process()

    def prepare(self, threads: int) -> None:
        """threads: CPU threads of every computation from here on (they change rounding)."""
        torch.set_num_threads(threads)
        if torch.get_num_interop_threads() != 1:
            torch.set_num_interop_threads(1)
        self._shards: list[Part] = []
        self._signs = 0  # of life, from chores and held-out measurements

    def do(self, chore: str, do: Do) -> None:
        """Something that the shards need before they can be built."""
        do(chore, self._alive)

    def build(self, build: Build, shards: Iterable[int], measure: Measure | None) -> None:
        """Make the shards."""
        self._shards = [build(shard) for shard in shards]
        self._measure = measure
        self._behind: int | None = None  # the update that shards still have to follow up

    def warm_up(self, *values: np.ndarray) -> None:
        """What precedes the first update (KRR-ST: train every pool to its starting ages)."""
        for shard in self._shards:
            shard.warm_up(*_tensors(values))

    def update(self, step: int, *values: np.ndarray) -> Answer:
        """Follow up update step - 1 (KRR-ST: train the models that were used), then take part in update `step`."""
        tensors = _tensors(values)
        started = time.perf_counter()
        self._follow_up(tensors)
        trained = time.perf_counter()
        parts = tuple(Packed.pack(shard.index, shard.contribute(step, *tensors)) for shard in self._shards)
        self._behind = step
        return Answer(parts, trained - started, time.perf_counter() - trained)

    def save(self, directory: str, *values: np.ndarray) -> list[SavedShard]:
        """Write one file a shard, after the last update has been followed up.

        Raises DivergedError, before anything is written, for a shard that cannot be gone on with.
        """
        last = self._behind
        self._follow_up(_tensors(values))
        for shard in self._shards:
            shard.check(last)
        return [_save(shard, directory) for shard in self._shards]

    def restore(self, directory: str, saved: Mapping[int, SavedShard]) -> None:
        """Put every shard where it was when saved. Raises ArtifactError for a file that is not what was written."""
        for shard in self._shards:
            entry = saved[shard.index]
            payload = read_verified(directory, entry.name, entry.size, entry.sha256)
            shard.load_state_dict(safetensors.torch.load(payload), dict(entry.position))
        self._behind = None

    def measure(self, network: int, *values: np.ndarray) -> float:
        """The held-out ridge loss of one network. Touches no shard. Raises DivergedError when there is none."""
        try:
            loss = self._measure(network, _tensors(values), self._alive)
        except (DivergedError, FeaturesError) as error:
            raise DivergedError(f"held-out network {network} diverged while it was trained on (X_s, Y_s) ({error})") from None
        if not math.isfinite(loss):
            raise DivergedError(f"held-out network {network}: its held-out loss is {loss}")
        return loss

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> int:
        """What shards, chores and measurements report while the other methods work: a sign of life."""
        return getattr(self, "_signs", 0) + sum(shard.signs() for shard in getattr(self, "_shards", ()))

    def _alive(self) -> None:
        self._signs += 1

    def _follow_up(self, values: tuple[Tensor, ...]) -> None:
        if self._behind is None:
            return
        for shard in self._shards:
            shard.advance(self._behind, *values)
        self._behind = None


def read_verified(directory: str, name: str, size: int, sha256: str) -> bytes:
    """A checkpoint's file. Raises ArtifactError when it is missing, truncated or altered."""
    uri = storage.join(directory, name)
    try:
        payload = storage.read_whole(uri)
    except FileNotFoundError:
        raise ArtifactError(f"{uri} is missing") from None
    if len(payload) != size:
        raise ArtifactError(f"{uri} has {len(payload)} bytes instead of {size}")
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise ArtifactError(f"{uri} has another checksum than when it was written")
    return payload


def _save(shard: Part, directory: str) -> SavedShard:
    tensors, position = shard.state_dict()
    payload = safetensors.torch.save({name: value.detach().contiguous() for name, value in tensors.items()})
    name = f"shard-{shard.index}.safetensors"
    storage.write_whole(storage.join(directory, name), payload)
    return SavedShard(shard.index, name, len(payload), hashlib.sha256(payload).hexdigest(), position)


def _tensors(arrays: Iterable[np.ndarray]) -> tuple[Tensor, ...]:
    """Copies in torch's own memory: rounding may depend on alignment."""
    return tuple(torch.tensor(array) for array in arrays)

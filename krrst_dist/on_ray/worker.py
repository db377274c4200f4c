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
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import safetensors.torch
import torch
from torch import Tensor

from krrst_dist import storage
from krrst_dist.algorithm import Contribution, DivergedError, Outer
from krrst_dist.algorithm.ridge import FeaturesError
from krrst_dist.artifacts import ArtifactError
from krrst_dist.data.errors import DataError
from krrst_dist.methods.common.protocol import Part
from krrst_dist.on_ray import collective, network
from krrst_dist.on_ray.collective import Combine, Told
from krrst_dist.on_ray.errors import UnfitHost
from krrst_dist.on_ray.shard_log import ShardLogs, ray_log_folder
from krrst_dist.on_ray.sliced import Arrays, BuildSlice, Head, SlicedParts
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
        self._train_seconds = 0.0  # of this update, where it is done by slices
        self._signs = 0  # of life, from chores and held-out measurements

    def do(self, chore: str, do: Do) -> None:
        """Something that the shards need before they can be built. Raises UnfitHost for a DataError."""
        with self._or_unfit():
            do(chore, self._alive)

    def build(self, build: Build, shards: Iterable[int], measure: Measure | None, build_slice: BuildSlice | None = None,
              slices: Iterable[tuple[int, int]] = (), run: str | None = None) -> None:
        """Make the shards, and slices (shard, p) of shards. run: whose logs the shards write to. Raises UnfitHost for a DataError."""
        with self._or_unfit():
            self._shards = [build(shard) for shard in shards]
            built = {(shard, p): build_slice(shard, p) for shard, p in slices}
        self._log = ShardLogs(run, [shard.index for shard in self._shards], ray_log_folder()) if run else None
        self._tell("built")
        self._slices = SlicedParts(self._shards, built)
        self._measure = measure
        self._at: int | None = None  # the last update that the shards took part in
        self._behind = False  # do they still have to follow it up?

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
        parts = tuple(Packed.pack(shard.index, self._contribute(step, shard, tensors)) for shard in self._shards)
        self._at, self._behind = step, True
        return Answer(parts, trained - started, time.perf_counter() - trained)

    def look_ahead(self, step: int) -> None:
        """Do what of update `step` can be done before the one before it has ended."""
        for shard in self._shards:
            shard.look_ahead(step)

    def weights(self, step: int, shard: int, *values: np.ndarray) -> dict[str, np.ndarray]:
        """Follow up update step - 1, then the weights of a shard's model drawn for update `step`. For updates by slices (`sliced.py`)."""
        started = time.perf_counter()
        self._follow_up(_tensors(values))
        self._train_seconds = max(self._train_seconds, time.perf_counter() - started)
        return self._slices.weights(step, shard)

    def features(self, step: int, shard: int, p: int, weights: Mapping[str, np.ndarray] | None, x_syn: np.ndarray) -> Arrays | None:
        """Features of slice p of a shard."""
        return self._slices.features(step, shard, p, weights, *_tensors([x_syn]))

    def solve(self, step: int, shard: int, y_syn: np.ndarray, *features: Arrays) -> tuple[Head, *tuple[np.ndarray, ...]]:
        """A shard's ridge head, given the features of its slices 1..P-1."""
        self._at, self._behind = step, True
        train, self._train_seconds = self._train_seconds, 0.0
        started = time.perf_counter()
        head, *rest = self._slices.solve(step, shard, *_tensors([y_syn]), features, train)
        if self._log:
            self._log.update(shard, step, head.loss, head.images, head.retries, time.perf_counter() - started)
        return head, *rest

    def pull_back(self, step: int, shard: int, p: int, solved: Head | np.ndarray) -> np.ndarray:
        """dL/dX_s in slice p's rows. solved: p of what `solve` gave."""
        return self._slices.pull_back(step, shard, p, solved)

    @contextmanager
    def _or_unfit(self) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            unfit = UnfitHost(str(error))
            unfit.node = self.node()
            raise unfit from error

    def node(self) -> str:
        """Which of the cluster's this actor is on."""
        return ray.get_runtime_context().get_node_id()

    def rendezvous(self, alone: bool) -> str:
        """Where this actor's process can begin a process group. alone: are all of the group on this node?"""
        return network.meeting_place(network.LOOPBACK if alone else ray.util.get_node_ip_address(), ray_log_folder())

    def join(self, place: str, alone: bool, rank: int, world: int, outer: Outer, combine: Combine, device: str) -> None:
        """Enter the process group that process 0 begins at `place`, with a replica of what is learned. For updates by all-reduce
        (`collective.py`)."""
        network.use_device_of(network.LOOPBACK if alone else ray.util.get_node_ip_address())
        collective.join(place, rank, world, torch.device(device))
        self._replica = collective.Replica(outer, combine, torch.device(device))

    def together(self, step: int, last: bool) -> Told:
        """Do meta-update `step`, as all actors do at the same time."""
        self._at = step
        return self._replica.update(step, self._shards, self._contribute, last=last)

    def values(self) -> tuple[np.ndarray, ...] | np.ndarray:
        """What is learned as it is now; a single array where there is but one."""
        values = self._replica.values()
        return values if len(values) > 1 else values[0]

    def outer_state(self) -> dict[str, np.ndarray]:
        """The state of the outer optimiser."""
        return {name: value.cpu().numpy() for name, value in self._replica.outer.state_dict().items()}

    def save(self, directory: str, *values: np.ndarray) -> list[SavedShard]:
        """Write one file a shard, after the last update has been followed up.

        Raises DivergedError, before anything is written, for a shard that cannot be gone on with.
        """
        self._follow_up(_tensors(values))
        for shard in self._shards:
            shard.check(self._at)
        saved = [_save(shard, directory) for shard in self._shards]
        self._tell("saved", self._at)
        return saved

    def restore(self, directory: str, saved: Mapping[int, SavedShard]) -> None:
        """Put every shard where it was when saved. Raises ArtifactError for a file that is not what was written."""
        for shard in self._shards:
            entry = saved[shard.index]
            payload = read_verified(directory, entry.name, entry.size, entry.sha256)
            shard.load_state_dict(safetensors.torch.load(payload), dict(entry.position))
        self._slices.restore({shard: entry.position for shard, entry in saved.items()})
        self._at, self._behind = None, False
        self._tell("restored")

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

    def _contribute(self, step: int, shard: Part, values: tuple[Tensor, ...]) -> Contribution:
        started = time.perf_counter()
        made = shard.contribute(step, *values)
        if self._log:
            self._log.update(shard.index, step, made.loss, made.images, made.retries, time.perf_counter() - started)
        return made

    def _tell(self, event: str, step: int | None = None) -> None:
        if self._log:
            self._log.say(event, step)

    def _follow_up(self, values: tuple[Tensor, ...]) -> None:
        if self._behind:
            for shard in self._shards:
                shard.advance(self._at, *values)
            self._behind = False


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


def saved_as(shard: int) -> str:
    """The name of a shard's file in a checkpoint."""
    return f"shard-{shard}.safetensors"


def _save(shard: Part, directory: str) -> SavedShard:
    tensors, position = shard.state_dict()
    payload = safetensors.torch.save({name: value.detach().contiguous() for name, value in tensors.items()})
    name = saved_as(shard.index)
    storage.write_whole(storage.join(directory, name), payload)
    return SavedShard(shard.index, name, len(payload), hashlib.sha256(payload).hexdigest(), position)


def _tensors(arrays: Iterable[np.ndarray]) -> tuple[Tensor, ...]:
    """Copies in torch's own memory: rounding may depend on alignment."""
    return tuple(torch.tensor(array) for array in arrays)

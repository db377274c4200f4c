"""Signs of life of processes that Ray would wait for without end, also where they stand still or get no further.

Each tells a small actor beside the driver, all the time, that it lives and how far its work is. The driver counts how long it has
looked in vain, not what clocks say: it may have stood still itself.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from krrst_dist.on_ray.errors import EngineError

DEAF, STALLED = 90.0, 21600.0
"""seconds that a process may be silent (Ray itself takes up to 65 to miss a host), and that all of them together may get no further,
which may be fetching a data set, or waiting for another job that computes the same"""
BEAT = 5.0
"""seconds between what a process tells"""
LOOK = 1.0
"""seconds between looks at what they have told"""

GO_ON = "What is finished is kept, and the same command goes on (`krrst distill` with --resume)"

Alive = Callable[[], None]
"""Called by work whenever it has got further."""


class _Told(NamedTuple):
    """What a process has told of itself. signs: times that its work has got further."""

    place: str
    beats: int
    signs: int


class _Heard(NamedTuple):
    """What is known of a process. silent: seconds."""

    told: _Told
    silent: float


class Watch:
    """Watches processes that do pieces of work in `beating`. A piece of work is known by any key of its own."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.ear = _Ear.options(scheduling_strategy=here).remote()
        """what is handed to the processes"""
        self._heard: dict[Hashable, _Heard] = {}
        self._looked, self._still = time.monotonic(), 0.0

    def end(self) -> None:
        """Stop watching."""
        ray.kill(self.ear)

    def place(self, piece: Hashable) -> str:
        """Where it is done, as far as is known."""
        return self._heard[piece].told.place if piece in self._heard else "no host yet"

    def look(self, running: Mapping[Hashable, str], *, moved: bool = False) -> None:
        """Raise EngineError where one of those that run (key -> title) is silent, or all get no further; not more often than makes sense.
        moved: has one ended since the last look, or told the caller something?"""
        self._still = 0.0 if moved else self._still
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        seconds, self._looked = min(now - self._looked, 2 * LOOK), now
        try:
            told = ray.get(self.ear.told.remote(list(running)), timeout=10)
        except RayError:
            return
        before, self._heard = self._heard, {}
        for piece, now_told in told.items():
            quiet = piece in before and before[piece].told.beats == now_told.beats
            self._heard[piece] = _Heard(now_told, before[piece].silent + seconds if quiet else 0.0)
        further = any(piece not in before or heard.told.signs != before[piece].told.signs for piece, heard in self._heard.items())
        self._still = 0.0 if further else self._still + seconds
        for piece, heard in self._heard.items():
            if heard.silent >= DEAF:
                raise EngineError(f"{running[piece]} on {heard.told.place} has not answered for {heard.silent:.0f} s: it has stopped, or "
                                  f"cannot be reached. End it. {GO_ON}")
        if self._still >= STALLED:
            those = ", ".join(f"{title} on {self.place(piece)}" for piece, title in running.items())
            raise EngineError(f"no work has got further for {self._still:.0f} s: {those}; see `ray status`, and whether those hosts reach "
                              f"their data. {GO_ON}")


@ray.remote(num_cpus=0, max_restarts=-1)
class _Ear:
    """What processes have told of themselves."""

    def __init__(self) -> None:
        self._told: dict[Hashable, _Told] = {}

    def tell(self, piece: Hashable, place: str, signs: int) -> None:
        beats = self._told[piece].beats + 1 if piece in self._told else 1
        self._told[piece] = _Told(place, beats, signs)

    def told(self, pieces: Collection[Hashable]) -> dict[Hashable, _Told]:
        return {piece: self._told[piece] for piece in pieces if piece in self._told}


@contextmanager
def beating(ear: ray.actor.ActorHandle, piece: Hashable, every: float) -> Iterator[Alive]:
    """In a process that does a piece of work: tell so, every so many seconds. Gives what the work calls when it has got further."""
    place, signs, over = f"{socket.gethostname()} (process {os.getpid()})", 0, threading.Event()

    def alive() -> None:
        nonlocal signs
        signs += 1

    def beat() -> None:
        ear.tell.remote(piece, place, signs)
        while not over.wait(every):
            ear.tell.remote(piece, place, signs)

    beats = threading.Thread(target=beat, daemon=True, name="signs-of-life")
    beats.start()
    try:
        yield alive
    finally:
        over.set()
        beats.join()

"""Pieces of work on whichever nodes have room, for the stages beside distilling: representations, probes, feature maps.

Ray would wait without end for a process that stands still or gets no further. Here each tells a small actor beside the driver, all the
time, that it lives and how far it is: one that is lost is given out again, one that is silent is named.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from krrst_dist.on_ray.errors import EngineError

DEAF, STALLED = 60.0, 1800.0
"""seconds that a process may be silent, and that all of them together may get no further"""
ATTEMPTS = 3
"""times that a piece of work is given out before its loss is an error"""
_BEAT = 5.0  # seconds between what a process tells
_LOOK = 1.0  # seconds between looks at what they have told

Alive = Callable[[], None]
"""Called by the work whenever it has got further."""
T = TypeVar("T")


def run(work: Callable[..., T], calls: Mapping[str, tuple], *, cpus: int, gpus: float) -> Iterator[tuple[str, T]]:
    """Call `work(*arguments, alive)` for each of `calls` (title -> arguments), as many at a time as there is room for. Gives (title,
    answer) in their order.

    cpus, gpus: of each process. Raises what the work raises, and EngineError, with title and host, where a process is lost again and
    again or is silent.
    """
    errands = _Errands(work, calls, cpus=cpus, gpus=gpus)
    try:
        for title in calls:
            yield title, errands.wait_for(title)
    finally:
        errands.end()


class _Told(NamedTuple):
    """What a process has told of itself."""

    place: str
    beats: int = 0
    signs: int = 0
    """times that its work has got further"""


class _Errand:
    """A piece of work that has been given out, `attempt` times so far."""

    def __init__(self, title: str) -> None:
        self.title, self.attempt, self.told, self.silent = title, 0, _Told("no host yet"), 0.0

    def hear(self, told: _Told | None, seconds: float) -> None:
        """What it has told by now. seconds: since the last look."""
        if told is not None:
            self.silent = self.silent + seconds if told.beats == self.told.beats else 0.0
            self.told = told

    def __str__(self) -> str:
        return f"{self.title} on {self.told.place}"


class _Errands:
    """All of them, and who watches them."""

    def __init__(self, work: Callable, calls: Mapping[str, tuple], *, cpus: int, gpus: float) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._watch = _Watch.options(scheduling_strategy=here).remote()
        self._task = _do.options(num_cpus=cpus, num_gpus=gpus)
        self._work, self._calls = work, calls
        self._answers: dict[str, Any] = {}
        self._running: dict[ray.ObjectRef, _Errand] = {}
        self._looked, self._still = time.monotonic(), 0.0
        for title in calls:
            self._give(_Errand(title))

    def end(self) -> None:
        """Stop what still runs."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        ray.kill(self._watch)

    def wait_for(self, title: str) -> Any:
        """Its answer."""
        while title not in self._answers:
            ended, _ = ray.wait(list(self._running), timeout=_LOOK)
            for reference in ended:
                self._take(reference, self._running.pop(reference))
                self._still = 0.0
            self._look()
        return self._answers.pop(title)

    def _give(self, errand: _Errand) -> None:
        errand.attempt += 1
        errand.told, errand.silent = _Told("no host yet"), 0.0
        name = errand.title, errand.attempt
        self._running[self._task.remote(self._work, self._calls[errand.title], self._watch, name, _BEAT)] = errand

    def _take(self, reference: ray.ObjectRef, errand: _Errand) -> None:
        try:
            self._answers[errand.title] = ray.get(reference)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            why = str(error).strip().splitlines()[-1]
            if errand.attempt >= ATTEMPTS:
                raise EngineError(f"{errand} was lost {errand.attempt} times, the last time for this: {why}; see that host's memory and "
                                  f"logs. The same command with --resume goes on") from error
            print(f"{errand} was lost ({why}); it is given out again", flush=True)
            self._give(errand)

    def _look(self) -> None:
        """Raise EngineError where one is silent, or all get no further, for as long as this process has looked: it may have stood still."""
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, 2 * _LOOK), now
        try:
            told = ray.get(self._watch.all.remote(), timeout=10)
        except (RayError, GetTimeoutError):
            return
        before = self._signs()
        for errand in self._running.values():
            errand.hear(told.get((errand.title, errand.attempt)), seconds)
            if errand.silent >= DEAF:
                raise EngineError(f"{errand} has not answered for {errand.silent:.0f} s: it has stopped, or cannot be reached. End it; the "
                                  f"same command with --resume goes on")
        self._still = self._still + seconds if self._signs() == before else 0.0
        if self._still >= STALLED:
            those = ", ".join(map(str, self._running.values()))
            raise EngineError(f"no work has got further for {self._still:.0f} s: {those}; see `ray status`, and whether those hosts reach "
                              f"their data. The same command with --resume goes on")

    def _signs(self) -> int:
        return sum(errand.told.signs for errand in self._running.values())


@ray.remote(num_cpus=0)
class _Watch:
    """What processes have told of themselves, by errand and attempt."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], _Told] = {}

    def tell(self, errand: tuple[str, int], place: str, signs: int) -> None:
        self._told[errand] = _Told(place, self._told.get(errand, _Told(place)).beats + 1, signs)

    def all(self) -> dict[tuple[str, int], _Told]:
        return self._told


@ray.remote(max_retries=0)
def _do(work: Callable, arguments: tuple, watch: ray.actor.ActorHandle, errand: tuple[str, int], every: float) -> Any:
    place, signs, over = f"{socket.gethostname()} (process {os.getpid()})", 0, threading.Event()

    def alive() -> None:
        nonlocal signs
        signs += 1

    def beat() -> None:
        watch.tell.remote(errand, place, signs)
        while not over.wait(every):
            watch.tell.remote(errand, place, signs)

    beats = threading.Thread(target=beat, daemon=True, name="signs-of-life")
    beats.start()
    try:
        return work(*arguments, alive)
    finally:
        over.set()
        beats.join()

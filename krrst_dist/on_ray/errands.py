"""Pieces of work on whichever nodes have room, for the stages beside distilling: representations, probes, feature maps.

One whose process is lost is given out again. One that is silent ends them all, and so do all when none gets further: with their
names (`signs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from krrst_dist.on_ray import signs
from krrst_dist.on_ray.errors import EngineError, last_line
from krrst_dist.on_ray.signs import GO_ON, Watch, beating

ATTEMPTS = 3
"""times that a piece of work is given out before its loss is an error"""
T = TypeVar("T")


class _Piece(NamedTuple):
    """A piece of work that has been given out for the `attempt`-th time."""

    title: str
    attempt: int = 1


def run(work: Callable[..., T], calls: Mapping[str, tuple], *, cpus: int, gpus: float) -> Iterator[tuple[str, T]]:
    """Call `work(*arguments, alive)` for each of `calls` (title -> arguments), as many at a time as there is room for. Gives (title,
    answer) in their order.

    cpus, gpus: of each process. Raises what the work raises, and EngineError, with title and host, where a process is lost again and
    again or is silent, or where none gets further.
    """
    errands = _Errands(work, calls, cpus=cpus, gpus=gpus)
    try:
        for title in calls:
            yield title, errands.wait_for(title)
    finally:
        errands.end()


class _Errands:
    """All of them, and who watches them."""

    def __init__(self, work: Callable, calls: Mapping[str, tuple], *, cpus: int, gpus: float) -> None:
        self._work, self._calls, self._watch = work, calls, Watch()
        self._task = _do.options(num_cpus=cpus, num_gpus=gpus)
        self._answers: dict[str, Any] = {}
        self._running: dict[ray.ObjectRef, _Piece] = {}
        for title in calls:
            self._give(_Piece(title))

    def end(self) -> None:
        """Stop what still runs."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        self._watch.end()

    def wait_for(self, title: str) -> Any:
        """Its answer."""
        while title not in self._answers:
            ended, _ = ray.wait(list(self._running), timeout=signs.LOOK)
            for reference in ended:
                self._take(reference, self._running.pop(reference))
            self._watch.look({piece: piece.title for piece in self._running.values()}, moved=bool(ended))
        return self._answers.pop(title)

    def _give(self, piece: _Piece) -> None:
        self._running[self._task.remote(self._work, self._calls[piece.title], piece, self._watch.ear, signs.BEAT)] = piece

    def _take(self, reference: ray.ObjectRef, piece: _Piece) -> None:
        try:
            self._answers[piece.title] = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, RayError):
                raise EngineError(f"{piece.title} on {self._watch.place(piece)} could not do its work: {last_line(error)}") from error
            raise error.cause from error
        except RayError as error:
            lost, why = f"{piece.title} on {self._watch.place(piece)} was lost", last_line(error)
            if piece.attempt >= ATTEMPTS:
                raise EngineError(f"{lost}, {ATTEMPTS} times in all: {why}; see that host's memory and logs. {GO_ON}") from error
            print(f"{lost} ({why}); it is given out again", flush=True)
            self._give(_Piece(piece.title, piece.attempt + 1))


@ray.remote(max_retries=0)
def _do(work: Callable, arguments: tuple, piece: _Piece, ear: ray.actor.ActorHandle, every: float) -> Any:
    with beating(ear, piece, every) as alive:
        return work(*arguments, alive)

"""The actors of a run as one thing: start them, call them all, notice when one is gone, stop them.

Owns every wait: none is without a deadline, and a wait that fails says which actor was silent. A killed process is noticed
in seconds (by Ray), a stopped one or a host that is cut off within about a minute (DEAF), an actor that answers but gets no
further after STEP seconds or 20 of the slowest updates (START outside of updates). Knows nothing of the algorithm. An
actor's death is `LostActor` (worth another try with fresh actors); an exception raised by our own code in an actor arrives
as itself.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from krrst_dist.on_ray.errors import EngineError, LostActor, last_line
from krrst_dist.on_ray.sliced import BuildSlice, Layout
from krrst_dist.on_ray.worker import Build, Host, Measure, Worker

START = 1800.0
"""seconds of silence allowed to an actor that starts, warms up, saves, restores or measures"""
STEP = 300.0
"""seconds of silence allowed in a meta-update, or 20 of the slowest one so far"""
DEAF = 45.0
"""seconds that an actor may leave the question for a sign of life without any answer. It is answered beside the work: an actor that works
for long does answer, if late where native code holds Python's lock; one that has been stopped, or whose host is cut off, does not"""
_PULSE = 5.0  # seconds between signs of life
_SAY = 30.0  # seconds between the lines of a start that takes long
_LOST = (exceptions.RayActorError, exceptions.GetTimeoutError, exceptions.ObjectLostError, exceptions.NodeDiedError,
         exceptions.OutOfMemoryError, exceptions.WorkerCrashedError)
PINNED = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")  # what makes CPUs of several kinds round alike


def silence_allowed(slowest: float) -> float:
    """Seconds of silence allowed in a meta-update. slowest: seconds of the slowest one so far, 0 before the first."""
    return max(STEP, 20 * slowest) if slowest else START


class Actor(Worker):
    """A worker in a process of its own, for which SIGTERM is the notice that its host will be taken away."""

    def __init__(self) -> None:
        self._notice = False
        signal.signal(signal.SIGTERM, self._take_notice)  # Ray makes actors in the main thread, and would end this one

    def _take_notice(self, *_: object) -> None:
        self._notice = True

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> tuple[int, bool]:
        """Signs of life, and whether notice has been given."""
        return super().pulse(), self._notice


class WorkerGroup:
    """G actors that host the shards and slices of a layout. Use as a context manager: the actors end with the block.

    threads: CPU threads, and CPUs asked of Ray, an actor; gpus: GPUs an actor. stop: asked once a second; when true, waits end in
    KeyboardInterrupt. room: where the actors go, one to a bundle (`rooms.Rooms`); None: wherever Ray finds room, and waits for it.
    say: told what a start that takes long is waiting for.
    """

    def __init__(self, layout: Layout, *, threads: int, gpus: float = 0, stop: Callable[[], bool] | None = None,
                 room: PlacementGroup | None = None, say: Callable[[str], None] | None = None) -> None:
        self.layout, self._threads, self._stop = layout, threads, stop or (lambda: False)
        self.device = "cuda" if gpus else "cpu"
        self._room, self._say = room, say or (lambda line: None)
        self._hosts: list[Host] = []
        self._nodes: dict[int, str] = {}  # of each actor, where it is known
        pinned = {name: os.environ[name] for name in PINNED if name in os.environ}
        actor = ray.remote(concurrency_groups={"pulse": 1})(Actor)
        options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": 0, "runtime_env": {"env_vars": pinned} if pinned else None}
        places = [{} if room is None else {"scheduling_strategy": PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=g)}
                  for g in range(layout.actors)]
        self._workers = [actor.options(**options, **place).remote() for place in places]
        self._pulses = [_Pulse() for _ in places]
        self._looked = time.monotonic()  # for notices

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            ray.kill(worker, no_restart=True)

    def start(self) -> list[Host]:
        """Wait for the actors. Returns where they live."""
        calls = [(g, worker.host.remote()) for g, worker in enumerate(self._workers)]
        self._hosts = self.gather(calls, silence=START, starting="to start")
        self._nodes = placement_group_table(self._room)["bundles_to_node_id"] if self._room is not None else {}
        self.everywhere("prepare", self._threads, silence=START)
        return self._hosts

    def build(self, build: Build, measure: Measure | None = None, build_slice: BuildSlice | None = None, run: str | None = None) -> None:
        """Let the actors build their shards and slices. run: whose logs the shards write to (`shard_log.py`); None: none."""
        calls = [(g, worker.build.remote(build, self.layout.shards_of(g), measure, build_slice, self.layout.slices_of(g), run))
                 for g, worker in enumerate(self._workers)]
        self.gather(calls, silence=START, starting="to open its data and make its models")

    def call(self, actor: int, method: str, *arguments: Any, returns: int = 1) -> Any:
        """Call a method on one actor: the reference to its answer, or `returns` of them. To be waited for with `gather`."""
        return getattr(self._workers[actor], method).options(num_returns=returns).remote(*arguments)

    def notice(self) -> str | None:
        """Who will be taken away, if anybody: a process that got SIGTERM, a node that is drained. Costs nothing most of the time."""
        if time.monotonic() - self._looked < _PULSE:
            return None
        self._looked = time.monotonic()
        self._pulse(_PULSE)
        draining = state.get_draining_nodes()
        for g, pulse in enumerate(self._pulses):
            if pulse.notice or self._nodes.get(g) in draining:
                return f"{self._describe(g)} will be taken away"
        return None

    def everywhere(self, method: str, *arguments: Any, silence: float, on_pulse: Callable[[int], None] | None = None) -> list[Any]:
        """Call a method on all actors; their answers in actor order."""
        return self.gather(self.ask(method, *arguments), silence=silence, on_pulse=on_pulse)

    def ask(self, method: str, *arguments: Any) -> list[tuple[int, ray.ObjectRef]]:
        """Call a method on all actors, without waiting: (actor, reference), for `gather`."""
        return [(g, self.call(g, method, *arguments)) for g in range(self.layout.actors)]

    def spread(self, method: str, items: Sequence[Any], *arguments: Any, silence: float,
               on_answer: Callable[[int], None] | None = None) -> list[Any]:
        """Call a method once an item, the items dealt out to the actors; the answers in item order."""
        calls = [(i % self.layout.actors, self.call(i % self.layout.actors, method, item, *arguments)) for i, item in enumerate(items)]
        return self.gather(calls, silence=silence, on_answer=on_answer)

    def gather(self, calls: Sequence[tuple[int, ray.ObjectRef]], *, silence: float, on_pulse: Callable[[int], None] | None = None,
               on_answer: Callable[[int], None] | None = None, starting: str | None = None) -> list[Any]:
        """Wait for calls given as (actor, reference).

        silence: seconds in which either an answer or a sign of life must come.
        on_pulse: told now and then how many signs of life all actors have given. on_answer: told how many calls are answered.
        starting: what an actor that has just been made is to do; said where it takes long.
        """
        answers: dict[ray.ObjectRef, Any] = {}
        pending = {reference: actor for actor, reference in calls}
        last_sign = last_pulse = said = time.monotonic()
        steps = 0
        while pending:
            ready, _ = ray.wait(list(pending), timeout=1.0)
            now = time.monotonic()
            if self._stop():
                raise KeyboardInterrupt
            for reference in ready:
                answers[reference] = self._get(reference, pending.pop(reference), silence)
                last_sign = now
            if ready and on_answer:
                on_answer(len(answers))
            if ready or now - last_pulse < (every := min(_PULSE, silence)):
                continue
            if starting and now - said >= _SAY:
                said = now
                self._require_room(min(pending.values()))
                self._say(f"waiting for {self._describe(min(pending.values()))} {starting}")
            before, steps, last_pulse = steps, self._pulse(every), now
            if steps > before:
                last_sign = now
                if on_pulse:
                    on_pulse(steps)
            elif now - last_sign >= silence:
                raise LostActor(f"{self._describe(min(pending.values()))} gave no sign of life for {silence:.0f} s")
        return [answers[reference] for _, reference in calls]

    def _get(self, reference: ray.ObjectRef, actor: int, timeout: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, _LOST):  # what it was to work on was another one's
                raise LostActor(f"{self._describe(self._who(error.cause, actor))} was lost: {last_line(error)}") from error
            if isinstance(error.cause, exceptions.RayError):
                raise EngineError(f"{self._describe(actor)} could not take its work: {last_line(error)}") from error
            raise error.cause from error
        except _LOST as error:
            raise LostActor(f"{self._describe(self._who(error, actor))} was lost: {last_line(error)}") from error

    def _who(self, lost: Exception, asked: int) -> int:
        """The actor that an error is about, as far as it says so."""
        actors = [worker._actor_id.hex() for worker in self._workers]
        return actors.index(lost.actor_id) if getattr(lost, "actor_id", None) in actors else asked

    def _require_room(self, actor: int) -> None:
        """Raise LostActor when the actors' room has gone with a host."""
        if self._room is not None and placement_group_table(self._room).get("state") != "CREATED":
            raise LostActor(f"{self._describe(actor)} has lost its host before it started")

    def _pulse(self, seconds: float) -> int:
        """Signs of life so far, over all actors. seconds: since this was asked last.

        Raises LostActor for one that was there and has been deaf for too long: by questions, as this process may have been stopped itself.
        """
        for worker, pulse in zip(self._workers, self._pulses, strict=True):
            pulse.asked = pulse.asked or worker.pulse.remote()
        ready, _ = ray.wait([pulse.asked for pulse in self._pulses], num_returns=len(self._pulses), timeout=1.0)
        for g, pulse in enumerate(self._pulses):
            pulse.hear(seconds, answered=pulse.asked in ready)
            if self._hosts and pulse.deaf >= DEAF:
                raise LostActor(f"{self._describe(g)} has not answered for {pulse.deaf:.0f} s: it has stopped, or cannot be reached")
        return sum(pulse.signs for pulse in self._pulses)

    def _describe(self, actor: int) -> str:
        host = f" on {self._hosts[actor].name} (process {self._hosts[actor].pid})" if self._hosts else ""
        hosted = [("shard(s)", map(str, self.layout.shards_of(actor))),
                  ("slice(s)", (f"{p} of shard {shard}" for shard, p in self.layout.slices_of(actor)))]
        return f"actor {actor} with " + " and ".join(f"{what} {', '.join(which)}" for what, which in
                                                     ((what, list(which)) for what, which in hosted) if which) + host


@dataclass
class _Pulse:
    """What is known of an actor's life."""

    signs: int = 0
    notice: bool = False
    deaf: float = 0.0  # seconds
    asked: ray.ObjectRef | None = None

    def hear(self, seconds: float, *, answered: bool) -> None:
        """An answer, or the lack of one for so many seconds more."""
        if not answered:
            self.deaf += seconds
            return
        with suppress(exceptions.RayError):  # the call that is waited for will say so
            self.signs, self.notice = ray.get(self.asked, timeout=1.0)
        self.deaf, self.asked = 0.0, None

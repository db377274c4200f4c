"""Room on the cluster, asked for beforehand and held while it is used.

Ray itself waits silently for resources that may never come; here a cluster that is too small is refused, with what is
missing, unless it is one that grows. Does not know what the actors do.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import state
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from krrst_dist.on_ray.cluster import ClusterError

AT_ONCE = 5.0
"""seconds in which a cluster gives room that it has"""
FIRST_LINE, QUEUED = 5.0, 300.0
"""seconds until a wait is announced, and between the lines of a run that waits for another run of the same job"""


def require(cpus: int, gpus: float, actors: int, wait: bool = False, deadline_s: float = 30) -> None:
    """Make sure that the cluster has room, now, for `actors` processes of `cpus` CPUs and `gpus` GPUs each.

    wait: for a cluster that grows: ask for the room and wait for it as long as it takes, saying so every `deadline_s`.

    Raises ClusterError when the nodes are too few or too small (at once), or too busy (after `deadline_s`).
    """
    with Rooms(cpus, gpus, actors, wait=wait, deadline_s=deadline_s).take():
        pass


@dataclass(frozen=True)
class Room:
    """What a run holds: room for `actors` processes, process g in bundle g of `group`. more: asked for, for those that it lacks."""

    group: PlacementGroup
    actors: int
    more: Sequence[PlacementGroup] = ()

    def has_grown(self) -> bool:
        """Is there room, now, for more of the processes that the run wants?"""
        return any(placement_group_table(each).get("state") == "CREATED" for each in self.more)


class Rooms:
    """Room on the cluster for the runs of one job, each with `actors` processes of `cpus` CPUs and `gpus` GPUs.

    A run holds its room from before its actors start until it ends, so that no actor waits for one of another run. at_least: processes
    that a run starts with where there is no room for all; default: all. wait, deadline_s: as in `require`. May be used by several threads.
    A host that has been found unfit can be left out of all room that is taken from then on.
    """

    def __init__(self, cpus: int, gpus: float, actors: int, *, at_least: int | None = None, wait: bool = False,
                 deadline_s: float = 30) -> None:
        self._cpus, self._gpus, self._wanted, self._wait, self._deadline = cpus, gpus, actors, wait, deadline_s
        self._actors = at_least or actors
        self._bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._held, self._lock = 0, threading.Lock()
        self._unfit: dict[str, str] = {}  # node -> why

    def leave_out(self, node: str, why: str) -> bool:
        """Take no room on a node of the cluster any more, if the others have room for a run. Have they?"""
        with self._lock:
            unfit = self._unfit | {node: why}
            if capacity(cpus=self._cpus, gpus=self._gpus, but=unfit) < self._actors:
                return False
            self._unfit = unfit
        return True

    @contextmanager
    def take(self, *, stop: Callable[[], bool] = lambda: False, patience: float = 0,
             say: Callable[[str], None] | None = None) -> Iterator[Room]:
        """One run's room. Waits for it, and says so, as long as a run of this job holds room that it will leave, or a cluster that
        grows is waited for.

        stop: when true, the wait ends in KeyboardInterrupt. patience: seconds that a cluster which has just lost a host has to
        replace it, before it counts as too small.

        Raises ClusterError when nothing will make room: nodes are too few or too small, or too busy with other things.
        """
        if not (self._wait or self._held or patience):
            self._refuse_if_small()
        most = max(self._actors, min(self._wanted, self._capacity()))
        for actors in range(most, self._actors - 1, -1):
            with self._placed(actors) as group:
                if actors == self._actors:
                    self._wait_for(group, stop, patience, say or _print)
                elif not group.wait(AT_ONCE):
                    continue
                else:
                    self._count(1)
                try:
                    with ExitStack() as asked:
                        more = [asked.enter_context(self._placed(1)) for _ in range(self._wanted - actors)]
                        yield Room(group, actors, more)
                finally:
                    self._count(-1)
                return

    def _wait_for(self, group: PlacementGroup, stop: Callable[[], bool], patience: float, say: Callable[[str], None]) -> None:
        began = time.monotonic()
        say_at = began + min(FIRST_LINE, self._deadline)
        while not group.wait(1):
            now = time.monotonic()
            if stop():
                raise KeyboardInterrupt
            queued = self._held > 0
            if queued:
                began = now  # when that run ends, it is our turn
            if not (self._wait or queued):
                if now - began >= patience:
                    self._refuse_if_small()
                if now - began >= max(patience, self._deadline):
                    raise ClusterError(f"{self}: the cluster is large enough ({_offered()}) but was too busy for {now - began:.0f} s: "
                                       f"{_free()} are free; see `ray status` for what uses it, stop that, or pass --wait")
            if now >= say_at:
                say_at = now + (QUEUED if queued else self._deadline)
                until = "; a run of this job that holds room goes first" if queued else ""
                say(f"waiting for {self}: {_free()} are free; the cluster offers {_offered()}{until}")
        self._count(1)

    @contextmanager
    def _placed(self, actors: int) -> Iterator[PlacementGroup]:
        fit = [{"ray.io/node-id": f"!in({','.join(self._unfit)})"}] * actors if self._unfit else None
        group = placement_group([self._bundle] * actors, strategy="PACK", bundle_label_selector=fit)
        try:
            yield group
        finally:
            remove_placement_group(group)

    def _capacity(self) -> int:
        return capacity(cpus=self._cpus, gpus=self._gpus, but=self._unfit)

    def _refuse_if_small(self) -> None:
        missing = self._actors - self._capacity()
        if missing > 0:
            unfit = "".join(f"; left out is a host for this: {why}" for why in self._unfit.values())
            raise ClusterError(f"{self} do not fit: the cluster lacks room for {missing} of them ({missing * self._cpus} CPUs and "
                               f"{missing * self._gpus:g} GPUs); its nodes offer {_offered()}{unfit}. Lower engine.actors (or "
                               f"engine.min_actors), engine.threads or engine.gpus (of a grid: cpus, gpus), add nodes, or pass --wait if "
                               f"the cluster grows by itself")

    def __str__(self) -> str:
        return f"{self._actors} actors of {self._cpus} CPUs and {self._gpus:g} GPUs each"

    def _count(self, more: int) -> None:
        with self._lock:
            self._held += more


def capacity(*, cpus: int, gpus: float, but: Container[str] = ()) -> int:
    """How many processes of `cpus` CPUs and `gpus` GPUs the cluster's nodes hold when nothing else runs. but: nodes that do not count."""
    return sum(room(node["Resources"], cpus=cpus, gpus=gpus) for node in _nodes() if node["NodeID"] not in but)


def _offered() -> str:
    return "; ".join(f"{node['NodeManagerAddress']}: {node['Resources'].get('CPU', 0):g} CPUs, {node['Resources'].get('GPU', 0):g} GPUs"
                     for node in _nodes())


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def _print(line: str) -> None:
    print(line, flush=True)


def _nodes() -> list[dict[str, Any]]:
    """What Ray says of each node that lives and will not be taken away."""
    leaving = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def room(offer: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """How many actors fit on an empty node that offers these resources. A fraction of a GPU is of one GPU."""
    by_cpu = int(offer.get("CPU", 0) // cpus)
    if gpus == 0:
        return by_cpu
    count = offer.get("GPU", 0)
    by_gpu = int(count) * math.floor(1 / gpus + 1e-9) if gpus < 1 else int(count // gpus)
    return min(by_cpu, by_gpu)

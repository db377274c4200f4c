"""Writes the parts of a prepared split on all nodes of the cluster that can: those that see the images, and the cache's folder.

Each node is asked first. Then every part is a task on a node of our choice: one that is lost is given out again, the others are
not disturbed. How a part is written is in `data/part.py`.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import DataError
from krrst_dist.data.part import PartJob, Watch
from krrst_dist.data.prepare import in_this_process
from krrst_dist.data.prepared import Part
from krrst_dist.data.readers import Images
from krrst_dist.on_ray import rooms
from krrst_dist.on_ray.errors import EngineError, last_line
from krrst_dist.storage import StorageError

ANSWER, STALLED = 120.0, 600.0
"""seconds that a node has to say whether it sees the images, and that all tasks together may go without finishing an image"""
ATTEMPTS = 3
"""times that a part is given out before its loss is an error"""
_LOOKED_AT = 100  # images, whose files a node is asked for


@dataclass(frozen=True)
class _Node:
    id: str
    host: str
    cpus: int


def write_parts(jobs: Sequence[PartJob], watch: Watch, *, wait: bool = False) -> Iterator[Part]:
    """`Writers`: as tasks, where the cluster has nodes and CPUs to share out; otherwise in this process.

    wait: for room on a cluster that grows. Raises DataError, StorageError with the host; EngineError where tasks are lost or stall;
    ClusterError where there is no room.
    """
    nodes = _able(jobs) if len(jobs) > 1 else []
    cpus = sum(node.cpus for node in nodes)
    if cpus < 2:
        yield from in_this_process(jobs, watch)
        return
    threads = max(1, min(cpus // len(jobs), *(node.cpus for node in nodes)))
    rooms.require(threads, 0, 1, wait)
    hosts = ", ".join(f"{node.host} ({node.cpus // threads} at a time)" for node in nodes)
    print(f"{len(jobs)} parts are written by {hosts}", flush=True)
    with _Tasks(nodes, threads) as tasks:
        yield from tasks.run(jobs, watch)


class _Tasks:
    """The tasks under way. Leaving the block ends them."""

    def __init__(self, nodes: Sequence[_Node], threads: int) -> None:
        self._threads = threads
        self._free = {node: node.cpus // threads for node in nodes}
        self._running: dict[ray.ObjectRef, tuple[PartJob, _Node]] = {}
        self._counter = _Counter.options(scheduling_strategy=_at(ray.get_runtime_context().get_node_id(), soft=True)).remote()

    def __enter__(self) -> _Tasks:
        return self

    def __exit__(self, *_: object) -> None:
        for reference in self._running:
            ray.cancel(reference, force=True)
        ray.kill(self._counter)

    def run(self, jobs: Sequence[PartJob], watch: Watch) -> Iterator[Part]:
        waiting, attempts, finished = deque(jobs), Counter(), 0
        seen, moved = 0, time.monotonic()  # images done when it last went forward, and when that was
        while waiting or self._running:
            while waiting and (node := self._roomy()):
                job = waiting.popleft()
                attempts[job.name] += 1
                self._start(job, node)
            done, _ = ray.wait(list(self._running), timeout=1)
            for reference in done:
                job, node = self._running.pop(reference)
                try:
                    part = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause from error
                except RayError as error:
                    self._lost(job, node, attempts[job.name], last_line(error))
                    waiting.append(job)
                else:
                    if node in self._free:
                        self._free[node] += 1
                    finished += len(job.images)
                    moved = time.monotonic()
                    yield part
            images = finished + self._under_way()
            watch(images)
            if images > seen or done:
                seen, moved = images, time.monotonic()
            elif time.monotonic() - moved > STALLED:
                hosts = ", ".join(sorted({f"{job.name} on {node.host}" for job, node in self._running.values()}))
                raise EngineError(f"preparing: no image was finished for {STALLED:.0f} s ({hosts}); see `ray status`, and whether those "
                                  f"hosts reach the images and the storage. What is finished is kept, the same command goes on")

    def _start(self, job: PartJob, node: _Node) -> None:
        self._free[node] -= 1
        how = {"num_cpus": self._threads, "max_retries": 0, "scheduling_strategy": _at(node.id)}
        self._running[_write.options(**how).remote(job, self._threads, self._counter)] = job, node

    def _roomy(self) -> _Node | None:
        """The node with the most room for another task, if there is one."""
        node = max(self._free, key=self._free.get)
        return node if self._free[node] > 0 else None

    def _lost(self, job: PartJob, node: _Node, attempt: int, why: str) -> None:
        alive = {found["NodeID"] for found in ray.nodes() if found["Alive"]}
        if node.id in alive:
            self._free[node] += 1
        else:
            self._free.pop(node, None)
        if attempt >= ATTEMPTS or not self._free:
            raise EngineError(f"preparing {job.name} was lost {attempt} times, the last time on {node.host}: {why}; see that host's memory "
                              f"and logs. What is finished is kept, the same command goes on")
        print(f"the task that wrote {job.name} on {node.host} was lost ({why}); it is given out again", flush=True)

    def _under_way(self) -> int:
        """Images done in tasks that go on."""
        try:
            done = ray.get(self._counter.done.remote(), timeout=10)
        except (RayError, GetTimeoutError):  # it only serves the progress bar
            return 0
        return sum(done.get(job.name, 0) for job, _ in self._running.values())


@ray.remote(num_cpus=0)
class _Counter:
    """Images done, by part."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}

    def tell(self, name: str, done: int) -> None:
        self._done[name] = done

    def done(self) -> dict[str, int]:
        return self._done


@ray.remote
def _write(job: PartJob, threads: int, counter: ray.actor.ActorHandle) -> Part:
    told = time.monotonic()

    def watch(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > 1:
            told = time.monotonic()
            counter.tell.remote(job.name, done)

    try:
        job.images.require_there()
        return job.write(threads=threads, watch=watch)
    except (DataError, StorageError) as error:
        raise type(error)(f"{socket.gethostname()}: {error}") from error


@ray.remote(num_cpus=0, max_retries=0)
def _look(images: Images, probe: Path | None) -> str | None:
    """Why this node cannot write parts; None: it can. Needs no more than the readers: it is to answer soon."""
    try:
        images.require_there()
    except DataError as error:
        return str(error)
    if probe is not None and not probe.exists():
        return f"{probe.parent} is another folder there; give --cache one that all nodes share, or --out a storage URI, to have it help"
    return None


def _able(jobs: Sequence[PartJob]) -> list[_Node]:
    """The nodes that see the first images, and the folder that parts are written to where nothing carries them from node to node."""
    nodes = [_Node(node["NodeID"], node["NodeManagerHostname"], int(node["Resources"].get("CPU", 0)))
             for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    images = jobs[0].images.some(0, min(_LOOKED_AT, len(jobs[0].images)))
    with _probe(jobs[0].cache) as probe:
        asked = {node: _look.options(scheduling_strategy=_at(node.id)).remote(images, probe) for node in nodes}
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER)
        why = {node: _answer(reference) for node, reference in asked.items()}
    for node, reason in why.items():
        if reason is not None:
            print(f"{node.host} writes no parts: {reason}", flush=True)
    return [node for node, reason in why.items() if reason is None]


@contextmanager
def _probe(cache: Cache) -> Iterator[Path | None]:
    """A file in the cache's folder, by which a node knows it; None where that need not be the same folder for all."""
    if cache.remote is not None:
        yield None
        return
    probe = cache.local / f".probe-{uuid.uuid4().hex}"
    probe.touch()
    try:
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def _answer(reference: ray.ObjectRef) -> str | None:
    try:
        return ray.get(reference, timeout=1)
    except GetTimeoutError:
        with suppress(RayError):
            ray.cancel(reference, force=True)
        return f"no answer within {ANSWER:.0f} s"
    except RayError as error:
        return last_line(error)


def _at(node: str, *, soft: bool = False) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=soft)

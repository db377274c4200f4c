"""The Ray cluster a run uses: joined or started, and asked beforehand whether it can hold the run.

Ray itself waits silently for resources that may never come; here a cluster that is too small is refused, with what is
missing, unless it is one that grows. Does not know what the actors do.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from krrst_dist.on_ray.errors import EngineError
from krrst_dist.paths import PROJECT

AT_ONCE = 5.0
"""seconds in which a cluster gives room that it has"""
FIRST_LINE, QUEUED = 5.0, 300.0
"""seconds until a wait is announced, and between the lines of a run that waits for another run of the same job"""


class ClusterError(ValueError):
    """The cluster cannot be joined or cannot hold the run: says what is missing and what to do."""


def connect(address: str | None = None, num_cpus: int | None = None) -> None:
    """Join a cluster, or start one on this machine; nothing happens when this process is in one already.

    address: of a running cluster (host:port); default: the job's cluster or $RAY_ADDRESS. Without either a one-machine
        cluster is started in this process and ends with it, with token authentication on and telemetry off.
    num_cpus: CPUs that the one-machine cluster offers; default: all of the machine's. Ignored when joining.

    Raises ClusterError when there is no cluster at the address.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        start_local(num_cpus=num_cpus)
        return
    try:
        _knock(address)
        with _keeping_sigterm():
            ray.init(address=address, logging_level="error", runtime_env=KNOWING)
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"RAY_ADDRESS = {address!r}: cannot join a cluster there ({error}); check the address (host:port, `ray status`) "
                           f"and, if it uses tokens, set RAY_AUTH_MODE=token") from error


def at_hand() -> bool:
    """Is this process in a cluster, or told of one?"""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def _knock(address: str) -> None:
    """Fail in seconds where nobody listens; Ray itself tries for minutes. Raises OSError, ValueError."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host, int(port)), timeout=10).close()


def start_local(*, num_cpus: int | None = None) -> None:
    """Start a one-machine cluster that ends with this process.

    Its workers import the code that this process runs, also where another copy is installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    with _keeping_sigterm():  # with its dashboard, which Ray Train asks for the state of its own actors
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, logging_level="error", runtime_env=KNOWING)


def leave() -> None:
    """Leave the cluster, and end it where this process started it. After an interrupt: a thread that still waits for an answer of the
    cluster when Python ends would take the process down with an abort. A second Ctrl-C does not interrupt it."""
    if not ray.is_initialized():
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ray.shutdown()
    finally:
        signal.signal(signal.SIGINT, before)


def know_the_cluster() -> None:
    """In a worker process, when it starts: let what looks for a cluster find this one, also where there are several on the machine. (Ray
    Train's placement group cleaner asks for the state of actors without saying of which cluster.)"""
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address


KNOWING = {"worker_process_setup_hook": f"{know_the_cluster.__module__}.{know_the_cluster.__name__}"}


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray puts a SIGTERM handler of its own in place of one that the caller has set; here the caller's stays."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def job_cluster(folder: Path) -> Iterator[str]:
    """A one-machine cluster that takes jobs, for the length of the block; gives the address to submit to.

    folder: for its files and logs, empty. With this and ports of its own it gets along with other clusters on the
        machine: with Ray's fixed ones the second takes no jobs, or hands them to the first.

    Raises ClusterError when it does not start.
    """
    if token() is None:
        subprocess.run([ray_command(), "get-auth-token", "--generate"], stdout=subprocess.DEVNULL, check=True)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    command = [ray_command(), "start", "--head", "--block", "--port=0", f"--dashboard-port={port}", "--dashboard-agent-listen-port=0",
               f"--temp-dir={folder}", "--disable-usage-stats"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "token"}
    with open(folder / "start.log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                   preexec_fn=_end_with_parent)
    try:
        _wait_for(port, process, log=folder / "start.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen, *, log: Path, deadline_s: float = 120) -> None:
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise ClusterError(f"no Ray cluster could be started on this machine within {deadline_s:g} s; see {log} and run `krrst doctor`")


def _end_with_parent() -> None:
    """In the child, on Linux: get SIGTERM when the parent is gone, even if it was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def token() -> str | None:
    """The token that clients here show to a cluster, by Ray's rules; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    with suppress(OSError):
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().read_text().strip() or None
    return None


def ray_command() -> str:
    """Ray's command line: of this Python, else the one on PATH."""
    beside_python = Path(sysconfig.get_path("scripts"), "ray")
    return str(beside_python) if beside_python.exists() else "ray"


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


@contextmanager
def _placed(bundles: list[dict[str, float]]) -> Iterator[PlacementGroup]:
    group = placement_group(bundles, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


class Rooms:
    """Room on the cluster for the runs of one job, each with `actors` processes of `cpus` CPUs and `gpus` GPUs.

    A run holds its room from before its actors start until it ends, so that no actor waits for one of another run. at_least: processes
    that a run starts with where there is no room for all; default: all. wait, deadline_s: as in `require`. May be used by several threads.
    """

    def __init__(self, cpus: int, gpus: float, actors: int, *, at_least: int | None = None, wait: bool = False,
                 deadline_s: float = 30) -> None:
        self._cpus, self._gpus, self._wanted, self._wait, self._deadline = cpus, gpus, actors, wait, deadline_s
        self._actors = at_least or actors
        self._bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
        self._held, self._lock = 0, threading.Lock()

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
        most = max(self._actors, min(self._wanted, capacity(cpus=self._cpus, gpus=self._gpus)))
        for actors in range(most, self._actors - 1, -1):
            with _placed([self._bundle] * actors) as group:
                if actors == self._actors:
                    self._wait_for(group, stop, patience, say or _print)
                elif not group.wait(AT_ONCE):
                    continue
                else:
                    self._count(1)
                try:
                    with ExitStack() as asked:
                        more = [asked.enter_context(_placed([self._bundle])) for _ in range(self._wanted - actors)]
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

    def _refuse_if_small(self) -> None:
        missing = self._actors - capacity(cpus=self._cpus, gpus=self._gpus)
        if missing > 0:
            raise ClusterError(f"{self} do not fit: the cluster lacks room for {missing} of them ({missing * self._cpus} CPUs and "
                               f"{missing * self._gpus:g} GPUs); its nodes offer {_offered()}. Lower engine.actors (or engine.min_actors), "
                               f"engine.threads or engine.gpus (of a grid: cpus, gpus), add nodes, or pass --wait if the cluster grows by "
                               f"itself")

    def __str__(self) -> str:
        return f"{self._actors} actors of {self._cpus} CPUs and {self._gpus:g} GPUs each"

    def _count(self, more: int) -> None:
        with self._lock:
            self._held += more


def capacity(*, cpus: int, gpus: float) -> int:
    """How many processes of `cpus` CPUs and `gpus` GPUs the cluster's nodes hold when nothing else runs."""
    return sum(room(offer, cpus=cpus, gpus=gpus) for _, offer in _nodes())


def _offered() -> str:
    return "; ".join(f"{name}: {offer.get('CPU', 0):g} CPUs, {offer.get('GPU', 0):g} GPUs" for name, offer in _nodes())


def _free() -> str:
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def _print(line: str) -> None:
    print(line, flush=True)


def _nodes() -> list[tuple[str, Mapping[str, float]]]:
    """Address and resources of each node that lives and will not be taken away."""
    leaving = state.get_draining_nodes()
    return [(node["NodeManagerAddress"], node["Resources"]) for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def answer(reference: ray.ObjectRef) -> Any:
    """What a task returns. An error raised by our own code in it arrives as itself; a task that is lost is an EngineError."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise EngineError(f"a task was lost ({str(error).strip().splitlines()[-1]}); the same command with --resume goes on") from error


def room(offer: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """How many actors fit on an empty node that offers these resources. A fraction of a GPU is of one GPU."""
    by_cpu = int(offer.get("CPU", 0) // cpus)
    if gpus == 0:
        return by_cpu
    count = offer.get("GPU", 0)
    by_gpu = int(count) * math.floor(1 / gpus + 1e-9) if gpus < 1 else int(count // gpus)
    return min(by_cpu, by_gpu)

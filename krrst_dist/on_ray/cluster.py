"""The Ray cluster a run uses: joined or started, with token authentication, and left. What room it has is for `rooms.py` to ask."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray

from krrst_dist.paths import PROJECT


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

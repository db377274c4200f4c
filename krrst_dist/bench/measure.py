"""Seconds, operations and peak memory of a step, and where and with what they were measured. Knows no step."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from krrst_dist import provenance
from krrst_dist.config import ConfigError

Step = Callable[[], object]


def ready(device: str) -> None:
    """Make sure that the device is there; convolutions on it are float32 unless a step's own precision says otherwise, as in the engine.

    Raises ConfigError.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"device = {device!r}: torch sees no CUDA device here; take device = 'cpu'")
    torch.backends.cudnn.allow_tf32 = False


def seconds(step: Step, device: str = "cpu") -> float:
    """Wall-clock seconds of one step, the device's queue emptied before and after."""
    _finish(device)
    started = time.perf_counter()
    step()
    _finish(device)
    return time.perf_counter() - started


def in_turns(steps: dict[str, Step], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each step in each round; who goes first changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], device))
    return times


def spread(values: Sequence[float], digits: int = 3) -> str:
    """'median (least-most)'."""
    return " ".join([f"{statistics.median(values):.{digits}g}", f"({min(values):.{digits}g}-{max(values):.{digits}g})"])


class _Operations(TorchDispatchMode):
    """Adds up floating-point operations; torch's FlopCounterMode cannot look inside `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name in flop_registry:
            self.total += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        elif name in _LINEAR_SYSTEMS:
            self.total += _LINEAR_SYSTEMS[name](*(value.shape for value in args[:3] if isinstance(value, torch.Tensor)))
        return out


_LINEAR_SYSTEMS = {  # shapes of the arguments -> operations
    torch.ops.aten._linalg_solve_ex: lambda a, right: 2 / 3 * a[0] ** 3 + 2 * a[0] ** 2 * right[1],
    torch.ops.aten.linalg_lu_solve: lambda lu, pivots, right: 2 * lu[0] ** 2 * right[1],
    torch.ops.aten.linalg_cholesky_ex: lambda a: a[0] ** 3 / 3,
    torch.ops.aten.cholesky_solve: lambda right, factor: 2 * factor[0] ** 2 * right[1],
}


def operations(step: Step) -> float:
    """Floating-point operations of one step (which is done): a multiply-add of convolutions, matrix products and linear systems is 2."""
    with _Operations() as counter:
        step()
    return counter.total


def peak_memory(build: Callable[[], Step], device: str = "cpu", threads: int = 1) -> int:
    """Bytes that two steps need beyond what was there when they were built, at the highest.

    CPU: growth of the resident set of a fresh process, so `build` has to be picklable. CUDA: the allocator's peak.
    """
    if device != "cpu":
        return _growth(build, device, threads)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_growth, build, device, threads).result()


def _growth(build: Callable[[], Step], device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    step = build()
    if device == "cpu":
        before = _resident("VmRSS")
    else:
        _finish(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    step()
    step()
    _finish(device)
    return (_resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device)) - before


def _resident(which: str) -> int:
    """Bytes of this process's resident set: VmRSS, now; VmHWM, its highest. (getrusage's highest includes the parent's.)"""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


def circumstances(device: str, threads: int) -> str:
    """Date, commit, machine, versions and command, one line each."""
    code = provenance.revision()
    processor = torch.cuda.get_device_name(device) if device != "cpu" else f"{os.cpu_count()} cores, {provenance.cpu_name()}"
    return "\n".join([
        f"command  {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"commit   {code.commit[:12]}{' with changes' if code.dirty else ''}, {datetime.date.today()}",
        f"machine  {processor}, {torch.backends.cpu.get_cpu_capability()}; {threads} thread(s); load {os.getloadavg()[0]:.1f}",
        f"versions torch {torch.__version__}, Python {platform.python_version()}",
    ])


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)

"""Half an hour of a distillation whose actors are killed, one every minute: nothing leaks, nothing drifts. `bash tests/run.sh --slow`.

KRRST_SOAK_MINUTES shortens it, for a look; what it prints goes to README.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import pytest
import safetensors.numpy
from conftest import ROOT

MINUTES = float(os.environ.get("KRRST_SOAK_MINUTES", "30"))
WARM_UP = min(5.0, MINUTES / 6)
"""minutes that memory may grow in"""
EVERY = 60.0
"""seconds between two kills"""
AGE = 40.0
"""seconds of an actor's life after which it is weighed"""
HORIZON = 1_000_000
"""updates asked for: more than there will be"""
FLAT = 0.05


@dataclass(frozen=True)
class Process:
    """One that lives now: its title and its private memory in MiB (pages shared with the object store are not counted)."""

    pid: int
    title: str
    memory: float


def descendants(of: int) -> list[Process]:
    """All living processes that a process has started, or that its children have."""
    parents, found = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            except OSError:
                continue
            parents[int(folder.name)] = int(status["PPid"])
            found[int(folder.name)] = Process(int(folder.name), title, int(status.get("RssAnon", "0 kB").split()[0]) / 1024)

    def belongs(pid: int) -> bool:
        while pid > 1:
            if (pid := parents.get(pid, 0)) == of:
                return True
        return False

    return [process for pid, process in found.items() if belongs(pid)]


@dataclass
class Weights:
    """Memory by minute of the coordinator and of Ray's own processes, and of each actor at the same age."""

    coordinator: list[tuple[float, float]] = field(default_factory=list)
    actors: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    ray: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def at_age(self, age: float) -> list[float]:
        """Of every actor that grew so old, when it did, in the order in which they were born."""
        found = []
        for seen in self.actors.values():
            born = seen[0][0]
            found += [memory for moment, memory in seen if 60 * (moment - born) >= age][:1]
        return found


def growth(values: Sequence[float]) -> float:
    """The mean of the last third over that of the first, less 1."""
    third = max(1, len(values) // 3)
    return fmean(values[-third:]) / fmean(values[:third]) - 1


def distil(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "krrst_dist.cli", "distill", "--preset", "quickstart", "--repeats", "1", "--engine.actors", "2",
               "--shards", "2", "--distill.decay-updates", str(HORIZON), "--evaluate.every", str(HORIZON), "--out", str(out), *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=(out.parent / f"{out.name}.txt").open("w"), stderr=subprocess.STDOUT)


def beat(out: Path) -> dict:
    try:
        return json.loads((out / "seed-0" / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def until(true: Callable[[], bool], run: subprocess.Popen, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)


def last_checkpoint(out: Path) -> tuple[int, dict]:
    """(step, outer state) of the newest whole one."""
    step, folder = max((int(path.parent.name.split("-")[1]), path.parent)
                       for path in (out / "seed-0" / "checkpoints").glob("step-*/manifest.json"))
    return step, safetensors.numpy.load_file(folder / "outer.safetensors")


@pytest.mark.slow
def test_actors_that_are_killed_every_minute_leave_no_leak_and_no_drift(tmp_path):
    rng, weights, kills = random.Random(0), Weights(), 0
    out = tmp_path / "soak"
    run = distil(out, "--updates", str(HORIZON))
    until(lambda: (beat(out).get("step") or 0) > 20, run, 1200)
    began = killed = time.monotonic()
    while (minute := (time.monotonic() - began) / 60) < MINUTES:
        assert run.poll() is None, (tmp_path / "soak.txt").read_text()[-3000:]
        family = descendants(run.pid)
        weights.coordinator.append((minute, memory_of(run.pid)))
        actors = [process for process in family if process.title.startswith("ray::Actor")]
        for process in family:
            (weights.actors[process.pid] if process in actors else weights.ray[name_of(process.title)]).append((minute, process.memory))
        if time.monotonic() - killed >= EVERY and actors:
            killed, kills = time.monotonic(), kills + 1
            os.kill(rng.choice(actors).pid, signal.SIGKILL)
        time.sleep(2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(300) == 0, (tmp_path / "soak.txt").read_text()[-3000:]
    step, state = last_checkpoint(out)
    settled = [memory for minute, memory in weights.coordinator if minute >= WARM_UP]
    aged = weights.at_age(AGE)
    lines = [f"{MINUTES:g} minutes, {kills} actors killed, {step} updates",
             f"coordinator: {growth(settled):+.1%} after {WARM_UP:.3g} min, now {settled[-1]:.0f} MiB",
             f"actors {AGE:g} s old: {growth(aged):+.1%} from the first to the last of {len(aged)}, now {aged[-1]:.0f} MiB"]
    lines += [f"Ray's {name}: {growth([memory for _, memory in seen]):+.1%}, now {seen[-1][1]:.0f} MiB"
              for name, seen in sorted(weights.ray.items()) if seen[-1][0] > MINUTES - 1]
    print("\n".join(lines))
    assert kills >= MINUTES - 2
    assert abs(growth(settled)) < FLAT or growth(settled) < 0, lines
    assert abs(growth(aged)) < FLAT or growth(aged) < 0, lines

    undisturbed = distil(tmp_path / "undisturbed", "--updates", str(step))
    assert undisturbed.wait(60 * MINUTES + 600) == 0, (tmp_path / "undisturbed.txt").read_text()[-3000:]
    at, expected = last_checkpoint(tmp_path / "undisturbed")
    assert at == step and state.keys() == expected.keys()
    assert all((state[name] == expected[name]).all() for name in expected)


def memory_of(pid: int) -> float:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) / 1024


def name_of(title: str) -> str:
    """What one of Ray's processes is."""
    names = "gcs_server", "raylet/raylet", "dashboard/agent", "runtime_env/agent", "dashboard/dashboard", "log_monitor", "monitor"
    for name in names:
        if name in title:
            return name
    return "idle worker" if title.startswith("ray::IDLE") else "other"

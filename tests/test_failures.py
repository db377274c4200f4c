"""What a run survives on one machine: storage that refuses writes, processes that stop or die together, signals.

Every run ends exactly where the serial loop does. Runs on a cluster of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import engine_parts
import pytest
import ray
import torch
from engine_parts import Parts, config, serial

from krrst_dist.config import Config
from krrst_dist.on_ray import coordinator, group, patience
from krrst_dist.on_ray.aggregate import Update
from krrst_dist.on_ray.coordinator import Coordinator, Outcome
from krrst_dist.on_ray.heartbeat import Beat
from krrst_dist.on_ray.progress import Record
from krrst_dist.on_ray.stopping import Stop, Stopped
from krrst_dist.storage import StorageError

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[str]:
    """A cluster with room for two actors and no more; yields its address."""
    ray.init(address="local", num_cpus=2, object_store_memory=200_000_000, include_dashboard=False, logging_level="error",
             log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(autouse=True)
def in_short(monkeypatch) -> None:
    """Pauses for tests."""
    monkeypatch.setattr(patience, "PAUSES", (0.2, 0.5))
    monkeypatch.setattr(coordinator, "PAUSES", (0.1,) * 3)


@dataclass(frozen=True)
class Named(Parts):
    """Shards that leave the number of their process in a folder."""

    folder: str = ""

    def __call__(self, shard: int):
        Path(self.folder, f"process-of-{shard}").write_text(str(os.getpid()))
        return super().__call__(shard)


class Running:
    """A run in a thread."""

    def __init__(self, settings: Config, folder: Path, *, resume: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.stop, self._folder, self._settings = Stop(), folder, settings
        work = engine_parts.work(settings, build=Named(settings, slow=0.1, folder=str(folder)), measure=None)
        self._run = Coordinator(settings, work, directory=str(folder), resume=resume, stop=self.stop)
        self._end: Future[Outcome] = ThreadPoolExecutor(1).submit(self._run.run)

    def process(self, shard: int) -> int:
        """Which one hosts a shard."""
        return int((self._folder / f"process-of-{shard}").read_text())

    def until(self, step: int) -> None:
        """Wait for the checkpoint of a step, of any incarnation."""
        until(lambda: self._end.done() or any(self._folder.glob(f"checkpoints/step-{step:08d}-*/manifest.json")), f"checkpoint {step}")

    def until_said(self, words: str) -> None:
        """Wait until the run says something (its heart does)."""
        until(lambda: self._end.done() or words in self._run._heart._beat.doing, words)

    def end(self) -> Outcome:
        """What it comes to."""
        return self._end.result(timeout=180)

    def ends_as_if_undisturbed(self) -> None:
        outcome, (x_syn, y_syn) = self.end(), serial(self._settings)
        assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)
        assert [step for step, _ in outcome.outer] == list(range(1, self._settings.distill.updates + 1))


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline, f"not within 90 s: {what}"
        time.sleep(0.02)


class Outage:
    """Storage of a run that refuses everything: a file is where the folder of its checkpoints was."""

    def __init__(self, folder: Path) -> None:
        self._there, self._aside = folder / "checkpoints", folder / "aside"
        self._there.rename(self._aside)
        self._there.touch()

    def over(self) -> None:
        self._there.unlink()
        self._aside.rename(self._there)


def test_a_run_goes_on_when_storage_that_refused_its_checkpoint_works_again(tmp_path, capsys):
    run = Running(config(actors=2, updates=16), tmp_path)
    run.until(4)
    outage = Outage(tmp_path)
    run.until_said("trying again for up to 600 s")
    time.sleep(2)  # several tries
    outage.over()
    run.ends_as_if_undisturbed()
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot " in line or "storage works" in line]
    assert len(said) == 2 and "checkpoints" in said[0] and "storage works again, after" in said[1]
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*"))] == [f"step-{n:08d}-1" for n in (8, 12, 16)]


def test_an_actor_killed_while_storage_refuses_costs_nothing_but_time(tmp_path, capsys):
    run = Running(config(actors=2, updates=16), tmp_path)
    run.until(4)
    outage = Outage(tmp_path)
    run.until_said("trying again")
    os.kill(run.process(1), signal.SIGKILL)
    until(lambda: "was lost" in capsys.readouterr().out, "the loss is noticed")
    run.until_said("trying again")  # its checkpoints are out of reach
    outage.over()
    run.ends_as_if_undisturbed()
    assert list(tmp_path.glob("checkpoints/step-00000016-2/manifest.json"))


def test_storage_that_refuses_for_too_long_ends_the_run_with_the_last_checkpoint_which_is_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 1)
    run = Running(config(actors=2), tmp_path)
    run.until(4)
    outage = Outage(tmp_path)
    with pytest.raises(StorageError, match=r"checkpoints.*\(tried again for 1 s\); the last good checkpoint is .*-1, go on with --resume"):
        run.end()
    outage.over()
    Running(config(actors=1), tmp_path, resume=True).ends_as_if_undisturbed()


def test_a_stop_while_storage_refuses_ends_the_wait_at_once_and_says_what_is_lost(tmp_path, capsys):
    run = Running(config(actors=2), tmp_path)
    run.until(4)
    outage = Outage(tmp_path)
    run.until_said("trying again")
    asked = time.monotonic()
    run.stop.ask(0)
    with pytest.raises(Stopped) as stopped:
        run.end()
    assert time.monotonic() - asked < 10 and stopped.value.status == 130
    assert "the updates since the last checkpoint are lost" in capsys.readouterr().out
    outage.over()
    Running(config(actors=2), tmp_path, resume=True).ends_as_if_undisturbed()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_tensorboard_on_a_full_disk_ends_no_run_and_goes_on_when_there_is_room(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        record, hog = Record(str(tmp_path), start=None), tmp_path / "hog"
        with pytest.raises(OSError, match="No space"):
            hog.write_bytes(bytes(1 << 20))
        for step in range(300):
            record.measured(step, 0.5)
        hog.unlink()
        before = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
        record.measured(300, 0.25)
        record.save()
        assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) > before
        record.close()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)

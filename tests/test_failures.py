"""What a run survives on one machine: storage that refuses writes, processes that stop or die together, signals.

Every run ends exactly where the serial loop does. Runs on a cluster of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import engine_parts
import pytest
import ray
import running
from engine_parts import config

from krrst_dist.on_ray import coordinator, group, patience
from krrst_dist.on_ray.progress import Record
from krrst_dist.on_ray.stopping import Stopped
from krrst_dist.storage import StorageError

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(running)


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


class Outage:
    """Storage of a run that refuses everything: a file is where the folder of its checkpoints was. unmounted: an empty folder."""

    def __init__(self, folder: Path, *, unmounted: bool = False) -> None:
        self._there, self._aside = folder / "checkpoints", folder / "aside"
        self._there.rename(self._aside)
        self._there.mkdir() if unmounted else self._there.touch()

    def over(self) -> None:
        shutil.rmtree(self._there) if self._there.is_dir() else self._there.unlink()
        self._aside.rename(self._there)


def test_a_run_goes_on_when_storage_that_refused_its_checkpoint_works_again(start, tmp_path, capsys):
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    outage = Outage(tmp_path)
    run.until_said("trying again for up to 600 s")
    time.sleep(2)  # several tries
    outage.over()
    run.ends_as_if_undisturbed()
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot " in line or "storage works" in line]
    assert len(said) == 2 and "checkpoints" in said[0] and "storage works again, after" in said[1]
    assert run.checkpoints() == [(8, 1), (12, 1), (16, 1)]


def test_an_actor_killed_while_storage_is_not_mounted_costs_nothing_but_time(start, tmp_path):
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    outage = Outage(tmp_path, unmounted=True)
    run.until_said("is its storage not mounted")
    os.kill(run.process(1), signal.SIGKILL)
    run.until_said("no checkpoint is there")
    outage.over()
    run.ends_as_if_undisturbed()
    assert run.checkpoints()[-1] == (16, 2)


def test_storage_that_refuses_fresh_actors_their_data_is_tried_again(start, tmp_path):
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    (tmp_path / "refuse").touch()
    os.kill(run.process(1), signal.SIGKILL)
    run.until_said("cannot read what the shard is made of; trying again for up to 600 s")
    (tmp_path / "refuse").unlink()
    run.ends_as_if_undisturbed()


def test_storage_that_refuses_for_too_long_ends_the_run_with_the_last_checkpoint_which_is_gone_on_from(start, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 1)
    run = start(config(actors=2))
    run.until_step(4)
    outage = Outage(tmp_path)
    with pytest.raises(StorageError, match=r"checkpoints.*\(tried again for 1 s\); the last good checkpoint is .*-1, go on with --resume"):
        run.end()
    outage.over()
    start(config(actors=1), resume=True).ends_as_if_undisturbed()


def test_a_stop_while_storage_refuses_ends_the_wait_at_once_and_says_what_is_lost(start, tmp_path, capsys):
    run = start(config(actors=2))
    run.until_step(4)
    outage = Outage(tmp_path)
    run.until_said("trying again")
    asked = time.monotonic()
    run.stop.ask(0)
    with pytest.raises(Stopped) as stopped:
        run.end()
    assert time.monotonic() - asked < 10 and stopped.value.status == 130
    assert "the updates since the last checkpoint are lost" in capsys.readouterr().out
    outage.over()
    start(config(actors=2), resume=True).ends_as_if_undisturbed()


def test_an_actor_that_is_stopped_for_a_while_is_waited_for(start):
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    os.kill(run.process(1), signal.SIGSTOP)
    time.sleep(4)
    os.kill(run.process(1), signal.SIGCONT)
    run.ends_as_if_undisturbed()
    assert run.checkpoints()[-1] == (16, 1)


def test_an_actor_that_is_stopped_for_too_long_is_replaced_and_never_writes_again(start, monkeypatch, capsys):
    monkeypatch.setattr(group, "_PULSE", 0.5)
    monkeypatch.setattr(group, "DEAF", 3)
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    stopped = run.process(1)
    os.kill(stopped, signal.SIGSTOP)
    run.until(lambda: run.process(1) != stopped, "another process")
    with suppress(ProcessLookupError):  # Ray may have ended it already
        os.kill(stopped, signal.SIGCONT)
    run.ends_as_if_undisturbed()
    assert [saved for saved in run.checkpoints() if saved[0] > 4] == [(8, 2), (12, 2), (16, 2)]
    assert re.search(rf"actor 1 with shard.s. 1 on \S+ \(process {stopped}\) has not answered for 3 s: it has", capsys.readouterr().out)


def test_two_actors_killed_at_once_are_one_failure(start, capsys):
    run = start(config(actors=2, updates=16))
    run.until_step(4)
    for shard in (0, 1):
        os.kill(run.process(shard), signal.SIGKILL)
    run.ends_as_if_undisturbed()
    assert capsys.readouterr().out.count("was lost") == 1 and run.checkpoints()[-1] == (16, 2)


def test_an_actor_and_the_driver_killed_at_once_are_gone_on_from_by_another_driver(cluster, start, tmp_path):
    command = [sys.executable, running.__file__, str(tmp_path), cluster]
    driver = subprocess.Popen(command, env=os.environ | {"RAY_AUTH_MODE": "token"})
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("checkpoints/step-00000004-1/manifest.json")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(int((tmp_path / "process-of-1").read_text()), signal.SIGKILL)
    finally:
        driver.kill()
        driver.wait()
    start(config(actors=2, updates=16), resume=True).ends_as_if_undisturbed()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
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
        record.save()
        before = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
        record.measured(300, 0.25)
        assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) > before
        record.close()
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)

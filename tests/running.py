"""A run of the engine in a thread, for tests that do something to it, or in a process to be killed.

`python tests/running.py DIRECTORY CLUSTER` begins 16 updates of it with two actors on a running cluster.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import engine_parts
import ray
import torch
from engine_parts import Parts, serial

from krrst_dist import storage
from krrst_dist.config import Config
from krrst_dist.data.errors import DataError
from krrst_dist.on_ray.coordinator import Coordinator
from krrst_dist.on_ray.stopping import Stop
from krrst_dist.on_ray.work import Outcome


@dataclass(frozen=True)
class Named(Parts):
    """Shards that leave the number of their process in a folder, and take `pace` seconds more for a batch until there is a
    file `quick` in it.

    While there is a file `refuse`, none can be made; on a node that a file `full` names, none ever.
    """

    folder: str = ""
    pace: float = 0.1

    def __call__(self, shard: int):
        folder = Path(self.folder)
        if (folder / "refuse").exists():
            raise storage.StorageError("cannot read what the shard is made of")
        if (folder / "full").exists() and ray.get_runtime_context().get_node_id() in (folder / "full").read_text():
            raise DataError("a host, a folder: 1 MB free, but fetching takes 2 MB")
        storage.write_whole(folder / f"process-of-{shard}", str(os.getpid()).encode())
        built = super().__call__(shard)
        read = built.batches.next

        def next_batch():
            if not (folder / "quick").exists():
                time.sleep(self.pace)
            return read()

        built.batches.next = next_batch
        return built


class Running:
    """A run in a thread, in a folder."""

    def __init__(self, settings: Config, folder: Path, *, resume: bool = False, pace: float = 0.1) -> None:
        self.stop, self._folder, self._settings = Stop(), folder, settings
        work = engine_parts.work(settings, build=Named(settings, folder=str(folder), pace=pace))
        self._run = Coordinator(settings, work, directory=str(folder), resume=resume, stop=self.stop)
        self._end: Future[Outcome] = ThreadPoolExecutor(1).submit(self._run.run)

    def process(self, shard: int) -> int:
        """Which one hosts a shard."""
        return int((self._folder / f"process-of-{shard}").read_text())

    def checkpoints(self) -> list[tuple[int, int]]:
        """(step, incarnation) of all whole ones, by step."""
        return sorted((int(step), int(incarnation)) for path in self._folder.glob("checkpoints/step-*/manifest.json")
                      for _, step, incarnation in [path.parent.name.split("-")])

    def updates(self) -> int:
        """Done so far."""
        return self._run._heart._beat.step or 0

    def until(self, true: Callable[[], bool], what: str = "") -> None:
        """Wait for something while it runs."""
        deadline = time.monotonic() + 240
        while not true():
            if self._end.done():
                raise AssertionError(f"the run has ended, with {self._end.exception()}, before {what}")
            assert time.monotonic() < deadline, f"not within 240 s: {what}"
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Wait for the checkpoint of this step, or a later one."""
        self.until(lambda: any(saved >= step for saved, _ in self.checkpoints()), f"checkpoint {step}")

    def until_said(self, words: str) -> None:
        """Wait until this is what it has said last."""
        self.until(lambda: words in self._run._heart._beat.doing, words)

    def end(self, *, quickly: bool = True) -> Outcome:
        """What it comes to."""
        if quickly:
            (self._folder / "quick").touch()
        return self._end.result(timeout=180)

    def insist(self) -> None:
        """End it at once."""
        self.stop.ask()
        self.stop.ask()
        wait([self._end], timeout=60)

    def ends_as_if_undisturbed(self) -> None:
        """The serial loop's result bit for bit, and every update told once."""
        outcome, (x_syn, y_syn) = self.end(), serial(self._settings)
        assert torch.equal(outcome.values[0], x_syn) and torch.equal(outcome.values[1], y_syn)
        assert [step for step, _ in outcome.outer] == list(range(1, self._settings.distill.updates + 1))


if __name__ == "__main__":
    directory, address = sys.argv[1:]
    torch.set_num_threads(1)
    ray.init(address=address, logging_level="warning", log_to_driver=False)
    Running(engine_parts.config(actors=2, updates=16), Path(directory)).end(quickly=False)

"""Work beside distilling, and trials: answers in order, a lost process is replaced, a silent one is named."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import ray
from ray import tune

from krrst_dist.data.errors import DataError
from krrst_dist.on_ray import errands, signs
from krrst_dist.on_ray.errors import EngineError
from krrst_dist.on_ray.trials import run_trials

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def in_short(monkeypatch, ray_cluster) -> None:
    monkeypatch.setattr(signs, "DEAF", 3.0)
    monkeypatch.setattr(signs, "STALLED", 4.0)
    monkeypatch.setattr(signs, "BEAT", 0.2)
    monkeypatch.setattr(signs, "LOOK", 0.2)


def run(work: Callable, *calls: object) -> list[tuple[str, object]]:
    return list(errands.run(work, {f"work {call}": (call,) for call in calls}, cpus=1, gpus=0))


def mark(folder: Path) -> int:
    """Leave this process's number behind; how many have done so."""
    (folder / str(os.getpid())).touch()
    return len(list(folder.iterdir()))


@contextmanager
def stopping(file: Path) -> Iterator[None]:
    """Stop the process whose number comes to be in a file, and kill it at the end."""
    def number() -> int:
        return int(file.read_text() or 0) if file.exists() else 0

    over = threading.Event()

    def stop() -> None:
        while not number():
            if over.wait(0.1):
                return
        if not over.wait(2):
            os.kill(number(), signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if process := number():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_answers_come_in_the_order_of_the_calls_whichever_is_done_first():
    def square(x: int, alive: Callable[[], None]) -> int:
        time.sleep(0.5 if x == 1 else 0)
        return x * x

    assert run(square, 1, 2, 3) == [("work 1", 1), ("work 2", 4), ("work 3", 9)]


def test_an_error_of_the_work_arrives_as_itself():
    def fail(x: int, alive: Callable[[], None]) -> None:
        raise DataError("row 7 is damaged")

    with pytest.raises(DataError, match="^row 7 is damaged$"):
        run(fail, 1)


def test_work_whose_process_is_killed_is_given_out_again(tmp_path, capfd):
    def die_once(folder: Path, alive: Callable[[], None]) -> int:
        if mark(folder) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 7

    assert run(die_once, tmp_path) == [(f"work {tmp_path}", 7)]
    assert "it is given out again" in capfd.readouterr().out


def test_work_that_kills_its_process_every_time_ends_in_an_error_that_says_so(tmp_path):
    def die(folder: Path, alive: Callable[[], None]) -> None:
        mark(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EngineError, match=r"work .* was lost, 3 times in all: .*memory and logs.*--resume"):
        run(die, tmp_path)
    assert len(list(tmp_path.iterdir())) == errands.ATTEMPTS


def test_a_process_that_stands_still_is_named_beside_one_that_works(tmp_path):
    def stand_still(which: str, alive: Callable[[], None]) -> int:
        if which.endswith("still"):
            Path(which).write_text(str(os.getpid()))
        while True:
            alive()
            time.sleep(0.1)

    still = tmp_path / "still"
    with stopping(still), pytest.raises(EngineError, match=r"still on .* \(process \d+\) has not answered for \d+ s: it has") as told:
        run(stand_still, "works", str(still))
    assert f"(process {still.read_text()})" in str(told.value)


def test_a_trial_that_stands_still_is_named(tmp_path):
    def trial(config: dict, *, work: dict) -> None:
        Path(work[config["key"]]).write_text(str(os.getpid()))
        while True:
            tune.report({"step": 0})
            time.sleep(0.5)

    still = tmp_path / "still"
    with stopping(still), pytest.raises(EngineError, match=r"the cell still on .* \(process \d+\) has not answered for \d+ s") as told:
        list(run_trials("cells", trial, {"still": str(still), "works": str(tmp_path / "works")}, cpus=1, gpus=0, retries=1,
                        storage=str(tmp_path), title=lambda key: f"the cell {key}"))
    assert f"(process {still.read_text()})" in str(told.value)


def test_work_that_gets_no_further_is_named_although_its_process_lives():
    def hang(x: int, alive: Callable[[], None]) -> None:
        alive()
        threading.Event().wait()

    with pytest.raises(EngineError, match=r"no work has got further for 4 s: work 1 on .* \(process \d+\), work 2 on"):
        run(hang, 1, 2)


def test_work_that_takes_long_but_gets_further_is_waited_for():
    def creep(x: int, alive: Callable[[], None]) -> int:
        for _ in range(12):
            time.sleep(0.5)
            alive()
        return x

    assert run(creep, 1) == [("work 1", 1)]

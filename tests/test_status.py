"""A run's sign of life on storage, and what `krrst status` makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import engine_parts
import pytest
import ray
import requests

from krrst_dist import cli
from krrst_dist.artifacts import ArtifactError
from krrst_dist.on_ray import status
from krrst_dist.on_ray.errors import TakenOverError
from krrst_dist.on_ray.heartbeat import FILE, Beat, Heartbeat, of_job

ray.cloudpickle.register_pickle_by_value(engine_parts)
NOON = 1_800_000_000.0


class Clock:
    """A clock that only its owner moves."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def beat_of(folder: Path, **changes) -> Beat:
    """The file of a run that said something at noon."""
    heart = Heartbeat(str(folder), updates=100, clock=lambda: NOON)
    heart.start()
    for step, seconds in enumerate([9.0, 0.5, 0.5], 1):
        heart.update(step, seconds)
    heart.checkpoint("here/step-2", 2)
    heart.update(3, 0.5)
    heart.says("update 3: all is well")
    heart.end("running")
    write(folder, replace(Beat.read(str(folder)), **changes))
    return Beat.read(str(folder))


def write(folder: Path, beat: Beat) -> None:
    about = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps(about | vars(beat)))


def alive(runs: dict[str, Beat], clock: Clock) -> dict[str, bool]:
    return {run: found for run, (_, found) in status.watched(runs, clock=clock, sleep=clock.sleep).items()}


def test_a_beat_says_step_speed_checkpoint_and_what_the_run_does(tmp_path):
    beat = beat_of(tmp_path)
    assert (beat.step, beat.updates, beat.seconds, beat.checkpoint, beat.written) == (3, 100, 0.5, "here/step-2", NOON)
    words = status.in_words("run", beat, alive=True)
    assert "alive, update 3 of 100" in words and "0.5 s an update, time left 0:00:48" in words and "all is well" in words
    assert "gone without a word" in (words := status.in_words("run", beat, alive=False)) and "--resume" in words


@pytest.mark.parametrize(("error", "state", "doing"), [
    (None, "finished", "stage: target"), (ValueError("no room"), "failed", "no room"), (KeyboardInterrupt(), "stopped", "stage: target"),
    (TakenOverError("by another"), "running", "starting")])
def test_a_job_of_several_stages_beats_until_it_ends(tmp_path, error, state, doing):
    with pytest.raises(type(error)) if error else nullcontext(), of_job(str(tmp_path)) as says:
        deadline = time.monotonic() + 30
        while Beat.read(str(tmp_path)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        says("stage: target")
        if error:
            raise error
    last = Beat.read(str(tmp_path))
    assert (last.state, last.doing) == (state, doing)
    words = status.in_words("job", last, alive=False)
    assert words.startswith(f"job: {'gone without a word' if state == 'running' else state}\n") and "checkpoint" not in words


def test_it_beats_by_itself(tmp_path):
    heart = Heartbeat(str(tmp_path), updates=1, every=0.02)
    heart.start()
    deadline = time.monotonic() + 30
    while (beat := Beat.read(str(tmp_path))) is None or beat.number < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heart.end("finished")
    last = Beat.read(str(tmp_path))
    time.sleep(0.1)
    assert last.state == "finished" and Beat.read(str(tmp_path)) == last


def test_a_young_beat_is_believed_and_an_old_one_watched_in_vain(tmp_path):
    runs, clock = {str(tmp_path): beat_of(tmp_path)}, Clock(NOON + 30)
    assert alive(runs, clock) == {str(tmp_path): True} and clock.now == NOON + 30
    clock = Clock(NOON + 3600)
    assert alive(runs, clock) == {str(tmp_path): False}
    assert clock.now == NOON + 3600 + status.LATE  # no longer than that


@pytest.mark.parametrize("state", ["running", "finished"])
@pytest.mark.parametrize("skew", [-3600, 3600])
def test_a_run_whose_clock_is_an_hour_off_is_judged_by_its_next_beat(tmp_path, skew, state):
    beat, clock = beat_of(tmp_path), Clock(NOON + skew)
    later = replace(beat, number=beat.number + 1, step=50, state=state)

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now == NOON + skew + 15:
            write(tmp_path, later)

    assert status.watched({str(tmp_path): beat}, clock=clock, sleep=sleep) == {str(tmp_path): (later, state == "running")}
    assert clock.now == NOON + skew + 15


def test_a_run_that_was_started_again_is_alive_though_it_counts_anew(tmp_path):
    beat, clock = beat_of(tmp_path), Clock(NOON + 3600)
    write(tmp_path, replace(beat, process="another"))
    assert alive({str(tmp_path): beat}, clock) == {str(tmp_path): True}


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_what_has_ended_is_not_waited_for(tmp_path, state):
    clock = Clock()
    assert alive({str(tmp_path): beat_of(tmp_path, state=state)}, clock) == {str(tmp_path): False}
    assert clock.now == NOON


def test_storage_that_refuses_a_beat_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    heart = Heartbeat(str(tmp_path / "file" / "run"), updates=1, every=0.01)
    heart.start()
    time.sleep(0.05)
    heart.end("finished")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "krrst_dist status, version 1"}', '{"format": "other"}'])
def test_a_file_that_is_not_ours_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ArtifactError, match=r"status.json does not tell how the run is doing"):
        Beat.read(str(tmp_path))


@pytest.mark.parametrize("changes", [{"seconds": float("inf")}, {"written": float("nan")}, {"step": -1}, {"step": "x"}, {"state": "odd"}])
def test_a_value_that_cannot_be_is_refused_by_name(tmp_path, changes):
    with pytest.raises(ArtifactError, match=rf"status.json does not tell how the run is doing \(\('{next(iter(changes))}',"):
        beat_of(tmp_path, **changes)


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert cli.main(["status", str(tmp_path)]) == 1
    assert "no run has left a sign of life there; give the folder or URI that --out was" in capsys.readouterr().err


def test_a_real_run_is_alive_until_it_is_killed_and_finished_when_it_has_gone_on(ray_cluster, tmp_path, capsys):
    run = tmp_path / "seed-0"
    driver = subprocess.Popen([sys.executable, engine_parts.__file__, str(run), "60", ray.get_runtime_context().gcs_address],
                              env=os.environ | {"RAY_AUTH_MODE": "token"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint within 60 s"
        time.sleep(0.02)
    assert cli.main(["status", str(tmp_path)]) == 0
    assert f"{run}: alive, " in capsys.readouterr().out
    driver.send_signal(signal.SIGKILL)
    driver.wait(timeout=30)
    clock = Clock(time.time() + 3600)
    assert alive(status.runs_in(str(tmp_path)), clock) == {str(run): False}
    engine_parts.run(engine_parts.config(updates=60), run, resume=True)
    assert cli.main(["status", str(run)]) == 0
    words = capsys.readouterr().out
    assert f"{run}: finished, update 60 of 60" in words and "last checkpoint: " in words


def test_a_run_that_fails_says_why(ray_cluster, tmp_path):
    settings = engine_parts.config(updates=4, lr=1e30)
    with pytest.raises((ArithmeticError, ValueError)) as failed:
        engine_parts.run(settings, tmp_path)
    beat = Beat.read(str(tmp_path))
    assert beat.state == "failed" and str(failed.value).partition(";")[0] in beat.doing


def test_prometheus_is_told_of_a_run(ray_cluster, tmp_path):
    engine_parts.run(engine_parts.config(updates=3, shards=1), tmp_path, measure=engine_parts.measure)
    (node,) = ray.nodes()
    address, wanted = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", {}
    deadline = time.monotonic() + 60
    while wanted.get("ray_krrst_checkpoint_step") != 3.0:
        assert time.monotonic() < deadline, f"not told within 60 s: {wanted}"
        time.sleep(1)
        lines = (line for line in requests.get(address, timeout=10).text.splitlines() if f'run="{tmp_path}"' in line)
        wanted = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert wanted["ray_krrst_step"] == 3.0 and wanted["ray_krrst_images_total"] == 22 + 24 + 24
    assert wanted["ray_krrst_update_seconds"] > 0 and wanted["ray_krrst_held_out_loss"] > 0 and "ray_krrst_failures_total" not in wanted

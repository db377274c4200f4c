"""Pieces of work as trials of Ray Tune: as many at a time as the cluster has room for, failures tried again, progress told.

One process serves many trials (`reuse_actors`): starting one, with torch, costs more than many a trial. Knows nothing
of what a trial does; a trainable is told the key of its piece of work, and ends by reporting a status and an error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.actor import ActorHandle
from ray.tune.logger import JsonLoggerCallback

from krrst_dist.on_ray import signs
from krrst_dist.on_ray.errors import EngineError, last_line
from krrst_dist.on_ray.signs import Watch, beating
from krrst_dist.storage import StorageError


@dataclass(frozen=True)
class Ended:
    """How a trial ended: ok, diverged or failed. last: the last numbers it reported."""

    status: str
    error: str
    last: Mapping[str, Any]
    trial_path: str


def run_trials(name: str, trainable: Callable[..., None], work: Mapping[str, Any], *, cpus: float, gpus: float, retries: int, storage: str,
               title: Callable[[str], str], says: Callable[[str], None] = lambda line: None, reuse: bool = True,
               **common: Any) -> Iterator[tuple[str, Ended]]:
    """Run one trial for each piece of work; gives (key, how it ended). Raises StorageError, EngineError.

    trainable: called as trainable({"key": key}, work=work, **common), in other processes.
    storage: folder or URI for Tune's records. title: of a piece of work, for people. says: told every line of progress, which is
    printed.
    """
    if not work:
        return
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # else it prints tables of its own, whatever `verbose` says
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # with it, Ctrl-C would end the trials and not the grid
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"  # result.json holds all; TensorBoard's writer can hang when Python ends early
    watch = Watch()
    bound = tune.with_parameters(_watched, do=trainable, ear=watch.ear, every=signs.BEAT, work=dict(work), **common)
    tuner = tune.Tuner(
        tune.with_resources(bound, {"cpu": cpus, "gpu": gpus}),
        param_space={"key": tune.grid_search(list(work))},
        tune_config=tune.TuneConfig(reuse_actors=reuse, trial_name_creator=_trial_name, trial_dirname_creator=_trial_name),
        run_config=tune.RunConfig(name=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", storage_path=storage, verbose=0,
                                  failure_config=tune.FailureConfig(max_failures=retries),
                                  sync_config=tune.SyncConfig(sync_artifacts=True, sync_period=10),  # the trials' logs
                                  callbacks=[JsonLoggerCallback(), _Progress(name, len(work), title, says, watch)]))
    try:
        results = tuner.fit()
    except OSError as error:
        raise StorageError(f"Ray Tune cannot write its records below {storage}: {error}; check the permissions and the free space. What is "
                           f"finished is kept, the same command goes on") from error
    finally:
        watch.end()
    for result in results:
        yield _ended(result)


def _ended(result: Any) -> tuple[str, Ended]:
    last, path = result.metrics or {}, str(result.path or "")
    if result.error is not None:
        return result.config["key"], Ended("failed", last_line(result.error), last, path)
    if result.config is None or "status" not in last:  # neither a number nor an error: nobody knows what it would have been
        raise EngineError(f"Ray Tune stopped before all trials had ended; their logs are in {path}. What is finished is kept, the same "
                          f"command goes on")
    return result.config["key"], Ended(last["status"], last["error"], last, path)


def _trial_name(trial: Any) -> str:
    return f"trial-{trial.trial_id}"


def _watched(config: dict[str, str], *, do: Callable[..., None], ear: ActorHandle, every: float, **how: Any) -> None:
    """One trial."""
    with beating(ear, config["key"], every):
        do(config, **how)


class _Progress(tune.Callback):
    """A line for every trial that ends, with the time that the rest will take. One that is silent ends them all in an
    EngineError, and so do all when none has reported anything for long."""

    def __init__(self, name: str, total: int, title: Callable[[str], str], says: Callable[[str], None], watch: Watch) -> None:
        self._name, self._total, self._title, self._done, self._started = name, total, title, 0, time.monotonic()
        self._says, self._watch, self._moved = says, watch, False
        says(f"{name}: 0 of {total} done")

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name}  # Tune keeps one beside its records; what it tells, and of what, stays in this process

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        running = [trial.config["key"] for trial in trials if trial.status == trial.RUNNING]
        self._watch.look({key: self._title(key) for key in running}, moved=self._moved)
        self._moved = False

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        self._moved = True

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        self._tell(trial, f"accuracy {100 * last['accuracy']:.1f} %" if "accuracy" in last else last.get("status", "no result"))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self._tell(trial, "failed")

    def _tell(self, trial: Any, what: str) -> None:
        self._done += 1
        left = (time.monotonic() - self._started) / self._done * (self._total - self._done)
        line = f"{self._name} {self._done}/{self._total}, {left:.0f} s left: {self._title(trial.config['key'])}: {what}"
        print(line, flush=True)
        self._says(line)

"""What lies under one path or URI: results, the trials of Ray Tune, distilled sets. Read anew when something has been added.

A grid's folder has `results/`, `tune/` and `sets/`; a run's has `seed-*/`; a results store has Parquet files. All names that come
from a request or from a result are looked for among those that were listed, so that nothing outside the folder can be asked for.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, TypeVar

import pyarrow as pa

from krrst_dist import storage
from krrst_dist.results import ResultsError, ResultStore
from krrst_dist.results.tables import Run, runs

SECONDS = 2.0
"""between two looks at what has been added"""


PATIENCE = 0.3
"""seconds that a page waits for such a look"""
TAIL = 20_000
"""characters of a trial's log or error that are shown with its state"""
KEPT = 64
"""things worked out of the runs that are kept"""
T = TypeVar("T")


@dataclass(frozen=True)
class _Read:
    """What was read last, and what has been made of it."""

    runs: list[Run]
    attempts: pa.Table
    results: pa.Table
    made: dict[Hashable, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SetPlace:
    """A distillation run. name: its folder, below the library's."""

    name: str
    uri: str


@dataclass(frozen=True)
class Trial:
    """One trial of Ray Tune. state: done, failed, or what Tune said of it last: running, pending, paused; open: it said nothing."""

    experiment: str
    name: str
    state: str
    last: dict[str, Any]
    error: str = ""
    log: str = ""


@dataclass(frozen=True)
class Experiment:
    """One of Ray Tune's, as it is now. told: when Tune last wrote down the states of its trials, None where it never did."""

    name: str
    trials: list[Trial]
    told: datetime | None

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state."""
        return dict(Counter(trial.state for trial in self.trials))

    @property
    def goes_on(self) -> bool:
        """Are there trials that run, or wait, as far as Tune has told?"""
        return any(trial.state in ("running", "pending", "paused") for trial in self.trials)


class Library:
    """Everything below a path or URI."""

    def __init__(self, uri: str) -> None:
        """Raises ResultsError where there is nothing."""
        self.uri = uri
        self._names = storage.list_names(uri)
        if not self._names:
            raise ResultsError(f"URI = {uri!r}: there is nothing; give the --out of a grid or of a run, or a results folder")
        self._follower = ResultStore(storage.join(uri, "results") if "results" in self._names else uri).follow()
        self._lock, self._looked = threading.Lock(), float("-inf")
        self._looking: threading.Thread | None = None
        self.problem = ""
        """why the results are not those that lie there, in a sentence"""
        self._read = _Read([], self._follower.everything, self._follower.table)
        self._ended: dict[tuple[str, str], Trial] = {}

    def refresh(self) -> None:
        """Look for what has been added, unless that was done just before.

        A look that takes longer than PATIENCE goes on in the background, and what was read before is shown meanwhile; only the first one
        is waited for.
        """
        with self._lock:
            first = self._looked == float("-inf")
            if self._looking is None and time.monotonic() - self._looked >= SECONDS:
                self._looking = threading.Thread(target=self._look, daemon=True)
                self._looking.start()
            looking = self._looking
        if looking is not None:
            looking.join(None if first else PATIENCE)

    def _look(self) -> None:
        try:
            self._follower.refresh()
            if self._read.attempts is not self._follower.everything:
                self._read = _Read(runs(self._follower.table), self._follower.everything, self._follower.table)
            self.problem = ""
        except (ResultsError, storage.StorageError) as error:
            self.problem = str(error)
        except Exception as error:  # nobody waits for this thread: what is wrong is to be seen
            self.problem = f"the results cannot be read ({type(error).__name__}: {error}); those that were read before are shown"
        finally:
            with self._lock:
                self._looked, self._looking = time.monotonic(), None

    @property
    def runs(self) -> list[Run]:
        """Every cell's best attempt."""
        return self._read.runs

    @property
    def attempts(self) -> pa.Table:
        """All attempts at all cells, the oldest first."""
        return self._read.attempts

    @property
    def results(self) -> pa.Table:
        """The rows of every cell's best attempt."""
        return self._read.results

    def once(self, name: Hashable, make: Callable[[list[Run]], T]) -> T:
        """What `make` makes of the runs, kept until there are others."""
        read = self._read
        if name not in read.made:
            if len(read.made) >= KEPT:
                read.made.clear()
            read.made[name] = make(read.runs)
        return read.made[name]

    def sets(self) -> list[SetPlace]:
        """All distillation runs, by name."""
        found = [SetPlace(name, storage.join(self.uri, name)) for name in storage.list_names(self.uri) if name.startswith("seed-")]
        folder = storage.join(self.uri, "sets")
        for name in storage.list_names(folder):
            found += [SetPlace(f"{name}/{seed}", storage.join(folder, name, seed))
                      for seed in storage.list_names(storage.join(folder, name)) if seed.startswith("seed-")]
        return found

    def set_place(self, name: str) -> SetPlace | None:
        """The run of that name, None where there is none."""
        return next((one for one in self.sets() if one.name == name), None)

    def experiments(self) -> list[str]:
        """Ray Tune's experiments, the newest first: their names end in when they began."""
        names = [name for name in storage.list_names(storage.join(self.uri, "tune")) if "." not in name]
        return sorted(names, key=lambda name: name.partition("-")[2], reverse=True)

    def experiment(self, name: str) -> Experiment:
        """One of Ray Tune's, with all its trials."""
        folder = storage.join(self.uri, "tune", name)
        names = storage.list_names(folder)
        newest = max((each for each in names if each.startswith("experiment_state-")), default=None)
        snapshot = storage.join(folder, newest) if newest else ""
        written = storage.changed(snapshot) if newest else None
        told = _told(snapshot, written) if written else {}
        there = {each for each in names if each.startswith("trial-")}
        return Experiment(name, [self._trial(name, each, told.get(each), each in there) for each in sorted(there | set(told))],
                          written and written[1])

    def curve(self, trial_path: str) -> list[dict[str, Any]]:
        """What a trial reported, line by line; empty where its records are not in this library. trial_path: as in results."""
        folder = self._folder(trial_path)
        return _lines(storage.join(folder, "result.json")) if folder else []

    def error(self, trial_path: str) -> str:
        """The traceback of a trial that failed; '' where there is none."""
        folder = self._folder(trial_path)
        return _text(storage.join(folder, "error.txt")) if folder else ""

    def log(self, trial_path: str) -> str:
        """What a trial wrote into its log; '' where there is none."""
        folder = self._folder(trial_path)
        return _text(storage.join(folder, "log.txt")) if folder else ""

    def _folder(self, trial_path: str) -> str | None:
        """A trial's folder here, by the last two names of its path: the library may have been moved, and a result may say anything."""
        experiment, _, name = "/".join(trial_path.rstrip("/").split("/")[-2:]).partition("/")
        if experiment not in self.experiments() or name not in storage.list_names(storage.join(self.uri, "tune", experiment)):
            return None
        return storage.join(self.uri, "tune", experiment, name)

    def _trial(self, experiment: str, name: str, told: str | None, there: bool) -> Trial:
        if (experiment, name) in self._ended:
            return self._ended[experiment, name]
        if not there:
            return Trial(experiment, name, told or "open", {})
        folder = storage.join(self.uri, "tune", experiment, name)
        lines = _lines(storage.join(folder, "result.json"))
        last = lines[-1] if lines else {}
        error = "" if "status" in last else _text(storage.join(folder, "error.txt"))
        state = "done" if "status" in last else "running" if told == "running" else "failed" if error else told or "open"
        trial = Trial(experiment, name, state, last, error[-TAIL:],
                      _text(storage.join(folder, "log.txt"))[-TAIL:] if state in ("running", "failed") else "")
        if state == "done" or (state == told == "failed"):
            self._ended[experiment, name] = trial
        return trial


_TOLD = {"PENDING": "pending", "RUNNING": "running", "PAUSED": "paused", "TERMINATED": "done", "ERROR": "failed"}


@lru_cache(maxsize=32)
def _told(snapshot: str, written: object) -> dict[str, str]:
    """State by trial folder, of Ray Tune's record of an experiment (JSON; what is pickled in it is not touched), as it was written then.
    {} where it is another format."""
    try:
        trials = [json.loads(trial) for trial, _ in json.loads(_text(snapshot))["trial_data"]]
        return {str(one["custom_dirname"]): _TOLD.get(one["status"], "open") for one in trials
                if str(one["custom_dirname"]).startswith("trial-")}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _text(uri: str) -> str:
    try:
        return storage.read_whole(uri).decode("utf-8", "replace")
    except (FileNotFoundError, storage.StorageError):
        return ""


def _lines(uri: str) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; the last one may be being written."""
    found = []
    for line in _text(uri).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found

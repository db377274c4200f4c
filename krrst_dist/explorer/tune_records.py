"""What Ray Tune keeps of its experiments: which trials there are and in what state, their curves, logs and errors. Only read.

All names that come from a result are looked for among those that are there, so that nothing outside the folder can be asked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from krrst_dist import storage

SILENT = timedelta(minutes=10)
"""without a word, after which an experiment is taken to have been stopped"""
TAIL = 20_000
"""bytes of a trial's log or error that are shown, and of its results that its state is read from"""


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

    @property
    def silent(self) -> bool:
        """Has Tune told nothing for long?"""
        return self.told is not None and datetime.now(UTC) - self.told > SILENT


class TuneRecords:
    """All experiments below a path or URI."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._ended: dict[tuple[str, str], Trial] = {}

    def experiments(self) -> list[str]:
        """Ray Tune's experiments, the newest first: their names end in when they began."""
        names = [name for name in storage.list_folders(self.uri) if "." not in name]
        return sorted(names, key=lambda name: name.partition("-")[2], reverse=True)

    def experiment(self, name: str) -> Experiment:
        """One of Ray Tune's, with all its trials."""
        folder = storage.join(self.uri, name)
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
        return _parsed(_text(storage.join(folder, "result.json"))) if folder else []

    def error(self, trial_path: str) -> str:
        """The traceback of a trial that failed; '' where there is none."""
        folder = self._folder(trial_path)
        return _end(storage.join(folder, "error.txt")) if folder else ""

    def log(self, trial_path: str) -> str:
        """What a trial wrote into its log; '' where there is none."""
        folder = self._folder(trial_path)
        return _end(storage.join(folder, "log.txt")) if folder else ""

    def _folder(self, trial_path: str) -> str | None:
        """A trial's folder here, by its name and the one above it that is an experiment's: the library may have been moved, and a result
        may say anything."""
        *above, name = trial_path.rstrip("/").split("/")
        experiment = next((each for each in reversed(above) if each in self.experiments()), None)
        if experiment is None or name not in storage.list_names(storage.join(self.uri, experiment)):
            return None
        return storage.join(self.uri, experiment, name)

    def _trial(self, experiment: str, name: str, told: str | None, there: bool) -> Trial:
        if (experiment, name) in self._ended:
            return self._ended[experiment, name]
        if not there:
            return Trial(experiment, name, told or "open", {})
        folder = storage.join(self.uri, experiment, name)
        last = next(reversed(_parsed(_end(storage.join(folder, "result.json")))), {})
        error = "" if "status" in last else _end(storage.join(folder, "error.txt"))
        state = "done" if "status" in last else "running" if told == "running" else "failed" if error else told or "open"
        trial = Trial(experiment, name, state, last, error, _end(storage.join(folder, "log.txt")) if state in ("running", "failed") else "")
        if state == "done":
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


def _text(uri: str, read: Callable[[str], bytes] = storage.read_whole) -> str:
    """A file as text, '' where there is none; a link is not followed, as it may lead out of the folder."""
    try:
        return "" if storage.is_link(uri) else read(uri).decode("utf-8", "replace")
    except (FileNotFoundError, storage.StorageError):
        return ""


def _end(uri: str) -> str:
    """The last of a file that may be long."""
    return _text(uri, lambda uri: storage.read_end(uri, TAIL))


def _parsed(text: str) -> list[dict[str, Any]]:
    """The whole lines of JSON lines; the first and the last one may be in pieces."""
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found

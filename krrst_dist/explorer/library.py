"""What lies under one path or URI: results, the trials of Ray Tune, distilled sets. Read anew when something has been added.

A grid's folder has `results/`, `tune/` and `sets/`; a run's has `seed-*/`; a results store has Parquet files. All names that come
from a request or from a result are looked for among those that were listed, so that nothing outside the folder can be asked for.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import pyarrow as pa

from krrst_dist import parquet, storage
from krrst_dist.artifacts import DistilledSet
from krrst_dist.results import ResultsError, ResultStore
from krrst_dist.results.tables import Run, runs

SECONDS = 2.0
"""between two looks at what has been added"""


@dataclass(frozen=True)
class SetPlace:
    """A distillation run. name: its folder, below the library's."""

    name: str
    uri: str


@dataclass(frozen=True)
class Trial:
    """One trial of Ray Tune. state: done, failed, or open: running, or waiting, or cut short."""

    experiment: str
    name: str
    state: str
    last: dict[str, Any]
    error: str = ""


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
        self.problem = ""
        """why the results are not those that lie there, in a sentence"""
        self._runs: list[Run] = []

    def refresh(self) -> None:
        """Look for what has been added, unless that was done just before."""
        with self._lock:
            if time.monotonic() - self._looked < SECONDS:
                return
            try:
                if self._follower.refresh():
                    self._runs = runs(self._follower.table)
                self.problem = ""
            except (ResultsError, storage.StorageError) as error:
                self.problem = str(error)
            self._looked = time.monotonic()

    @property
    def runs(self) -> list[Run]:
        """Every cell's best attempt."""
        return self._runs

    @property
    def attempts(self) -> pa.Table:
        """All attempts at all cells, the oldest first."""
        return self._follower.everything

    @property
    def results(self) -> pa.Table:
        """The rows of every cell's best attempt."""
        return self._follower.table

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
        """Ray Tune's experiments, the newest first."""
        return [name for name in reversed(storage.list_names(storage.join(self.uri, "tune"))) if "." not in name]

    def trials(self, experiment: str) -> list[Trial]:
        """The trials of an experiment that is there, by name."""
        if experiment not in self.experiments():
            return []
        folder = storage.join(self.uri, "tune", experiment)
        return [self._trial(experiment, name) for name in storage.list_names(folder) if name.startswith("trial-")]

    def curve(self, trial_path: str) -> list[dict[str, Any]]:
        """What a trial reported, line by line; empty where its records are not in this library. trial_path: as in results."""
        folder = self._folder(trial_path)
        return _lines(storage.join(folder, "result.json")) if folder else []

    def error(self, trial_path: str) -> str:
        """The traceback of a trial that failed; '' where there is none."""
        folder = self._folder(trial_path)
        return _text(storage.join(folder, "error.txt")) if folder else ""

    def _folder(self, trial_path: str) -> str | None:
        """A trial's folder here, by the last two names of its path: the library may have been moved, and a result may say anything."""
        experiment, _, name = "/".join(trial_path.rstrip("/").split("/")[-2:]).partition("/")
        if experiment not in self.experiments() or name not in storage.list_names(storage.join(self.uri, "tune", experiment)):
            return None
        return storage.join(self.uri, "tune", experiment, name)

    def _trial(self, experiment: str, name: str) -> Trial:
        folder = storage.join(self.uri, "tune", experiment, name)
        error = _text(storage.join(folder, "error.txt"))
        lines = _lines(storage.join(folder, "result.json"))
        last = lines[-1] if lines else {}
        return Trial(experiment, name, "failed" if error else "done" if "status" in last else "open", last, error)


@dataclass(frozen=True)
class SetFiles:
    """The files of one distillation run, as they are now."""

    place: SetPlace

    @cached_property
    def names(self) -> list[str]:
        """In its folder."""
        return storage.list_names(self.place.uri)

    @property
    def steps(self) -> list[int]:
        """Of the pictures that were kept along the way, from checkpoints."""
        found = storage.list_names(storage.join(self.place.uri, "checkpoints"))
        return sorted({int(name.split("-")[1]) for name in found if name.startswith("step-") and name.split("-")[1].isdigit()})

    def load(self, which: str) -> DistilledSet:
        """which: `distilled` or `start`. Raises FileNotFoundError, ArtifactError, StorageError."""
        uri = storage.join(self.place.uri, f"{which}.safetensors")
        return _loaded(uri, storage.digest(uri))

    @property
    def history(self) -> pa.Table | None:
        """Losses by update, None where there are none that can be read."""
        try:
            return parquet.decode(storage.read_whole(storage.join(self.place.uri, "history.parquet")))
        except (OSError, ValueError, pa.ArrowException):
            return None


@lru_cache(maxsize=8)
def _loaded(uri: str, digest: str) -> DistilledSet:
    return DistilledSet.load(uri)


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
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found

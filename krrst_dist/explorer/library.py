"""What lies under one path or URI: results, the trials of Ray Tune, distilled sets. Read anew when something has been added.

A grid's folder has `results/`, `tune/` and `sets/`; a run's has `seed-*/`; a results store has Parquet files. All names that come
from a request or from a result are looked for among those that were listed, so that nothing outside the folder can be asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

from krrst_dist import storage
from krrst_dist.explorer.tune_records import TuneRecords
from krrst_dist.results import ResultsError, ResultStore
from krrst_dist.results.tables import Run, runs

SECONDS = 2.0
"""between two looks at what has been added"""

PATIENCE = 0.3
"""seconds that a page waits for such a look"""
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


class Library:
    """Everything below a path or URI."""

    def __init__(self, uri: str) -> None:
        """Raises ResultsError where there is nothing."""
        self.uri = uri
        if not storage.list_names(uri):
            raise ResultsError(f"URI = {uri!r}: there is nothing; give the --out of a grid or of a run, or a results folder")
        self.tune = TuneRecords(storage.join(uri, "tune"))
        self._follower = self._store().follow()
        self._lock, self._looked = threading.Lock(), float("-inf")
        self._looking: threading.Thread | None = None
        self.problem = ""
        """why the results are not those that lie there, in a sentence"""
        self._read = _Read([], self._follower.everything, self._follower.table)

    def begin(self) -> threading.Thread | None:
        """Begin to look for what has been added, unless that was done just before; the look that goes on, if one does."""
        with self._lock:
            if self._looking is None and time.monotonic() - self._looked >= SECONDS:
                self._looking = threading.Thread(target=self._look, daemon=True)
                self._looking.start()
            return self._looking

    def refresh(self) -> None:
        """Look for what has been added, unless that was done just before.

        A look that takes longer than PATIENCE goes on in the background, and what was read before is shown meanwhile; only the first one
        is waited for.
        """
        first = self._looked == float("-inf")
        if (looking := self.begin()) is not None:
            looking.join(None if first else PATIENCE)

    def _store(self) -> ResultStore:
        """`results/`, as a grid makes it with its first result; else the folder itself."""
        return ResultStore(storage.join(self.uri, "results") if "results" in storage.list_folders(self.uri) else self.uri)

    def _look(self) -> None:
        try:
            if (store := self._store()).uri != self._follower.store.uri:
                self._follower = store.follow()
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
        """All distillation runs in folders that can be read, by name."""
        found = _seeds("", self.uri)
        folder = storage.join(self.uri, "sets")
        for name in storage.list_folders(folder):
            with suppress(storage.StorageError):
                found += _seeds(f"{name}/", storage.join(folder, name))
        return found

    def set_place(self, name: str) -> SetPlace | None:
        """The run of that name, None where there is none."""
        return next((one for one in self.sets() if one.name == name), None)


def _seeds(above: str, folder: str) -> list[SetPlace]:
    """The runs in a folder. above: what their names begin with."""
    return [SetPlace(above + name, storage.join(folder, name)) for name in storage.list_folders(folder) if name.startswith("seed-")]

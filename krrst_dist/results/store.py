"""Where results lie: a folder or object store of Parquet files, each written once, under a name that is never used again.

So many writers never meet. A reader takes the union of all files and, of every cell, the best attempt: the newest that
is ok; where there is none, the newest that diverged; else the newest that failed. "Newest" goes by the clocks of the
machines that wrote. Only names that end in .parquet count, hidden files excepted; whatever else lies there is left
alone. Knows nothing of tables for people.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from krrst_dist import parquet, provenance, storage
from krrst_dist.results.columns import codes
from krrst_dist.results.schema import (
    LARGEST,
    SCHEMA,
    SCHEMAS,
    STATUSES,
    VERSION_KEY,
    Cell,
    Outcome,
    ResultsError,
    package_versions,
    rows,
    upgrade,
)

THREADS = 16
"""files read at once: most of the time goes into waiting for storage"""


class ResultStore:
    """The results in one place, a path or URI. Holds no open files and may be copied to other processes."""

    def __init__(self, uri: str | Path, revision: provenance.Revision | None = None) -> None:
        """revision: of the code that computes what is written; default: of the code as it is when the first result is."""
        self.uri, self._given = str(uri), revision

    def write(self, cell: Cell, outcome: Outcome) -> str:
        """Store one attempt, whole or not at all; returns its file. Raises StorageError."""
        attempt = uuid.uuid4().hex
        return self._save(f"cell-{cell.key[:16]}-{attempt}.parquet",
                          rows(cell, outcome, attempt=attempt, finished=datetime.now(UTC), revision=self._revision,
                               versions=package_versions()))

    def read(self, *, all_attempts: bool = False) -> pa.Table:
        """The rows of every cell's best attempt (or of all attempts), the oldest first. Raises ResultsError naming a bad file."""
        table = _union(list(self._files().values()))
        return table if all_attempts else _best(table)

    def follow(self) -> Follower:
        """For reading it again and again while it grows."""
        return Follower(self)

    def finished(self) -> dict[str, str]:
        """Keys of the cells that need not be computed again, with the methods that they are stored under: those that are ok, and
        those that diverged and would again."""
        table = self.read()
        done = table.filter(pc.not_equal(table["status"], "failed"))
        return dict(zip(done["cell"].to_pylist(), done["method"].to_pylist(), strict=True))

    def merge(self) -> int:
        """Make one file of all, with all attempts; returns how many there were.

        The new file is there before the first old one goes, and only what was read goes: neither a kill nor another
        merge loses anything. What is left over is there twice until the next merge, which readers do not notice.
        """
        files = self._files()
        if len(files) > 1:
            self._save(f"merged-{uuid.uuid4().hex}.parquet", _union(list(files.values())))
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(self._delete, files))
        return len(files)

    @cached_property
    def _revision(self) -> provenance.Revision:
        return self._given or provenance.revision()

    def _save(self, name: str, table: pa.Table) -> str:
        uri = storage.join(self.uri, name)
        storage.write_whole(uri, parquet.encode(table))
        return uri

    def _files(self, known: Mapping[str, pa.Table] | None = None) -> dict[str, pa.Table]:
        """Every file's rows; of those in `known` as they are there. A file that a merge takes away meanwhile is in a new one, so look
        again until nothing changes.

        A listing is not of one moment: it can miss both a file that goes and the one that takes its place. So two
        listings that follow each other have to agree, and all that they name has to have been read.
        """
        found: dict[str, pa.Table | None] = {}
        if known:
            names = self._names()
            if set(names) == set(known):
                return dict(known)
            found = {name: known[name] for name in names if name in known}
        before: list[str] | None = None
        with ThreadPoolExecutor(THREADS) as pool:
            while (names := self._names()) != before:
                new = [name for name in names if name not in found]
                found |= zip(new, pool.map(self._load, new), strict=True)
                before = names
        return {name: table for name, table in found.items() if table is not None}

    def _names(self) -> list[str]:
        return [name for name in storage.list_names(self.uri) if name.endswith(".parquet") and not name.startswith(".")]

    def _load(self, name: str) -> pa.Table | None:
        """A file's rows, None when it has gone."""
        uri = storage.join(self.uri, name)
        try:
            return _parse(storage.read_whole(uri), uri)
        except FileNotFoundError:
            return None

    def _delete(self, name: str) -> None:
        uri = storage.join(self.uri, name)
        path = storage.local_path(uri)
        try:
            if path is not None:
                path.unlink(missing_ok=True)
            else:
                system, inside = fs.FileSystem.from_uri(uri)
                system.delete_file(inside)
        except FileNotFoundError:
            pass  # another merge was faster
        except (OSError, pa.ArrowException) as error:
            raise storage.StorageError(f"cannot delete {uri}: {error}; check the permissions; nothing is lost, merge again") from error


class Follower:
    """A store that is read again and again: files that were read before are not read again, as no name is used twice.

    table: the rows of every cell's best attempt, as of the last `refresh`; everything: those of all attempts.
    """

    def __init__(self, store: ResultStore) -> None:
        self.store, self._files = store, {}
        self.table = self.everything = SCHEMA.empty_table()

    def refresh(self) -> bool:
        """Read what is new; was there anything? Raises ResultsError naming a bad file, StorageError; the tables then stay."""
        files = self.store._files(self._files)
        if files.keys() == self._files.keys():
            return False
        everything = _union(list(files.values()))
        self._files, self.everything, self.table = files, everything, _best(everything)
        return True


def _parse(payload: bytes, uri: str) -> pa.Table:
    """The rows in a file's bytes. Raises ResultsError when they are not what this code writes."""
    remedy = "move it out of the folder; if it was a result, its cell is computed again"
    try:
        found = parquet.decode(payload)
        schema = found.schema
        version = (schema.metadata or {}).get(VERSION_KEY, b"").decode()
        if not version:
            raise ResultsError(f"{uri} is a Parquet file, but not of results (its schema metadata lack {VERSION_KEY.decode()!r}); {remedy}")
        if version not in SCHEMAS:
            raise ResultsError(f"{uri} has results schema version {version!r}, this code reads {', '.join(map(repr, SCHEMAS))}; use the "
                               f"version of krrst_dist that wrote it (its commit is in the file), or move it out of the folder")
        expected = SCHEMAS[version]
        if not schema.equals(expected):
            wrong = sorted({_described(column) for column in schema} ^ {_described(column) for column in expected}) or ["their order"]
            raise ResultsError(f"{uri} says it has results schema version {version}, but its columns do not fit it: {', '.join(wrong)}; "
                               f"{remedy}")
        table = upgrade(pa.Table.from_arrays(found.columns, schema=expected))
        table.validate(full=True)
    except ResultsError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ResultsError(f"{uri} is truncated, damaged or no Parquet file ({error}); {remedy}") from None
    if wrong := _unsound(table):
        raise ResultsError(f"{uri} has {wrong}; {remedy}")
    return table


def _unsound(table: pa.Table) -> str:
    """What in rows of the right types cannot be a result, '' where nothing is."""
    if unknown := set(pc.unique(table["status"]).to_pylist()) - set(STATUSES):
        return f"status {', '.join(sorted(unknown))}; it must be one of {', '.join(STATUSES)}"
    if not (np.abs(table["value"].drop_null().to_numpy()) <= LARGEST).all():
        return f"a value that is not finite, or larger than {LARGEST:g}"
    years = pc.min_max(table["finished"].cast(pa.int64())).as_py()
    if len(table) and not (_FIRST <= years["min"] and years["max"] <= _LAST):
        return "a time in column 'finished' outside the years 1 to 9999"
    for name in ("hyperparameters", "distillation"):
        if wrong := next((text for text in pc.unique(table[name]).to_pylist() if not _is_settings(text)), None):
            return f"{name} = {wrong[:40]!r}; it must be a JSON object"
    return ""


def _is_settings(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_FIRST, _LAST = (int(datetime(*day, tzinfo=UTC).timestamp() * 1e6) for day in ((1, 1, 2), (9999, 12, 31)))


def _described(column: pa.Field) -> str:
    return f"{column.name}: {column.type}{'' if column.nullable else ' not null'}"


def _union(tables: list[pa.Table]) -> pa.Table:
    """All rows, the oldest attempt first; an attempt that is in several files counts once."""
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    attempts = codes(table["attempt"])
    of_file = np.repeat(np.arange(len(tables)), [len(t) for t in tables])
    first = np.full(len(table), len(tables))
    np.minimum.at(first, attempts, of_file)
    table = _where(table, of_file == first[attempts])
    order = pc.sort_indices(table, [(name, "ascending") for name in ("finished", "attempt", "metric")])
    return table if np.array_equal(order, np.arange(len(table))) else table.take(order)


def _best(table: pa.Table) -> pa.Table:
    """The rows of every cell's best attempt. table: the oldest first."""
    cells, attempts = codes(table["cell"]), codes(table["attempt"])
    status = pc.index_in(table["status"], pa.array(STATUSES)).to_numpy()
    score = status * len(table) + np.arange(len(table))  # of two that are equally good, the later
    best = np.zeros(len(table), np.int64)
    np.maximum.at(best, cells, score)
    return _where(table, attempts == attempts[best[cells] % max(1, len(table))])


def _where(table: pa.Table, mask: np.ndarray) -> pa.Table:
    return table if mask.all() else table.filter(pa.array(mask))  # to copy a large table takes longer than all else here

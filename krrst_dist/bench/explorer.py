"""`krrst bench explorer`: how long the explorer takes for its pages over a store of many results."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa

from krrst_dist import parquet
from krrst_dist.bench import measure
from krrst_dist.config import ConfigError
from krrst_dist.provenance import Revision
from krrst_dist.results import Cell, Outcome
from krrst_dist.results.layout import CONVNETS, TARGETS
from krrst_dist.results.schema import rows as rows_of

METHODS = ("from scratch", "Random", "K-means", "DSA", "DM", "MTT", "KIP", "FRePo", "MKDT", "SSL bilevel", "KRR-ST")
ARCHITECTURES = (CONVNETS[64], "vgg11", "alexnet", "mobilenet", "resnet10", "resnet18")
TASKS = (("finetune", 1.0), ("probe", 1.0), ("probe", 0.1), ("probe", 0.01), ("knn", 1.0))
METRICS = ("accuracy", "test_loss", "train_loss")


@dataclass(frozen=True)
class ExplorerTimes:
    """Seconds. first: from the command, which reads the store, to the end of the first page; start: of that, until it gave its address.
    again: the same page. filters: the first page with a filter that was not asked for before, one after the other. trials: pages of all
    trials."""

    start: float
    first: float
    again: list[float]
    filters: list[float]
    trials: list[float]


def bench_explorer(*, rows: int = 100_000, files: int = 100, repeats: int = 5) -> ExplorerTimes:
    """Time pages over a synthetic store, and print a table.

    Args:
        rows: of results, about: a cell has three.
        files: they lie in.
        repeats: of each page but the first.
    """
    for name, value in (("rows", rows), ("files", files), ("repeats", repeats)):
        if value < 1:
            raise ConfigError(f"{name} = {value}: must be at least 1")
    filters = [{"target": target} for target in TARGETS] + [{"method": method} for method in METHODS]
    if repeats > len(filters):
        raise ConfigError(f"repeats = {repeats}: there are {len(filters)} filters to try, each once")
    with tempfile.TemporaryDirectory() as folder:
        written = write_store(Path(folder) / "results", rows=rows, files=files)
        started = time.perf_counter()
        command = [sys.executable, "-m", "krrst_dist.explorer", folder, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                address = server.stdout.readline().partition(" ")[0]
                if not address.startswith("http"):
                    raise ConfigError("the explorer did not start; its error is above")
                start = time.perf_counter() - started
                _seconds(address)
                first = time.perf_counter() - started
                result = ExplorerTimes(start, first, [_seconds(address) for _ in range(repeats)],
                                       [_seconds(address, **filters[i]) for i in range(repeats)],
                                       [_seconds(f"{address}trials", page=str(i)) for i in range(repeats)])
            finally:
                server.terminate()
    print("\n".join([
        measure.circumstances("cpu", 1), "", f"| {written:,} rows in {files} files | seconds: median (least-most) |", "| --- | --- |",
        f"| from the command, which reads the store, to the first page | {result.first:.2f} |",
        f"| of which until it gave its address | {result.start:.2f} |",
        f"| the same page again | {measure.spread(result.again)} |", f"| with a new filter | {measure.spread(result.filters)} |",
        f"| a page of trials | {measure.spread(result.trials)} |"]))
    return result


def write_store(folder: Path, *, rows: int, files: int) -> int:
    """Write a store of about so many rows; returns how many."""
    folder.mkdir(parents=True)
    count = -(-rows // len(METRICS))
    tables = list(itertools.islice(_tables(), count))
    for i in range(files):
        if part := tables[i::files]:
            (folder / f"bench-{i}.parquet").write_bytes(parquet.encode(pa.concat_tables(part)))
    return sum(map(len, tables))


def _tables() -> Iterator[pa.Table]:
    """One cell's rows after the other: as many seeds as it takes."""
    rng, began, revision = np.random.default_rng(0), datetime(2026, 1, 1, tzinfo=UTC), Revision("c0ffee" + "0" * 34, False)
    numbers = itertools.count()
    for seed in itertools.count():
        for method, target, architecture, (task, fraction) in itertools.product(METHODS, TARGETS, ARCHITECTURES, TASKS):
            cell = Cell(method=method, source="imagenet", source_fingerprint="5a", target=target, target_fingerprint=f"t{target}",
                        task=task, architecture=architecture, resolution=64, label_fraction=fraction, evaluation_seed=seed % 3,
                        distillation_seed=None if method == "from scratch" else seed // 3,
                        set_fingerprint="" if method == "from scratch" else f"{method}-{seed // 3}",
                        hyperparameters={"steps": 1000, "lr": 0.1, "batch": 256, "part": seed // 3 if method == "from scratch" else 0},
                        distillation={"distill.m": 1000, "distill.updates": 160_000, "method": method})
            values = rng.uniform(0.2, 0.8, len(METRICS))
            outcome = Outcome(status="ok", metrics=dict(zip(METRICS, values, strict=True)), n_test=10_000, steps=1000, seconds=12.5,
                              device="a GPU", peak_memory=1 << 30, trial_path=f"/runs/grid/tune/cells-1/trial-{seed}")
            number = next(numbers)
            yield rows_of(cell, outcome, attempt=f"{number:032x}", finished=began + timedelta(seconds=number), revision=revision,
                          versions={"torch": "2.13.0"})


def _seconds(address: str, **query: str) -> float:
    started = time.perf_counter()
    with urllib.request.urlopen(f"{address}?{urlencode(query)}", timeout=600) as answer:
        answer.read()
    return time.perf_counter() - started

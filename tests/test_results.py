"""The results store: what was computed comes back, once, from its best attempt, whatever happened to the writers; and nothing else does."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import resource
import time
import uuid
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krrst_dist import storage
from krrst_dist.provenance import Revision
from krrst_dist.results import SCHEMA, Cell, Outcome, ResultsError, ResultStore, commands, results_main, select
from krrst_dist.results import store as store_module
from krrst_dist.results.schema import package_versions, rows
from krrst_dist.storage import StorageError

CELL = Cell(method="KRR-ST", source="cifar100", source_fingerprint="5a5a", target="cifar10", target_fingerprint="7a7a", task="finetune",
            architecture="convnet-128-256-512", resolution=32, evaluation_seed=1, label_fraction=0.1, distillation_seed=0,
            set_fingerprint="d1d1", distillation={"distill.m": 20},
            hyperparameters={"task": {"lr": 0.01, "steps": 10_000}, "pretrain": {"lr": 0.1}})
OK = Outcome(status="ok", metrics={"accuracy": 0.5, "test_loss": 1.25}, n_test=10_000, steps=4000, seconds=12.5, device="cpu",
             peak_memory=1 << 30, trial_path="s3://bucket/tune/trial_7")
DIVERGED = Outcome(status="diverged", metrics={"train_loss": float("nan"), "accuracy": 0.1}, error="the loss is NaN from step 17 on")
FAILED = Outcome(status="failed", error="RuntimeError: out of memory")
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(params=["disk", "file URI", "object store"])
def place(request, tmp_path) -> str:
    """A folder on each kind of storage; the object store keeps its objects in this process's memory."""
    if request.param == "object store":
        return f"fsspec+memory://{uuid.uuid4().hex}/results"
    return str(tmp_path) if request.param == "disk" else f"file://{tmp_path}"


@pytest.fixture
def store(tmp_path) -> ResultStore:
    return ResultStore(tmp_path / "results")


def attempt(outcome: Outcome, minute: int, cell: Cell = CELL) -> pa.Table:
    """One attempt that ended so many minutes past noon."""
    return rows(cell, outcome, attempt=uuid.uuid4().hex, finished=NOON + timedelta(minutes=minute), revision=Revision("c0ffee", False),
                versions={"torch": "2.11"})


def put(store: ResultStore, *tables: pa.Table) -> None:
    for table in tables:
        store._save(f"cell-{uuid.uuid4().hex}.parquet", table)


# cells and their rows


def test_every_column_comes_back_as_it_was_given(place):
    store = ResultStore(storage.join(place, "new"))
    before = datetime.now(UTC)
    uri = store.write(CELL, OK)
    table = store.read()
    assert table.schema.equals(SCHEMA) and table.column_names == SCHEMA.names
    found = {row["metric"]: row for row in table.to_pylist()}
    assert {name: row["value"] for name, row in found.items()} == {"accuracy": 0.5, "test_loss": 1.25}
    row = found["accuracy"]
    for name, value in (asdict(CELL) | asdict(OK)).items():
        if name not in ("hyperparameters", "distillation", "metrics"):
            assert row[name] == value, name
    assert json.loads(row["hyperparameters"]) == CELL.hyperparameters and json.loads(row["distillation"]) == CELL.distillation
    assert json.loads(row["package_versions"])["pyarrow"] == pa.__version__
    assert before <= row["finished"] <= datetime.now(UTC)
    assert row["cell"] == CELL.key and len(row["attempt"]) == 32 and found["test_loss"]["attempt"] == row["attempt"]
    assert len(row["commit"]) in (7, 40) and isinstance(row["dirty"], bool)
    assert storage.list_names(store.uri) == [f"cell-{CELL.key[:16]}-{row['attempt']}.parquet"] == [uri.rpartition("/")[2]]


def test_every_file_explains_its_columns_and_carries_the_schema_version(store):
    schema = pq.read_schema(store.write(CELL, OK))
    assert schema.metadata[b"krrst_results"] == b"2"
    assert all(field.metadata[b"description"] for field in schema)


def test_the_key_depends_on_exactly_the_named_fields():
    changed = {"method": "DM", "source": "x", "source_fingerprint": "x", "target": "x", "target_fingerprint": "x", "task": "probe",
               "architecture": "vgg11", "resolution": 64, "evaluation_seed": 2, "label_fraction": 0.5, "distillation_seed": 9,
               "set_fingerprint": "x", "distillation": {"distill.m": 1}, "hyperparameters": {"task": {"lr": 0.02}}}
    assert set(changed) == {field.name for field in fields(Cell)}
    moves = {name for name, value in changed.items() if replace(CELL, **{name: value}).key != CELL.key}
    assert moves == {"set_fingerprint", "architecture", "target_fingerprint", "task", "hyperparameters", "label_fraction",
                     "evaluation_seed"}
    assert len({CELL.key, *(replace(CELL, **{name: changed[name]}).key for name in moves)}) == 8


def test_the_key_does_not_depend_on_how_equal_values_are_written():
    recipe = {"pretrain": {"lr": 0.1}, "task": {"steps": 10_000, "lr": 1e-2}}
    same = replace(CELL, hyperparameters=recipe, evaluation_seed=np.int64(1), label_fraction=np.float64(0.1))
    assert same.key == CELL.key
    assert replace(CELL, label_fraction=1).key == replace(CELL, label_fraction=1.0).key
    assert replace(CELL, set_fingerprint="a", architecture="bc").key != replace(CELL, set_fingerprint="ab", architecture="c").key


def test_the_key_of_a_cell_is_the_same_for_ever():
    """A change here would have every finished cell computed again."""
    assert CELL.key == "cdc16942fb03092b8da642f1f5916034a86daa2e76ab8b523020d992f98491c5"


@pytest.mark.parametrize(("change", "complaint"), [
    ({"method": ""}, "method = ''"), ({"task": ""}, "task = ''"),
    ({"label_fraction": 0}, "label_fraction = 0: must be in"), ({"label_fraction": 1.5}, "0.01 is one percent of the labels"),
    ({"label_fraction": float("nan")}, "label_fraction = nan"), ({"label_fraction": "1"}, "label_fraction = '1'"),
    ({"evaluation_seed": None}, "evaluation_seed = None: must be a whole number"),
    ({"distillation_seed": 0.5}, "distillation_seed = 0.5"), ({"resolution": "32"}, "resolution = '32'"),
    ({"hyperparameters": {"lr": float("nan")}}, "not JSON"), ({"hyperparameters": {"lr": np.zeros(2)}}, "give finite numbers"),
])
def test_a_cell_that_cannot_be_is_refused(change, complaint):
    with pytest.raises(ResultsError, match="^[a-z_]+ = .*") as refused:
        replace(CELL, **change)
    assert complaint in str(refused.value)


@pytest.mark.parametrize(("outcome", "complaint"), [
    ({"status": "fine", "metrics": {"accuracy": 1.0}}, "status = 'fine': must be one of failed, diverged, ok"),
    ({"status": "ok"}, "status ok needs a finite one"),
    ({"status": "ok", "metrics": {"accuracy": float("nan")}}, "say 'diverged' instead"),
    ({"status": "ok", "metrics": {"": 1.0}}, "must be numbers by name"),
    ({"status": "ok", "metrics": {"accuracy": "high"}}, "must be numbers by name"),
    ({"status": "failed"}, "status failed needs an error and no metrics"),
    ({"status": "failed", "error": "x", "metrics": {"accuracy": 0.5}}, "say 'diverged' where there are last numbers"),
])
def test_an_outcome_that_cannot_be_is_refused(outcome, complaint):
    with pytest.raises(ResultsError) as refused:
        Outcome(**outcome)
    assert complaint in str(refused.value)


def test_numbers_that_are_not_finite_are_stored_as_null(store):
    store.write(CELL, DIVERGED)
    store.write(replace(CELL, evaluation_seed=2), Outcome(status="ok", metrics={"accuracy": np.float32(0.5), "fid": float("inf")}))
    assert {(row["status"], row["metric"]): row["value"] for row in store.read().to_pylist()} == {
        ("diverged", "train_loss"): None, ("diverged", "accuracy"): 0.1, ("ok", "accuracy"): 0.5, ("ok", "fid"): None}


@pytest.mark.parametrize("outcome", [FAILED, Outcome(status="diverged")])
def test_an_attempt_without_numbers_has_one_row(store, outcome):
    store.write(CELL, outcome)
    [row] = store.read().to_pylist()
    assert (row["status"], row["error"], row["metric"], row["value"], row["n_test"]) == (outcome.status, outcome.error, "", None, None)


def test_an_error_that_is_no_proper_text_is_stored_all_the_same(store):
    store.write(replace(CELL, method="M\udcff"), Outcome(status="failed", error="no file 'caf\udce9'\n\x00\u202e"))
    [row] = store.read().to_pylist()
    assert (row["method"], row["error"]) == ("M?", "no file 'caf?'\n\x00\u202e")


def test_package_versions_are_found_without_importing_the_packages():
    assert {"torch", "ray", "numpy", "pyarrow"} <= set(package_versions())


# which attempt counts


def test_the_newest_good_attempt_of_each_cell_is_read(store):
    other = replace(CELL, evaluation_seed=2)
    put(store, attempt(FAILED, 9), attempt(replace(OK, metrics={"accuracy": 0.2}), 2), attempt(replace(OK, metrics={"accuracy": 0.3}), 3),
        attempt(DIVERGED, 8), attempt(replace(OK, metrics={"accuracy": 0.1}), 1),
        attempt(FAILED, 5, other), attempt(DIVERGED, 3, other), attempt(replace(DIVERGED, metrics={"accuracy": 0.7}), 4, other))
    assert [(row["evaluation_seed"], row["status"], row["metric"], row["value"]) for row in store.read().to_pylist()] == [
        (1, "ok", "accuracy", 0.3), (2, "diverged", "accuracy", 0.7)]
    everything = store.read(all_attempts=True)
    assert len(set(everything["attempt"].to_pylist())) == 8
    assert everything["finished"].to_pylist() == sorted(everything["finished"].to_pylist())


def test_metrics_of_an_older_attempt_do_not_linger(store):
    put(store, attempt(OK, 1), attempt(Outcome(status="ok", metrics={"accuracy": 0.9}), 2))
    assert store.read()["metric"].to_pylist() == ["accuracy"]


def test_of_two_failures_the_newest_is_read(store):
    put(store, attempt(replace(FAILED, error="second"), 2), attempt(replace(FAILED, error="first"), 1))
    assert store.read()["error"].to_pylist() == ["second"]


def test_finished_cells_are_those_that_are_ok_or_diverged(store):
    cells = [replace(CELL, evaluation_seed=seed) for seed in range(4)]
    put(store, attempt(OK, 1, cells[0]), attempt(FAILED, 2, cells[0]), attempt(DIVERGED, 1, cells[1]), attempt(FAILED, 1, cells[2]))
    assert store.finished() == {cells[0].key: cells[0].method, cells[1].key: cells[1].method}


def test_an_empty_store_and_one_that_is_not_there_hold_nothing(place):
    store = ResultStore(storage.join(place, "nothing"))
    assert len(store.read()) == 0 and store.read().schema.equals(SCHEMA)
    assert store.finished() == {} and store.merge() == 0


# merging


def test_merging_changes_nothing_that_is_read(place):
    store = ResultStore(place)
    put(store, *(attempt(outcome, minute, replace(CELL, evaluation_seed=minute % 3))
                 for minute, outcome in enumerate([OK, FAILED, DIVERGED, OK, DIVERGED, FAILED, OK])))
    best, everything = store.read(), store.read(all_attempts=True)
    assert store.merge() == 7
    [name] = storage.list_names(store.uri)
    assert name.startswith("merged-")
    assert store.read().equals(best) and store.read(all_attempts=True).equals(everything)
    assert store.merge() == 1 and storage.list_names(store.uri) == [name]
    store.write(CELL, OK)
    assert store.merge() == 2 and len(storage.list_names(store.uri)) == 1


def test_a_merge_that_is_killed_before_it_deletes_loses_and_doubles_nothing(store, monkeypatch):
    for seed in range(5):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    before = store.read(all_attempts=True)

    def killed(self: ResultStore, name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResultStore, "_delete", killed)
        with pytest.raises(KeyboardInterrupt):
            store.merge()
    assert len(storage.list_names(store.uri)) == 6
    assert store.read(all_attempts=True).equals(before)
    os.unlink(storage.join(store.uri, storage.list_names(store.uri)[0]))  # killed half-way through
    assert store.read(all_attempts=True).equals(before)
    assert store.merge() == 5 and store.read(all_attempts=True).equals(before)


def test_a_merge_that_cannot_write_deletes_nothing(store, monkeypatch):
    for seed in range(3):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    names = storage.list_names(store.uri)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        store.merge()
    assert sorted(os.listdir(store.uri)) == names


def test_a_merge_deletes_only_what_it_has_read(store, monkeypatch):
    for seed in range(3):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    late = replace(CELL, evaluation_seed=3)
    save = ResultStore._save

    def save_late(self: ResultStore, name: str, table: pa.Table) -> str:
        monkeypatch.undo()
        self.write(late, OK)
        return save(self, name, table)

    monkeypatch.setattr(ResultStore, "_save", save_late)
    assert store.merge() == 3
    assert [name.partition("-")[0] for name in storage.list_names(store.uri)] == ["cell", "merged"]
    assert late.key in store.finished() and len(store.finished()) == 4


def test_two_merges_at_once_lose_nothing(place, monkeypatch):
    """The second reads, writes and deletes between the first one's reading and writing."""
    store = ResultStore(place)
    for seed in range(4):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    before = store.read(all_attempts=True)
    save = ResultStore._save

    def save_after_another_merge(self: ResultStore, name: str, table: pa.Table) -> str:
        monkeypatch.undo()
        assert ResultStore(self.uri).merge() == 4
        return save(self, name, table)

    monkeypatch.setattr(ResultStore, "_save", save_after_another_merge)
    assert store.merge() == 4
    assert len(storage.list_names(store.uri)) == 2
    assert store.read(all_attempts=True).equals(before)
    assert store.merge() == 2 and store.read(all_attempts=True).equals(before)


def test_a_reader_whose_files_are_merged_away_finds_them_in_the_new_one(store, monkeypatch):
    for seed in range(4):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    listed = storage.list_names

    def list_then_merge(uri: str) -> list[str]:
        names = listed(uri)
        monkeypatch.undo()
        ResultStore(uri).merge()
        return names

    monkeypatch.setattr(storage, "list_names", list_then_merge)
    assert len(store.finished()) == 4


def write_many(uri: str, first: int, count: int) -> None:
    for seed in range(first, first + count):
        ResultStore(uri).write(replace(CELL, evaluation_seed=seed), OK)


def merge_often(uri: str, times: int) -> None:
    for _ in range(times):
        ResultStore(uri).merge()


def test_writers_mergers_and_readers_in_many_processes_never_meet(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [*(context.Process(target=write_many, args=(str(tmp_path), 100 * i, 25)) for i in range(4)),
               *(context.Process(target=merge_often, args=(str(tmp_path), 12)) for _ in range(2))]
    for worker in workers:
        worker.start()
    counts = []
    while any(worker.is_alive() for worker in workers):
        counts.append(len(ResultStore(tmp_path).finished()))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert counts == sorted(counts), "a reader lost cells that had been there"
    store = ResultStore(tmp_path)
    wanted = {replace(CELL, evaluation_seed=100 * i + j).key for i in range(4) for j in range(25)}
    assert set(store.finished()) == wanted
    store.merge()
    assert set(store.finished()) == wanted and len(store.read(all_attempts=True)) == 200


# files that are not what they should be


def written(**change) -> bytes:
    """A results file with another schema or other metadata."""
    table = attempt(OK, 0)
    for name in change.get("without", ()):
        table = table.drop_columns([name])
    if "cast" in change:
        index = table.column_names.index(change["cast"])
        table = table.cast(table.schema.set(index, table.schema.field(index).with_type(pa.large_string())))
    if "extra" in change:
        table = table.append_column(change["extra"], pa.array([1] * len(table)))
    if change.get("reverse"):
        table = table.select(table.column_names[::-1])
    if "metadata" in change:
        table = table.replace_schema_metadata(change["metadata"])
    if "status" in change:
        index = table.column_names.index("status")
        table = table.set_column(index, SCHEMA.field("status"), pa.array([change["status"]] * len(table)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(("payload", "complaint"), [
    (b"", "is truncated, damaged or no Parquet file"),
    (b"method,accuracy\nKRR-ST,0.5\n", "is truncated, damaged or no Parquet file"),
    (written()[:-20], "is truncated, damaged or no Parquet file"),
    (written()[:1000], "is truncated, damaged or no Parquet file"),
    (b"PAR1" + b"\0" * 100 + b"PAR1", "is truncated, damaged or no Parquet file"),
    (written(metadata={}), "is a Parquet file, but not of results"),
    (written(metadata={"krrst_dist": "1"}), "is a Parquet file, but not of results"),
    (written(metadata={"krrst_results": "0"}), "has results schema version '0', this code reads '1', '2'"),
    (written(metadata={"krrst_results": "3"}), "use the version of krrst_dist that wrote it"),
    (written(without=["peak_memory"]), "its columns do not fit it: peak_memory: int64"),
    (written(metadata={"krrst_results": "1"}), "version 1, but its columns do not fit it: distillation: string"),
    (written(extra="colour"), "its columns do not fit it: colour: int64"),
    (written(cast="method"), "method: large_string"),
    (written(reverse=True), "do not fit it: their order"),
    (written(status="fine"), "has status fine; it must be one of failed, diverged, ok"),
])
def test_a_file_that_is_not_ours_is_refused_by_its_name(store, payload, complaint):
    store.write(CELL, OK)
    storage.write_whole(storage.join(store.uri, "odd.parquet"), payload)
    for action in (store.read, store.finished, store.merge):
        with pytest.raises(ResultsError) as refused:
            action()
        assert "results/odd.parquet" in str(refused.value) and complaint in str(refused.value)
        assert "out of the folder" in str(refused.value)
    assert len(storage.list_names(store.uri)) == 2


def test_a_file_of_the_first_version_is_read_and_merged_with_newer_ones(store):
    """It did not say how a set was made."""
    store.write(CELL, OK)
    old = replace(CELL, evaluation_seed=7)
    table = attempt(OK, 0, old).drop_columns(["distillation"]).replace_schema_metadata({"krrst_results": "1"})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_whole(storage.join(store.uri, "old.parquet"), sink.getvalue())
    for _ in range(2):
        rows_of = {row["evaluation_seed"]: row for row in store.read().to_pylist() if row["metric"] == "accuracy"}
        assert json.loads(rows_of[CELL.evaluation_seed]["distillation"]) == CELL.distillation and rows_of[7]["distillation"] == "{}"
        assert rows_of[7]["cell"] == old.key and rows_of[7]["value"] == 0.5
        store.merge()
    assert len(storage.list_names(store.uri)) == 1


def test_a_flipped_bit_is_noticed(store):
    """Unless it falls on bytes that nothing is read from, and then the rows are the right ones."""
    uri = store.write(CELL, OK)
    before, payload = store.read(), bytearray(storage.read_whole(uri))
    noticed = 0
    for position in range(10, len(payload), 97):
        payload[position] ^= 4
        storage.write_whole(uri, bytes(payload))
        try:
            table = store.read()
        except (ResultsError, StorageError):
            noticed += 1
        else:
            assert table.equals(before), f"byte {position}"
        payload[position] ^= 4
    assert noticed > 20


@pytest.mark.parametrize("name", [".partial-0123-cell-1.parquet", "._cell-1.parquet", "cell-1.parquet.tmp", "README.md", "results.csv"])
def test_files_of_other_kinds_and_hidden_ones_are_left_alone(store, name):
    store.write(CELL, OK)
    storage.write_whole(storage.join(store.uri, name), b"something else")
    assert len(store.read()) == 2 and store.merge() == 1
    assert name in os.listdir(store.uri)


def test_a_folder_with_the_name_of_a_file_is_refused_by_its_name(store):
    os.makedirs(storage.join(store.uri, "spark.parquet"))
    with pytest.raises(StorageError, match="spark.parquet"):
        store.read()


def write_with_little_room(uri: str, bytes_left: int) -> None:
    """The kernel refuses to let a file grow beyond that many bytes, as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, bytes_left))
    try:
        ResultStore(uri).write(CELL, OK)
    except StorageError as error:
        assert "cannot write" in str(error) and "check the path, its permissions and the free space" in str(error)
        os._exit(7)
    os._exit(0)


@pytest.mark.parametrize(("room", "code", "files"), [(1000, 7, 0), (1 << 20, 0, 1)])
def test_a_disk_that_is_full_is_one_error_and_leaves_nothing_half_written(tmp_path, room, code, files):
    worker = multiprocessing.get_context("spawn").Process(target=write_with_little_room, args=(str(tmp_path), room))
    worker.start()
    worker.join()
    assert worker.exitcode == code
    assert len(os.listdir(tmp_path)) == files
    assert len(ResultStore(tmp_path).finished()) == files


def test_a_hundred_thousand_rows_are_read_quickly(store):
    """About half a second alone on a core; the bound leaves room for a busy machine."""
    base = pa.concat_tables([attempt(OK, minute, replace(CELL, evaluation_seed=minute)) for minute in range(500)]).to_pylist()
    copies = [row | {name: f"{copy:04d}{row[name][4:]}" for name in ("cell", "attempt")} for copy in range(100) for row in base]
    store._save("merged-0.parquet", pa.Table.from_pylist(copies, schema=SCHEMA))
    start = time.perf_counter()
    table = store.read()
    assert time.perf_counter() - start < 10
    assert len(table) == 100_000


def test_many_small_files_are_read_side_by_side(store, monkeypatch):
    for seed in range(8):
        store.write(replace(CELL, evaluation_seed=seed), OK)
    read = storage.read_whole

    def slow(uri: str) -> bytes:
        time.sleep(0.5)
        return read(uri)

    monkeypatch.setattr(store_module.storage, "read_whole", slow)
    start = time.perf_counter()
    assert len(store.read()) == 16
    assert time.perf_counter() - start < 0.5 * 8 - 0.5


# krrst results


@pytest.fixture
def filled(store) -> ResultStore:
    put(store, attempt(OK, 1), attempt(DIVERGED, 2, replace(CELL, evaluation_seed=2)),
        attempt(FAILED, 3, replace(CELL, method="=DM|*x*", distillation_seed=None, hyperparameters={"task": {"lr": 0.02}})))
    return store


def test_results_are_shown_with_what_became_of_each_cell(filled, capsys):
    results_main(["show", filled.uri])
    said = capsys.readouterr().out
    assert said.endswith("5 rows; cells: 1 ok, 1 diverged, 1 failed\n")
    assert "RuntimeError: out of memory" in said and "the loss is NaN from step 17 on" in said and "0.5" in said
    results_main(["show", filled.uri, "--where", "status=ok", "metric=accuracy"])
    assert capsys.readouterr().out.endswith("1 rows; cells: 1 ok, 0 diverged, 0 failed\n")


def test_earlier_attempts_are_shown_on_request(store, capsys):
    put(store, attempt(FAILED, 1), attempt(OK, 2))
    results_main(["show", store.uri])
    assert "out of memory" not in capsys.readouterr().out
    results_main(["show", store.uri, "--all-attempts"])
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("where", "count"), [
    (["method=KRR-ST"], 4), (["method=KRR-ST", "method==DM|*x*"], 5), (["method=DM"], 0), (["evaluation_seed=2"], 2),
    (["evaluation_seed=2", "metric=accuracy"], 1), (["distillation_seed="], 1), (["value=0.5"], 1), (["value="], 2), (["error="], 2),
    (["label_fraction=0.1"], 5), (["dirty=false"], 5), (["hyperparameters.task.lr=0.02"], 1), (["hyperparameters.task.lr=1e-2"], 4),
    (["hyperparameters.pretrain.lr=0.1"], 4), ([], 5),
])
def test_rows_are_chosen_by_the_values_of_columns_and_hyper_parameters(filled, where, count):
    assert len(select(filled.read(), where)) == count


@pytest.mark.parametrize(("where", "complaint"), [
    ("method", "--where method: must be column=value, for instance method=KRR-ST"),
    ("metod=DM", "--where metod: no such column; did you mean 'method'?"),
    ("evaluation_seed=two", "--where evaluation_seed=two: the column holds int64"),
    ("evaluation_seed=", "the column holds int64"),
    ("hyperparameters.task.rl=1", "no hyperparameters here have it; did you mean 'task.lr'?"),
])
def test_a_condition_that_cannot_be_met_is_refused(filled, where, complaint):
    with pytest.raises(ResultsError) as refused:
        select(filled.read(), [where])
    assert complaint in str(refused.value)


def test_exports_hold_every_column_and_are_safe_to_open(filled, tmp_path, capsys):
    table = filled.read()
    results_main(["export", filled.uri])
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(lines[0]) == SCHEMA.names and len(lines) == 5
    assert {line["method"] for line in lines} == {"KRR-ST", "'=DM|*x*"}
    assert [line["value"] for line in lines] == ["" if v is None else repr(v) for v in table["value"].to_pylist()]
    results_main(["export", filled.uri, "--format", "json"])
    loaded = json.loads(capsys.readouterr().out)
    assert [row["value"] for row in loaded] == table["value"].to_pylist()
    assert loaded[0]["hyperparameters"] == CELL.hyperparameters
    results_main(["export", filled.uri, "--format", "md", "--where", "status=failed"])
    assert r"=DM\|\*x\*" in capsys.readouterr().out
    results_main(["export", filled.uri, "--format", "parquet", "--out", str(tmp_path / "all.parquet")])
    assert pq.read_table(tmp_path / "all.parquet").cast(SCHEMA).equals(table)
    for format in commands.FORMATS:
        results_main(["export", filled.uri, "--format", format, "--where", "method=none", "--out", str(tmp_path / "none")])


def test_an_exported_parquet_file_is_a_store_again(filled, tmp_path):
    results_main(["export", filled.uri, "--format", "parquet", "--all-attempts", "--out", str(tmp_path / "copy" / "all.parquet")])
    assert ResultStore(tmp_path / "copy").read(all_attempts=True).equals(filled.read(all_attempts=True))


def test_merging_says_how_many_files_there_were(filled, capsys):
    for said in ("3 files merged into one\n", "nothing to merge: 1 file\n"):
        results_main(["merge", filled.uri])
        assert capsys.readouterr().out == said


@pytest.mark.parametrize("command", [["show"], ["merge"], ["export"], ["export", "--format", "json"]])
def test_a_place_that_is_not_there_is_refused(tmp_path, command):
    with pytest.raises(ResultsError, match="there is nothing; check the path"):
        results_main([command[0], str(tmp_path / "nowhere"), *command[1:]])


def test_parquet_is_not_printed(filled):
    with pytest.raises(ResultsError, match="--out is missing"):
        results_main(["export", filled.uri, "--format", "parquet"])

"""The evaluation grid: what it computes, once; what it refuses; and that it survives what happens to it. One Ray cluster for the file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import ray
import torch
import yaml

from krrst_dist import cli, provenance
from krrst_dist.algorithm import DivergedError
from krrst_dist.artifacts import DistilledSet, Space
from krrst_dist.config import ConfigError, NetworkSettings
from krrst_dist.data.errors import DataError
from krrst_dist.data.sources import open_images
from krrst_dist.evaluation.target_model import save_target, untrained
from krrst_dist.explorer.library import Library
from krrst_dist.grid_config import Grid, SetSettings, grid_names, load_grid
from krrst_dist.on_ray import cluster, grid, grid_sets
from krrst_dist.on_ray.grid_plan import check_grid, plan
from krrst_dist.on_ray.grid_sets import _code, given, load_presets
from krrst_dist.on_ray.grid_work import Target
from krrst_dist.on_ray.heartbeat import Beat
from krrst_dist.on_ray.places import Places
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.provenance import Revision
from krrst_dist.results import ResultStore
from krrst_dist.storage import StorageError

ROOT = Path(__file__).resolve().parents[1]
MEAN, STD = (0.3, 0.3, 0.3), (0.4, 0.4, 0.4)


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    cluster.start_local(num_cpus=2)
    yield
    ray.shutdown()


def a_set(path: Path, labels: str = "features", *, seed: int = 0, resolution: int = 16, channels: int = 3, **recipe: Any) -> str:
    """A small set of noise, trained on for 3 steps."""
    x = np.random.default_rng(seed).standard_normal((12, channels, resolution, resolution)).astype(np.float32)
    y = {"features": x[:, 0, 0, :8], "soft": np.abs(x[:, 0, 0, :5]), "class": np.arange(12) % 5, "none": x[:, 0, 0, :0]}[labels]
    space = Space("normalised", MEAN[:channels], STD[:channels])
    about = {"seed": seed, "source": "digits-0-4", "source_fingerprint": "f"}
    DistilledSet(x, np.ascontiguousarray(y), labels, {"loss": "mse", "steps": 3, "batch": 8} | recipe, space, None, about).save(path)
    return str(path)


SMALL: dict[str, Any] = {
    "name": "test", "resolution": 16, "architectures": [{"name": "convnet", "widths": [4, 8]}], "targets": ["digits-5-9"], "seeds": [0],
    "finetune": {"steps": 3, "batch": 32}, "probe": {"steps": 3},
    "kd": {"epochs": 2, "noise_images": 12, "teacher": {"network": {"widths": [4, 8]}, "training": {"steps": 3, "batch": 32}}}}
NOTHING = {"method": "from scratch", "make": "nothing"}


def run(out: Path, sets: list[dict[str, Any]], *, recompute: bool = False, **changes: Any) -> int:
    return grid.run(Grid(**SMALL | {"sets": sets} | changes), out=str(out), recompute=recompute)


def rows(out: Path, **where: Any) -> list[dict[str, Any]]:
    table = ResultStore(out / "results").read()
    for column, value in where.items():
        table = table.filter(pc.equal(table[column], value))
    return table.to_pylist()


def files(out: Path, folder: str) -> list[str]:
    return sorted(path.name for path in (out / folder).iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A grid of every task, over sets of every kind of labels and none."""
    out = tmp_path_factory.mktemp("whole")
    model = out / "target.safetensors"
    config = load_preset("quickstart", **{"target.network.widths": [4, 8, 8], "target.steps": 0})
    save_target(model, untrained(config.target, resolution=16), config.target.network, resolution=16, about={})
    for i, kind in enumerate(KINDS):
        a_set(out / f"{kind}.safetensors", kind, seed=i)
    status = run(out / "run", [NOTHING, *sets_of(out)], tasks=["finetune", "probe", "knn", "kd", "fid"], **SEEDS_AND_SPLIT,
                 label_fractions={"probe": [1, 0.1]}, fid={"network": str(model)})
    assert status == 0
    return out / "run"


KINDS = ("features", "soft", "class", "none")
SEEDS_AND_SPLIT: dict[str, Any] = {"seeds": [0, 1], "split": "validation"}
"""of `whole`"""


def sets_of(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """The sets of `whole`, which lie in the folder above it."""
    return [{"method": kind, "path": str(folder / f"{kind}.safetensors")} for kind in kinds or KINDS]


def with_networks_of(whole: Path, out: Path) -> Path:
    """A folder for another grid, in which the networks of `whole` are trained already."""
    shutil.copytree(whole / "models", out / "models")
    return out


def test_every_combination_that_the_tasks_ask_for_is_a_cell(whole):
    cells = {(r["method"], r["task"], r["label_fraction"], r["evaluation_seed"]) for r in rows(whole)}
    methods = ("from scratch", "features", "soft", "class", "none")
    wanted = {(method, task, share, seed) for method in methods for seed in (0, 1)
              for task, share in (("finetune", 1), ("probe", 1), ("probe", 0.1), ("knn", 1), ("kd", 1))}
    assert cells == wanted | {(method, "fid", 1, 0) for method in methods[1:]}
    assert {r["status"] for r in rows(whole)} == {"ok"}
    assert {r["metric"] for r in rows(whole, task="kd")} == {"accuracy", "test_loss", "teacher_accuracy"}
    assert {r["metric"] for r in rows(whole, task="fid")} == {"fid"}


def test_a_row_says_what_was_measured_with_what_on_what(whole):
    row, = rows(whole, method="soft", task="finetune", evaluation_seed=1, metric="accuracy")
    assert 0 < row["value"] < 1 and row["architecture"] == "convnet-4-8"
    assert row["target"] == "digits-5-9 (validation)" and row["source"] == "digits-0-4"
    assert (row["resolution"], row["distillation_seed"], row["steps"]) == (16, 1, 3)
    assert row["n_test"] == 71  # a tenth of the 719 training images, rounded class by class
    assert row["seconds"] > 0 and row["peak_memory"] > 2**20 and len(row["commit"]) == 40 and Path(row["trial_path"]).is_dir()
    used = json.loads(row["hyperparameters"])
    assert (used["task"]["steps"], used["pretrain"]["steps"], used["pretrain"]["batch"]) == (3, 3, 8)
    assert row["set_fingerprint"] == DistilledSet.load(whole.parent / "soft.safetensors").fingerprint
    scratch = rows(whole, method="from scratch", task="finetune")[0]
    assert scratch["distillation_seed"] is None and "pretrain" not in json.loads(scratch["hyperparameters"])


def test_each_network_is_trained_once_whoever_uses_it(whole):
    names = files(whole, "models")
    assert len([name for name in names if name.startswith("encoder")]) == len(KINDS) * 2  # sets that are trained on, seeds
    assert len([name for name in names if name.startswith("teacher")]) == 1


def test_a_grid_that_has_ended_says_so_in_its_folder(whole):
    job = Beat.read(str(whole))
    assert job.state == "finished" and re.match(r"cells (\d+)/\1, 0 s left: ", job.doing)


def test_learning_curves_are_in_tunes_records(whole):
    curves = [json.loads(line) for path in (whole / "tune").glob("cells-*/*/result.json") for line in path.read_text().splitlines()]
    assert any(point.get("step") == 3 and np.isfinite(point["loss"]) for point in curves)


def test_a_trial_leaves_its_log_and_curve_where_its_row_says_and_the_explorer_finds_them(whole):
    row, = rows(whole, method="soft", task="finetune", evaluation_seed=1, metric="accuracy")
    folder, library = Path(row["trial_path"]), Library(str(whole))
    assert folder.parent.parent == whole / "tune"
    log = (folder / "log.txt").read_text()
    assert "soft" in log.splitlines()[0] and f"host {socket.gethostname()}, process" in log and log.rstrip().endswith("INFO done")
    assert library.tune.log(row["trial_path"]) == log and [point for point in library.tune.curve(row["trial_path"]) if "loss" in point]
    told = [library.tune.experiment(name) for name in library.tune.experiments()]
    assert {trial.state for one in told for trial in one.trials} == {"done"} and all(one.told for one in told)


def test_the_same_grid_started_again_computes_nothing_and_says_so_unless_asked(whole, capsys):
    before = files(whole, "results")
    sets = [NOTHING, *sets_of(whole.parent, "class")]
    assert run(whole, sets, **SEEDS_AND_SPLIT) == 0
    assert files(whole, "results") == before
    assert "4 cells, 4 finished before" in capsys.readouterr().out
    renamed = [NOTHING, {"method": "of classes", "path": sets[1]["path"]}]
    assert run(whole, renamed, seeds=[0], split="validation", recompute=True) == 0
    assert len(files(whole, "results")) == len(before) + 2
    cell = {r["cell"] for r in rows(whole, method="of classes")}
    values = [(r["method"], r["value"]) for r in ResultStore(whole / "results").read(all_attempts=True).to_pylist()
              if r["cell"] in cell and r["metric"] == "accuracy"]
    assert {method for method, _ in values} == {"class", "of classes"} and len({value for _, value in values}) == 1 == len(cell)


def test_another_recipe_split_or_seed_is_another_cell(tmp_path):
    found = given(SetSettings(method="a", path=a_set(tmp_path / "a.safetensors")))
    images = {("digits-5-9", split): open_images("digits-5-9", split, tmp_path) for split in ("train", "test")}
    cells, models = set(), set()
    for changes in ({}, {}, {"finetune": {"steps": 4, "batch": 32}}, {"split": "validation"}, {"seeds": [1]},
                    {"pretrain": {"features": {"steps": 4}}}, {"architectures": [{"name": "convnet", "widths": [8, 4]}]}):
        one = Grid(**SMALL | {"sets": [{"method": "a", "path": "a"}]} | changes)
        planned, = plan(one, found, grid._targets(one, images, places(tmp_path), wait=False), {}, str(tmp_path))
        cells.add(planned.cell.key)
        models.add(planned.encoder.uri)
    assert len(cells) == 6
    assert len(models) == 4  # the target's recipe and split change no encoder


def test_fid_of_another_network_or_source_is_another_cell(tmp_path):
    found = given(SetSettings(method="a", path=a_set(tmp_path / "a.safetensors")))
    one = Grid(**SMALL | {"sets": [{"method": "a", "path": "a"}], "tasks": ["fid"]})
    real = SimpleNamespace(name="mine", fingerprint="f1", path=tmp_path / "mine.beton")
    changed, keys = SimpleNamespace(**vars(real) | {"fingerprint": "f2"}), set()
    for source, files in ((real, {"network": "1"}), (real, {"network": "2"}), (changed, {"network": "1"})):
        planned, = plan(one, found, [], {found[0].path: source}, str(tmp_path), files=files)
        keys.add(planned.cell.key)
        assert (planned.cell.target, planned.source) == ("mine", real.path)
    assert len(keys) == 3


def test_sets_of_other_settings_or_images_lie_in_another_folder(tmp_path):
    def code(data: Path = tmp_path, **settings: Any) -> str:
        return _code(load_preset("quickstart", **settings), Places.of(str(tmp_path / "run"), data=str(data), cache=None))

    same = code()
    assert code(seed=4) == code(**{"engine.actors": 1, "distill.decay_updates": load_preset("quickstart").distill.updates}) == same
    assert same not in {code(**{name: 10}) for name in ("distill.decay_updates", "distill.updates", "distill.m", "target.steps")}
    from PIL import Image

    of = []
    for shade in (0, 1):
        folder = tmp_path / f"data{shade}" / "photos" / "one"
        folder.mkdir(parents=True)
        for i in range(shade + 3):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")
        of.append(code(tmp_path / f"data{shade}", **{"source.dataset": "folder:photos"}))
    assert of[0] != of[1]


def places(folder: Path) -> Places:
    return Places.of(str(folder / "run"), data=None, cache=None)


def test_the_pipeline_makes_the_sets_that_a_preset_describes_each_once(tmp_path):
    preset = tmp_path / "tiny.yaml"
    preset.write_text(yaml.safe_dump({
        "base": "quickstart", "target": {"network": {"name": "convnet", "widths": [4, 8, 8]}, "steps": 0}, "source": {"held_out": 8},
        "distill": {"m": 8, "batch": 16, "updates": 3, "pool": {"size": 1, "max_steps": 3, "network": {"widths": [4, 8]}}},
        "evaluate": {"networks": 1, "every": 3, "pretrain": {"steps": 3}}, "engine": {"checkpoint_every": 3}}))
    kinds = {"KRR-ST": "distilled", "Random + targets": "random_targets", "Random": "random_labels", "all": "all_targets"}
    sets = [{"method": name, "make": make, "preset": str(preset), "seeds": [0, 1], "paired": True} for name, make in kinds.items()]
    ablation = {"method": "noise", "preset": str(preset), "settings": {"distill.start_y": "noise"}, "evaluation_seeds": [5]}
    assert run(tmp_path / "run", [*sets, ablation]) == 0
    found = {(r["method"], r["distillation_seed"], r["evaluation_seed"]) for r in rows(tmp_path / "run")}
    assert found == {(name, seed, seed) for name in kinds for seed in (0, 1)} | {("noise", 0, 5)}
    folder = tmp_path / "run" / "sets"
    made = {path.relative_to(folder): DistilledSet.load(path) for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts}
    by_name = {path.name: one for path, one in made.items() if path.parent.name == "seed-1"}
    start, labels, everything = (by_name[f"{name}.safetensors"] for name in ("random-targets", "random-labels", "all-targets"))
    assert len(start.x_syn) == len(labels.x_syn) == 8 and len(everything.x_syn) == 723 - 8
    assert labels.label_kind == "class" and sorted(np.bincount(labels.y_syn)) == [1, 1, 2, 2, 2]
    assert (labels.recipe["loss"], labels.recipe["augment"], labels.recipe["steps"]) == ("cross-entropy", "dsa", 3)
    assert np.array_equal(start.x_syn, by_name["start.safetensors"].x_syn)
    assert not np.array_equal(start.x_syn, by_name["distilled.safetensors"].x_syn)
    assert len({path.parts[0] for path in made}) == 2  # the ablation has a folder of its own
    how = {name: {json.dumps(json.loads(r["distillation"])) for r in rows(tmp_path / "run", method=name)} for name in (*kinds, "noise")}
    assert {len(texts) for texts in how.values()} == {1}, "the seed is none of it"
    (ours,), (theirs,), (control,) = (map(json.loads, how[name]) for name in ("KRR-ST", "noise", "Random + targets"))
    assert ours | {"distill.start_y": "noise"} == theirs != ours and (ours["method"], ours["distill.updates"]) == ("krr_st", 3)
    assert control["method"] == "random_targets" and "distill.updates" not in control and control["distill.m"] == 8
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.suffix in (".parquet", ".safetensors")}
    assert run(tmp_path / "run", [*sets, ablation]) == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items()), "it is all there: nothing is made anew"


def test_a_set_that_two_grids_want_at_once_is_made_once(tmp_path, monkeypatch):
    made = []

    def slowly(*_: Any, **__: Any) -> DistilledSet:
        made.append(1)
        time.sleep(1)
        return DistilledSet.load(a_set(tmp_path / "a.safetensors"))

    monkeypatch.setattr(grid_sets, "_real_images", slowly)
    entry, config = SetSettings(method="Random + targets", make="random_targets", preset="quickstart"), load_preset("quickstart")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: grid_sets.make(entry, config, places(tmp_path), wait=False), range(2))
    assert len(made) == 1 and one == other and one.fingerprint


def test_a_training_that_diverges_is_marked_and_the_others_go_on(tmp_path):
    sets = [{"method": "wild", "path": a_set(tmp_path / "a.safetensors", lr=1e30, steps=20)},
            {"method": "tame", "path": a_set(tmp_path / "b.safetensors", seed=1)}]
    assert run(tmp_path / "run", sets, tasks=["finetune", "knn"], finetune={"steps": 60, "batch": 32, "lr": 1e30}) == 0
    for task in ("finetune", "knn"):
        wild, = rows(tmp_path / "run", method="wild", task=task)
        assert (wild["status"], wild["metric"], wild["value"]) == ("diverged", "train_loss", None)
        assert "pre-training diverged" in wild["error"] and "lower the learning rate" in wild["error"]
    row, = rows(tmp_path / "run", method="tame", task="finetune")
    assert (row["status"], row["metric"]) == ("diverged", "train_loss") and "the training loss is" in row["error"]
    assert {r["status"] for r in rows(tmp_path / "run", method="tame", task="knn")} == {"ok"}


def test_a_set_that_cannot_be_made_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def diverges(*_: Any, **__: Any) -> None:
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(grid, "make", diverges)
    monkeypatch.setattr(provenance, "revision", lambda: Revision("c0ffee", False))  # in this process alone
    assert run(tmp_path / "run", [{"method": "wild", "preset": "quickstart"}, NOTHING]) == 1
    assert {(r["method"], r["status"]) for r in rows(tmp_path / "run")} == {("from scratch", "ok")}
    assert {r["commit"] for r in rows(tmp_path / "run")} == {"c0ffee"}, "of the code as the grid was started, whoever wrote the row"
    assert "no set for wild, seed 0: the loss is nan; its cells are missing" in capsys.readouterr().out


def test_a_trial_that_fails_is_tried_again_then_recorded_and_the_others_go_on(whole, tmp_path):
    out, sets = with_networks_of(whole, tmp_path / "run"), [NOTHING, *sets_of(whole.parent, "soft")]
    encoders = {path: path.read_bytes() for path in (out / "models").glob("encoder-*")}
    for path in encoders:
        path.write_bytes(b"damaged")
    assert run(out, sets, retries=1) == 1
    failed, = rows(out, method="soft", status="failed")
    encoder, = (path for path in encoders if path.name in failed["error"])
    assert failed["metric"] == "" and failed["value"] is None and "Traceback" not in failed["error"]
    assert {r["status"] for r in rows(out, method="from scratch")} == {"ok"}
    assert "ArtifactError" in (Path(failed["trial_path"]) / "log.txt").read_text()
    assert Counter(trial.state for trial in Library(str(out)).tune.experiment(Path(failed["trial_path"]).parent.name).trials)["failed"] == 1
    errors = list((out / "tune").glob("cells-*/*/error.txt"))
    assert len(errors) == 1 and errors[0].read_text().count("ArtifactError: ") >= 2  # one attempt, and another
    encoder.write_bytes(encoders[encoder])
    assert run(out, sets) == 0  # what failed is done again
    assert {r["status"] for r in rows(out, method="soft")} == {"ok"}


def command(out: Path, file: Path) -> list[str]:
    return [sys.executable, "-m", "krrst_dist.cli", "grid", "--grid", str(file), "--out", str(out)]


def on_this_cluster() -> dict[str, str]:
    """The environment of a process that joins the cluster of this file's tests."""
    return os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "RAY_AUTH_MODE": "token"}


def test_a_grid_killed_at_any_moment_and_started_again_redoes_only_what_was_not_finished(whole, tmp_path):
    sets, file = sets_of(whole.parent, "features", "soft", "class"), tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(SMALL | SEEDS_AND_SPLIT | {"sets": sets}))
    stopped = subprocess.Popen(command(tmp_path / "run", file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in stopped.stdout:
        if line.startswith("networks 1/6"):
            break
    stopped.send_signal(signal.SIGINT)
    _, complaints = stopped.communicate(timeout=60)
    assert stopped.returncode == 130 and "the same command goes on" in complaints and "Traceback" not in complaints
    assert rows(tmp_path / "run") == []  # nothing is called failed that was only stopped
    killed = subprocess.Popen(command(tmp_path / "run", file), stdout=subprocess.PIPE, text=True, env=on_this_cluster())
    for line in killed.stdout:
        if line.startswith("cells 2/6"):
            break
    killed.kill()
    killed.wait()
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:  # its trials go with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = set(files(tmp_path / "run", "results"))
    models = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "models").iterdir()}
    assert 2 <= len([name for name in done if name.endswith(".parquet") and not name.startswith(".")]) < 6 and len(models) == 6
    assert run(tmp_path / "run", sets, **SEEDS_AND_SPLIT) == 0
    after = [name for name in files(tmp_path / "run", "results") if not name.startswith(".")]
    assert len(after) == 6 and done <= set(files(tmp_path / "run", "results"))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run" / "models").iterdir()} == models
    undisturbed = {(r["cell"], r["metric"]): r["value"] for r in rows(whole)}
    found = {(r["cell"], r["metric"]): r["value"] for r in rows(tmp_path / "run")}
    assert len({cell for cell, _ in found}) == 6 and found.items() <= undisturbed.items()


def test_two_grids_on_one_store_at_once_lose_nothing(tmp_path):
    paths = [a_set(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)]
    grids = [[{"method": str(i), "path": paths[i]} for i in pair] for pair in ((0, 1), (1, 2))]
    file = tmp_path / "other.yaml"
    file.write_text(yaml.safe_dump(SMALL | {"sets": grids[1]}))
    with subprocess.Popen(command(tmp_path / "run", file), stdout=subprocess.DEVNULL, env=on_this_cluster()) as other:
        assert run(tmp_path / "run", grids[0]) == 0
    assert other.returncode == 0
    assert {(r["method"], r["status"]) for r in rows(tmp_path / "run")} == {(name, "ok") for name in "012"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_is_told_leaves_no_half_written_row_and_loses_nothing_that_was_there(whole, tmp_path):
    out, one = with_networks_of(whole, tmp_path / "run"), sets_of(whole.parent, "soft")
    models, results = files(out, "models"), out / "results"
    results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", results], check=True)
    try:
        with pytest.raises(StorageError, match="No space left on device; check .* the free space"):
            run(out, one, retries=0)
        assert list(results.iterdir()) == []
    finally:
        subprocess.run(["umount", results], check=True)
    assert run(out, one) == 0 and files(out, "models") == models
    assert {r["status"] for r in rows(out)} == {"ok"}


# what is refused


def refused(tmp_path: Path, error: type[Exception], message: str, sets: list[dict[str, Any]], **changes: Any) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "run", sets, **changes)
    assert not (tmp_path / "run" / "models").exists() and not (tmp_path / "run" / "results").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"targets": ["cifar1o"]}, "no such data set; did you mean 'cifar10'"),
    ({"targets": ["folder:mine"]}, "no labelled test split"),
    ({"architectures": [{"name": "convent"}]}, "no such network; did you mean 'convnet'"),
    ({"architectures": [{"name": "vgg11"}]}, "resolution = 16: vgg11 needs a multiple of 32"),
    ({"kd": {"teacher": {"network": {"name": "vgg11"}}}, "tasks": ["kd"]}, "resolution = 16: vgg11"),
    ({"sets": [{"method": "a", "preset": "quikstart"}]}, "no such preset; did you mean 'quickstart'"),
    ({"sets": [{"method": "a", "preset": "cifar100"}]}, "'cifar100' is of 32 px, but resolution = 16"),
    ({"sets": [{"method": "a", "preset": "quickstart", "settings": {"distill.mm": 3}}]}, "mm: no such setting"),
    ({"sets": [{"method": "a", "path": "x", "pretrain": {"stepz": 3}}]}, "stepz: no such setting; did you mean 'steps'"),
    ({"sets": [{"method": "a", "preset": "quickstart"}, {"method": "b", "path": "nowhere"}]}, "no such file; `krrst distill` makes"),
    ({"sets": [{"method": "a", "preset": "quickstart", "settings": {"distill.m": 5000}}]}, "distill.m = 5000"),
    ({"sets": [{"method": "a", "preset": "quickstart", "settings": {"distill": {"mm": 3}}}]}, "mm: no such setting"),
    ({"sets": [{"method": "a", "preset": "quickstart", "settings": {"distill.m.x": 3}}]}, "distill.m = {'x': 3}"),
    ({"sets": [{"method": "a", "make": "random_labels", "preset": "quickstart", "settings": {"source.dataset": "folder:plain"}}]}, "plain"),
    ({"tasks": ["fid"]}, "no images for task fid; add a distilled set"),
    ({"tasks": ["fid"], "sets": [{"method": "a", "preset": "quickstart"}], "fid": {"network": "nowhere"}}, "fid.network = .*no such file"),
    ({"tasks": ["fid"], "sets": [{"method": "a", "preset": "quickstart"}], "fid": {"weights": "nowhere"}}, "fid.weights = .*no such file"),
])
def test_unknown_names_and_sizes_that_do_not_fit_are_refused_before_anything_is_computed(tmp_path, changes, message):
    refused(tmp_path, ValueError, message, **{"sets": [NOTHING]} | changes)
    assert not (tmp_path / "cache").exists()


def test_a_task_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match="tasks.*finetune"):
        Grid(**SMALL | {"sets": [NOTHING], "tasks": ["finetun"]})
    with pytest.raises(ConfigError, match="targets = .*: tasks = .*need at least one"):
        Grid(**SMALL | {"sets": [NOTHING], "targets": []})


@pytest.mark.parametrize("changes", [
    {"seeds": []}, {"tasks": []}, {"label_fractions": {"probe": []}}, {"sets": [NOTHING | {"method": ""}]}])
def test_lists_and_names_are_not_empty(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}.*at least 1"):
        Grid(**SMALL | {"sets": [NOTHING]} | changes)


def test_two_methods_do_not_share_results(whole, tmp_path):
    with pytest.raises(ConfigError, match="methods 'from scratch' and 'Gaussian' are the same in all but their names"):
        Grid(**SMALL | {"sets": [NOTHING, NOTHING | {"method": "Gaussian"}]})
    paths = [a_set(tmp_path / f"{name}.safetensors") for name in "ab"]
    twice = [{"method": method, "path": path} for method, path in zip("ab", paths, strict=True)]
    refused(tmp_path, ConfigError, "methods 'a' and 'b' have the same set", twice)
    with pytest.raises(ConfigError, match="method 'b' has results in .* under the name 'soft'; keep that name, give --recompute"):
        run(whole, [{"method": "b", "path": str(whole.parent / "soft.safetensors")}], **SEEDS_AND_SPLIT)


@pytest.mark.parametrize(("entry", "message"), [
    ({"method": "a"}, "give one of them"), ({"method": "a", "path": "x", "preset": "y"}, "give one of them"),
    ({"method": "a", "make": "nothing", "path": "x"}, "has no set"),
    ({"method": "a", "path": "x", "by": "dm"}, "leave it out"),
    ({"method": "a", "preset": "y", "make": "all_targets", "by": "dm"}, "leave it out"),
    ({"method": "a", "path": "x", "settings": {"seed": 1}}, "leave one out")])
def test_a_set_has_one_origin(entry, message):
    with pytest.raises(ConfigError, match=message):
        Grid(**SMALL | {"sets": [entry]})


def test_sets_that_do_not_fit_or_are_not_there_are_refused(tmp_path):
    nowhere = str(tmp_path / "nowhere-*" / "x.safetensors")
    refused(tmp_path, ConfigError, "no such file", [{"method": "a", "path": nowhere}])
    small, gray = a_set(tmp_path / "8.safetensors", resolution=8), a_set(tmp_path / "gray.safetensors", channels=1)
    refused(tmp_path, ConfigError, "is of 8 px, but resolution = 16", [{"method": "a", "path": small}])
    refused(tmp_path, ConfigError, "1 x 16 x 16; targets and networks take 3 channels", [{"method": "a", "path": gray}])


def test_a_pattern_stands_for_every_seeds_file(tmp_path):
    paths = [a_set(tmp_path / "runs" / f"seed-{seed}" / "distilled.safetensors", seed=seed) for seed in (3, 4)]
    found = given(SetSettings(method="a", path=str(tmp_path / "runs" / "seed-*" / "distilled.safetensors")))
    assert sorted((one.seed, one.path) for one in found) == [(3, paths[0]), (4, paths[1])]


def test_a_target_without_its_test_split_is_refused(tmp_path):
    from PIL import Image

    for split, classes in (("train", 10), ("test", 0)):
        for c in range(classes):
            folder = tmp_path / "data" / "imagenette2-320" / split / f"n{c}"
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 20), (c, 0, 0)).save(folder / "a.png")
    with pytest.raises(DataError, match="imagenette, test: no images found"):
        grid.run(Grid(**SMALL | {"sets": [NOTHING], "targets": ["imagenette"]}), data=str(tmp_path / "data"), out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "models").exists()


def split(labelled: bool = True, classes: tuple[str, ...] = ("a", "b")) -> Any:
    return SimpleNamespace(labelled=labelled, class_names=classes, fingerprint="f", path=Path("x"))


@pytest.mark.parametrize(("train", "test", "message"), [
    (split(classes=("a",)), split(classes=("a",)), r"has 1 class\(es\) in its training split"),
    (split(), split(labelled=False, classes=()), r"has no class\(es\) in its test split"),
    (split(), split(classes=("b", "a")), "class 0 is 'a' in its training split and 'b' in its test split"),
    (split(classes=("a", "b", "c")), split(), "class 2 is 'c' in its training split and None in its test split"),
])
def test_a_target_has_the_same_classes_in_both_splits_and_at_least_two(train, test, message):
    with pytest.raises(ConfigError, match=message):
        Target.of("mine", train, test, validation=False)


def test_a_validation_split_is_told_from_the_test_split_by_name():
    assert [Target.of("mine", split(), split(), validation=v).title for v in (True, False)] == ["mine (validation)", "mine"]


def test_a_grid_on_gpus_distils_on_gpus():
    entry = SetSettings(method="a", preset="cifar100", seeds=(0, 1))
    assert [c.engine.gpus for gpus in (0, 0.25) for c in load_presets(entry, gpus)] == [0, 0, 1, 1]
    assert load_presets(SetSettings(method="a", preset="cifar100", settings={"engine.gpus": 0.5}), 0.25)[0].engine.gpus == 0.5


def test_a_gpu_that_no_node_has_is_refused_at_once(tmp_path):
    refused(tmp_path, cluster.ClusterError, "the cluster lacks room", [NOTHING], gpus=0.5)


# the grids that ship with the package


@pytest.mark.parametrize("name", grid_names())
def test_a_grid_that_ships_names_what_there_is(name):
    one = load_grid(name)
    check_grid(one)
    assert one.name == name
    assert all(load_presets(entry) for entry in one.sets if entry.make != "nothing")


def test_the_papers_grids_are_the_papers():
    wide = {32: (128, 256, 512), 64: (64, 128, 256, 512), 224: (32, 64, 128, 256, 512)}
    fine = ("aircraft", "cars", "cub2011", "dogs", "flowers")
    tables = {"table1": (32, ("cifar100", "cifar10", *fine)), "table2": (64, ("tinyimagenet", "cifar10", *fine)),
              "table3": (64, ("cifar10", "cifar100", *fine)), "imagenette": (224, ("imagenette", *fine))}
    for name, (resolution, targets) in tables.items():
        one = load_grid(name)
        assert (one.resolution, one.targets, one.tasks, one.seeds, one.split) == (resolution, targets, ("finetune",), (0, 1, 2), "test")
        assert one.architectures == (NetworkSettings(widths=wide[resolution]),)
        made_by = {entry.method: config.method for entry in one.sets for config in load_presets(entry)}
        assert {method: made_by[method] for method in ("DSA", "DM", "KRR-ST")} == {"DSA": "dsa", "DM": "dm", "KRR-ST": "krr_st"}
    figure, kd = load_grid("figure3"), load_grid("table4")
    compared = ["Random", "K-means", "DSA", "DM", "MTT", "KIP", "FRePo", "KRR-ST"]
    rows = {name: {entry.method for entry in load_grid(name).sets} for name in ("table1", "table2", "table3", "table4")}
    assert rows["table1"] >= {"from scratch", *compared} and rows["table2"] == rows["table1"] - {"KIP"}
    assert rows["table3"] >= {"from scratch", "Random", "FRePo", "KRR-ST"} and rows["table4"] == {"Gaussian", *compared} - {"KIP"}
    assert [a.name for a in figure.architectures] == ["vgg11", "alexnet", "mobilenet", "resnet10"] and figure.targets == fine
    assert [a.name for a in kd.architectures] == ["convnet", "vgg11", "alexnet", "mobilenet", "resnet10"]
    assert (kd.tasks, kd.targets, kd.kd.epochs, kd.kd.batch) == (("kd",), ("cifar10",), 1000, 512)
    assert load_grid("imagenette-resnet18").finetune.batch == 64


def test_the_command_line_overrides_a_grid_and_refuses_a_misspelt_flag(capsys):
    parsed = cli.parse_grid(["--grid", "quickstart", "--seeds", "4", "--finetune.steps", "9", "--out", "x"])
    assert (parsed.config.seeds, parsed.config.finetune.steps, parsed.out) == ((4,), 9, "x")
    for arguments in (["--grid", "quickstart", "--finetune.stepz", "9"], ["--grid", "quikstart"], []):
        with pytest.raises(SystemExit) as stop:
            cli.parse_grid(arguments)
        assert stop.value.code == 2
    assert "did you mean 'quickstart'" in capsys.readouterr().err
    assert torch.get_num_threads() >= 1

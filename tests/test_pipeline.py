"""The whole run, from real images to the table: every preset's path, resumed, refused and stopped. One Ray cluster for the file."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from PIL import Image

import krrst_dist
from krrst_dist import cli, provenance, sheets
from krrst_dist.artifacts import ArtifactError, DistilledSet
from krrst_dist.config import Config, ConfigError, parse
from krrst_dist.data.errors import DataError
from krrst_dist.data.prepared import Prepared, held_out_split
from krrst_dist.data.reader import read_all
from krrst_dist.data.targets import TargetFile
from krrst_dist.evaluation.table import KRRST, RANDOM, SCRATCH, Row, from_json
from krrst_dist.evaluation.target_model import save_target, untrained
from krrst_dist.feature_map import FILE, FeatureMap
from krrst_dist.on_ray import cluster, pipeline
from krrst_dist.on_ray.heartbeat import Beat
from krrst_dist.presets_and_grids import load_preset
from krrst_dist.storage import StorageError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    """The cluster that a run on one machine starts, with two CPUs."""
    cluster.start_local(num_cpus=2)
    yield
    ray.shutdown()


TINY = {
    "target.network": {"name": "convnet", "widths": [8, 8, 8]}, "target.steps": 0,
    "distill.m": 8, "distill.batch": 16, "distill.updates": 3,
    "distill.pool.network.widths": [4, 4, 8], "distill.pool.size": 2, "distill.pool.max_steps": 4, "source.held_out": 8,
    "evaluate.networks": 1, "evaluate.pretrain.steps": 3, "evaluate.probe.steps": 3, "evaluate.every": 3, "engine.checkpoint_every": 2,
}
"""An untrained target, and everything small."""


@dataclass
class Place:
    """A folder for runs of one preset with small settings; they share their prepared data."""

    folder: Path
    data: Path
    preset: str
    small: dict[str, Any]

    def config(self, **overrides: Any) -> Config:
        return load_preset(self.preset, **self.small | overrides)

    def run(self, out: str = "run", *, resume: bool = False, until: str = "distill", **overrides: Any) -> int:
        return pipeline.run(self.config(**overrides), data=str(self.data), out=str(self.folder / out), resume=resume, until=until)

    def distilled(self, out: str = "run", seed: int = 0) -> DistilledSet:
        return DistilledSet.load(self.folder / out / f"seed-{seed}" / "distilled.safetensors")

    def start(self, out: str = "run", seed: int = 0) -> DistilledSet:
        return DistilledSet.load(self.folder / out / f"seed-{seed}" / "start.safetensors")

    def rows(self, out: str = "run") -> list[Row]:
        return from_json((self.folder / out / "results.json").read_text())

    def beton(self) -> Prepared:
        """The prepared source."""
        return Prepared.open(next((self.folder / "cache").glob(f"{self.config().source.dataset}-train-*.beton")).with_suffix(".json"))

    def source(self) -> tuple[Prepared, TargetFile]:
        """The prepared source and its targets, where the cache has one of each."""
        prepared = self.beton()
        return prepared, TargetFile.open(next((self.folder / "cache").glob("*.npy")), prepared)


def same(a: DistilledSet, b: DistilledSet) -> bool:
    return np.array_equal(a.x_syn, b.x_syn) and np.array_equal(a.y_syn, b.y_syn)


def files(folder: Path) -> dict[str, int]:
    """Every file with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# the quickstart, with a target that is trained


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Place:
    """The quickstart preset cut down, run to its end with two distillation seeds."""
    small = {"repeats": 2, "target.steps": 4, "target.warmup_steps": 1, "target.probe_every": 4, "distill.updates": 6,
             "distill.pool.size": 2, "distill.pool.max_steps": 4, "evaluate.every": 3, "evaluate.networks": 2,
             "evaluate.pretrain.steps": 20, "evaluate.probe.steps": 20, "engine.checkpoint_every": 3}
    place = Place(tmp_path_factory.mktemp("quickstart"), Path("/nowhere"), "quickstart", small)
    assert place.run(until="evaluate") == 0
    return place


def test_a_run_ends_with_a_table_of_every_method_seed_and_metric(quickstart):
    metrics = {"held-out ridge loss", "of predicting the mean", "digits-5-9 probe, all labels (%)", "digits-5-9 probe, 5% of labels (%)"}
    cells = {(row.method, row.metric, row.seed): row.value for row in quickstart.rows()}
    measured = {(method, metric, seed) for method in (SCRATCH, RANDOM, KRRST) for metric in metrics for seed in (0, 1)}
    assert set(cells) == {cell for cell in measured if cell[0] != SCRATCH or "probe" in cell[1]}
    assert all(np.isfinite(value) for value in cells.values())
    shown = (quickstart.folder / "run" / "results.md").read_text()
    assert all(name in shown for name in (SCRATCH, RANDOM, KRRST, *metrics))
    assert "mean ± population std over seeds 0, 1" in shown and f"preset quickstart, commit {provenance.revision().commit[:12]}" in shown


def test_a_job_that_has_ended_says_so_beside_its_runs(quickstart, capsys):
    run = quickstart.folder / "run"
    assert cli.main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}: finished\n" in said and said.count("finished, update 6 of 6") == 2


def test_a_run_ends_with_pictures(quickstart):
    for name in ("distilled.png", "loss.png"):
        with Image.open(quickstart.folder / "run" / name) as picture:
            assert min(picture.size) > 50
            assert len(set(picture.convert("L").tobytes())) > 10


def test_pictures_along_the_way_begin_with_the_start_and_end_with_the_set(quickstart):
    folder = quickstart.folder / "run" / "seed-0" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{step:08}.png" for step in range(7)]
    for step, held in ((0, quickstart.start()), (6, quickstart.distilled())):
        assert np.array_equal(sheets.cut((folder / f"step-{step:08}.png").read_bytes()), sheets.to_pixels(held.x_syn, held.space))


def test_a_run_ends_with_a_map_of_each_set_in_the_targets_feature_space(quickstart, tmp_path, capsys):
    (prepared, targets), run = quickstart.source(), quickstart.folder / "run"
    training, _ = held_out_split(prepared.count, 150, 0)
    found, held = FeatureMap.load(run / "seed-1" / FILE), quickstart.distilled(seed=1)
    assert (found.set_fingerprint, found.target, found.source) == (held.fingerprint, targets.target, "digits-0-4")
    assert len(found.distances) == 20 and set(found.nearest_places.tolist()) <= set(training.tolist())
    assert np.bincount(found.kinds).tolist() == [len(training), 20, 20]
    before = files(run)
    assert cli.main(["features", str(run)]) == 0 and files(run) == before
    (run / "seed-1" / FILE).unlink()
    assert cli.main(["features", str(run / "seed-1" / "distilled.safetensors")]) == 0
    again = FeatureMap.load(run / "seed-1" / FILE)
    assert np.array_equal(again.positions, found.positions) and np.array_equal(again.nearest_places, found.nearest_places)
    assert "feature space" in capsys.readouterr().out
    assert cli.main(["features", str(tmp_path)]) == 1 and "no distilled.safetensors is there" in capsys.readouterr().err
    replace(held, metadata={}).save(tmp_path / "distilled.safetensors")
    assert cli.main(["features", str(tmp_path)]) == 1 and "does not say how it was distilled" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_ends_with_sets_to_take_home_that_say_where_they_come_from(quickstart, seed):
    dataset = krrst_dist.load(str(quickstart.folder / "run" / f"seed-{seed}" / "distilled.safetensors"))
    x, y = dataset.tensors
    assert x.shape == (20, 3, 16, 16) and y.shape == (20, 256)
    found, config = quickstart.distilled(seed=seed), quickstart.config(seed=seed)
    about, (prepared, targets) = found.metadata, quickstart.source()
    assert (parse(about["config"]), about["seed"], about["updates"]) == (config, seed, 6)
    assert (about["commit"], about["dirty"]) == tuple(provenance.revision())
    assert (about["source_fingerprint"], about["target_fingerprint"]) == (prepared.fingerprint, targets.fingerprint)
    assert found.recipe == config.evaluate.pretrain.recipe() and found.space.mean == prepared.mean
    assert about["held_out_loss"] == next(r.value for r in quickstart.rows() if (r.method, r.metric, r.seed) ==
                                          (KRRST, "held-out ridge loss", seed))


def test_the_control_is_exactly_the_start(quickstart):
    prepared, targets = quickstart.source()
    training, held_out = held_out_split(prepared.count, 150, 0)
    start = quickstart.start()
    of_training = {tuple(row) for row in targets.look_up(training).tolist()}
    assert {tuple(row) for row in start.y_syn.tolist()} <= of_training - {tuple(row) for row in targets.look_up(held_out).tolist()}
    assert not same(start, quickstart.distilled()) and not same(start, quickstart.start(seed=1))


def test_targets_are_standardised_over_the_training_part_alone(quickstart):
    prepared, targets = quickstart.source()
    training, held_out = held_out_split(prepared.count, 150, 0)
    seen = targets.look_up(training).double()
    varying = torch.from_numpy(targets.array[:, 0].std(0) > 1e-6)
    assert seen.mean(0).abs().max() < 1e-4 and (seen.std(0, correction=0)[varying] - 1).abs().max() < 1e-3
    assert targets.look_up(held_out).double().mean(0).abs().max() > 0.01


def test_the_settings_of_a_run_are_beside_it_and_are_a_preset(quickstart):
    path = quickstart.folder / "run" / "config.yaml"
    assert parse(yaml.safe_load(path.read_text())) == quickstart.config()
    assert load_preset(str(path)) == quickstart.config(preset="config")


def test_a_second_run_reuses_what_is_there_and_says_so(quickstart, capfd):
    before = files(quickstart.folder)
    rows = quickstart.rows()
    assert quickstart.run(until="evaluate", resume=True) == 0
    said = "".join(capfd.readouterr())
    assert "digits-0-4 train at 16 px is prepared already" in said
    assert "target: already there" in said and "target representations: already there" in said
    for seed in (0, 1):
        assert f"seed {seed}: the run in {quickstart.folder}/run/seed-{seed} is finished: all 6 updates are done" in said
    kept = {name for name in before if re.search(r"^cache/[^.]|checkpoints|history.parquet|distilled.safetensors", name)}
    after = files(quickstart.folder)
    assert len(kept) > 20 and all(after[name] == before[name] for name in kept)
    assert quickstart.rows() == rows


def test_an_unfinished_run_is_refused_without_resume(quickstart):
    with pytest.raises(ConfigError, match="holds an unfinished run .6 of 8 updates.; pass --resume to go on with it, or another --out"):
        quickstart.run(**{"distill.updates": 8})


@pytest.mark.parametrize("resume", [True, False])
def test_changed_settings_are_refused_with_the_fields_that_differ_and_nothing_is_touched(quickstart, resume):
    before = files(quickstart.folder)
    with pytest.raises(ConfigError) as refused:
        quickstart.run(resume=resume, **{"distill.m": 19, "target.steps": 5, "target.seed": 1})
    lines = str(refused.value).splitlines()
    assert lines[1:-1] == ["  distill.m: was 20, now 19", "  target.seed: was 0, now 1", "  target.steps: was 4, now 5"]
    assert "start a new run with another --out" in lines[-1]
    assert files(quickstart.folder) == before


def test_a_truncated_result_is_written_again_from_the_checkpoint(quickstart):
    path = quickstart.folder / "run" / "seed-1" / "distilled.safetensors"
    whole = quickstart.distilled(seed=1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        krrst_dist.load(str(path))
    quickstart.run(resume=True)
    assert same(quickstart.distilled(seed=1), whole) and quickstart.distilled(seed=1).metadata == whole.metadata


def test_a_finished_run_goes_on_when_more_updates_are_asked_for(quickstart, tmp_path):
    shutil.copytree(quickstart.folder / "run", tmp_path / "run")
    shutil.copytree(quickstart.folder / "cache", tmp_path / "cache")
    place = replace(quickstart, folder=tmp_path)
    before = place.distilled()
    place.run(resume=True, **{"distill.updates": 8, "evaluate.every": 4, "engine.checkpoint_every": 5, "repeats": 1})
    after = place.distilled()
    assert after.metadata["updates"] == 8 and not same(before, after)


# the other presets' paths, on real images


def cut(source: Path, to: Path, rows: int) -> None:
    """The first rows of a Parquet file, with its class names."""
    file = pq.ParquetFile(source)
    table = pa.Table.from_batches([next(file.iter_batches(rows))])
    pq.write_table(table.replace_schema_metadata(file.schema_arrow.metadata), to)


@pytest.fixture(scope="module")
def images(shared_data, tmp_path_factory) -> Path:
    """Real images: all 60 of ImageNet, and the first few of the other data sets."""
    folder = tmp_path_factory.mktemp("data")
    cut(shared_data / "imagenet-sample.parquet", folder / "imagenet-sample.parquet", 60)
    for name, source in {"tinyimagenet-train": "tinyimagenet-train-20k", "tinyimagenet-val": "tinyimagenet-val-5k"}.items():
        cut(shared_data / f"{source}.parquet", folder / f"{name}.parquet", 120)
    for name in ("cifar10-train", "cifar10-test", "cifar100-train", "cifar100-test"):
        cut(shared_data / f"{name}.parquet", folder / f"{name}.parquet", 120)
    return folder


WIDTHS = {64: [4, 4, 4, 8], 224: [2, 4, 4, 4, 8]}


@pytest.mark.parametrize(("preset", "dataset", "resolution", "encoding", "evaluated"), [
    ("imagenet64", "imagenet", 64, "raw", ("cifar10", "cifar100")),
    ("tinyimagenet", "tinyimagenet", 64, "raw", ("tinyimagenet", "cifar10")),
    ("imagenette", "imagenet", 224, "jpeg", ("imagenet",)),
])
def test_the_published_presets_run_from_real_images_to_the_table(images, tmp_path, preset, dataset, resolution, encoding, evaluated):
    small = TINY | {"distill.pool.network.widths": WIDTHS[resolution], "source.dataset": dataset}
    if preset == "imagenette":
        small["evaluate.datasets"] = evaluated
    place = Place(tmp_path, images, preset, small)
    assert place.run(until="evaluate") == 0
    config, (prepared, targets) = place.config(), place.source()
    assert (config.source.resolution, config.evaluate.datasets) == (resolution, evaluated)
    assert (prepared.resolution, prepared.encoding, len(prepared.parts)) == (resolution, encoding, 1)
    pixels = read_all(prepared, np.arange(prepared.count))[0].float()
    gray = (pixels - pixels.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < (1 if encoding == "raw" else 4)
    assert gray.sum() >= 1 and gray.sum() < prepared.count / 10
    found = place.distilled()
    assert found.x_syn.shape == (8, 3, resolution, resolution) and found.y_syn.shape == (8, targets.k)
    assert found.metadata["updates"] == 3 and not same(found, place.start())
    probed = {row.metric for row in place.rows() if row.method == SCRATCH}
    assert probed == {f"{name} probe, {labels} labels (%)" for name in evaluated for labels in ("all", "1% of")}


def test_the_released_variant_runs_in_raw_pixels_with_stored_views(images, tmp_path):
    place = Place(tmp_path, images, "cifar100-cpu-released", TINY | {"repeats": 1, "distill.updates": 12})
    assert place.run(until="evaluate") == 0
    start, found, (prepared, targets) = place.start(), place.distilled(), place.source()
    assert targets.views == 10 and targets.array.shape == (120, 11, 128)
    assert start.space.kind == found.space.kind == "raw" and 0 <= start.x_syn.min() and start.x_syn.max() <= 1
    assert not same(start, found) and np.abs(start.x_syn - found.x_syn).max() < 12.1 * place.config().distill.lr_x
    assert found.space.mean == prepared.mean


# small runs on digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Place:
    """The quickstart's path with an untrained target and S = 2; `whole` is a finished run of 5 updates by one actor."""
    small = TINY | {"repeats": 1, "distill.updates": 5, "distill.shards": 2, "source.held_out": 100, "evaluate.datasets": ()}
    place = Place(tmp_path_factory.mktemp("digits"), Path("/nowhere"), "quickstart", small)
    place.run("whole")
    return place


def test_one_and_two_actors_give_the_same_result_bit_for_bit(digits):
    digits.run("two", **{"engine.actors": 2})
    assert same(digits.distilled("two"), digits.distilled("whole"))
    assert digits.distilled("two").metadata["held_out_loss"] == digits.distilled("whole").metadata["held_out_loss"]


def test_a_run_without_data_sets_to_probe_ends_with_the_held_out_losses(digits):
    digits.run("whole", resume=True, until="evaluate")
    assert {row.metric for row in digits.rows("whole")} == {"held-out ridge loss", "of predicting the mean"}


def test_the_first_stages_leave_the_later_ones_alone_and_views_of_another_split_are_other_targets(digits, tmp_path):
    place, made = replace(digits, folder=tmp_path), tmp_path / "cache"
    assert place.run(until="prepare") == 0
    assert list(made.glob("*.beton")) and not list(made.glob("*.npy"))
    for split_seed in (0, 1):
        assert place.run(until="target", **{"distill.views": 1, "target.standardise": False, "source.split_seed": split_seed}) == 0
    assert {TargetFile.open(path, place.beton()).view_seed for path in made.glob("*.npy")} == {0, 1}
    assert not (tmp_path / "run" / "seed-0").exists()


@pytest.mark.parametrize(("overrides", "complaint"), [
    ({"distill.m": 624}, "distill.m = 624: X_s starts as that many different training images, and there are 623; lower it"),
    ({"distill.batch": 624}, "each of the 2 shard.s. reads 312 images a batch but owns 311; lower distill.batch to at most 622"),
    ({"source.held_out": 723}, "source.held_out = 723: must leave at least one of the 723 images to train on"),
])
def test_sizes_that_the_data_cannot_serve_are_refused_before_the_target(digits, overrides, complaint):
    with pytest.raises(ConfigError, match=complaint):
        digits.run("refused", **overrides)
    assert not (digits.folder / "refused" / "config.yaml").exists()


@pytest.mark.parametrize(("overrides", "complaint"), [
    ({"source.resolution": 20}, "resolution = 20: a ConvNet of 3 blocks needs a multiple of 8"),
    ({"source.resolution": 20, "distill.pool.network.widths": [4]}, "resolution = 20: a ConvNet of 3 blocks needs a multiple of 8"),
    ({"source.dataset": "digits-0-5"}, "dataset = 'digits-0-5': no such data set; did you mean 'digits-"),
    ({"evaluate.datasets": ["digits"]}, "dataset = 'digits': no such data set"),
    ({"target.network": {"name": "resnet19"}}, "no such network; did you mean 'resnet18'?"),
])
def test_names_and_resolutions_that_do_not_fit_are_refused_before_anything_is_prepared(digits, tmp_path, overrides, complaint):
    with pytest.raises(ConfigError) as refused:
        replace(digits, folder=tmp_path).run(**overrides)
    assert complaint in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("overrides", "error", "complaint"), [
    ({"target.steps": 5, "target.warmup_steps": 1, "target.batch": 16, "target.workers": 5}, cluster.ClusterError, "lacks room for 3 of"),
    ({"target.steps": 5, "target.warmup_steps": 5}, ConfigError, "warmup_steps = 5: must be below target.steps"),
    ({"target.steps": 5, "target.warmup_steps": 1, "target.batch": 9999}, ConfigError, "there are only 623 images to train on"),
    ({"target.checkpoint": "missing.pt"}, ConfigError, "target.checkpoint = 'missing.pt': no such file"),
    ({"evaluate.datasets": ["cifar10"]}, DataError, "cifar10, train: no images found"),
    ({"source.held_out": 800}, ConfigError, "held_out = 800: must leave at least one of the 723 images"),
    ({"distill.m": 800}, ConfigError, "there are 623"),
])
def test_what_would_show_late_is_refused_before_anything_is_prepared(digits, tmp_path, overrides, error, complaint):
    with pytest.raises(error, match=complaint):
        replace(digits, folder=tmp_path).run(until="evaluate", **overrides)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_training_a_target_leaves_the_settings_of_a_finished_run_alone(quickstart):
    before = (quickstart.folder / "run" / "config.yaml").read_text()
    assert quickstart.run(until="target", **{"distill.m": 9, "distill.updates": 99}) == 0
    assert (quickstart.folder / "run" / "config.yaml").read_text() == before


def test_missing_and_empty_data_are_refused(digits, tmp_path):
    (tmp_path / "data" / "cifar100" / "train").mkdir(parents=True)
    for data, complaint in ((tmp_path / "data", "cifar100"), (tmp_path / "none", "there is no folder")):
        with pytest.raises(DataError, match=complaint):
            replace(digits, folder=tmp_path, data=data).run(**{"source.dataset": "cifar100", "source.resolution": 32})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("in_the_way", "error", "complaint"), [
    ("run", ConfigError, "--out = .*run.* is a file; give a folder"),
    ("cache", StorageError, "cache.*check the path, its permissions and the free space")])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_prepared(digits, tmp_path, in_the_way, error, complaint):
    (tmp_path / in_the_way).write_text("a file")
    with pytest.raises(error, match=complaint):
        replace(digits, folder=tmp_path).run()
    assert not list(tmp_path.rglob("*.beton"))


def test_a_cache_at_a_uri_is_refused(digits):
    with pytest.raises(ConfigError, match="--cache = 's3://bucket/cache': prepared files are mapped into memory"):
        pipeline.run(digits.config(), out=str(digits.folder / "refused"), cache="s3://bucket/cache")


def target_file(place: Place, name: str, *, seed: int, weight: float = 1.0) -> str:
    """A target model as a file, with its first layer scaled."""
    settings, path = place.config(**{"target.seed": seed}).target, str(place.folder / name)
    resolution = place.config().source.resolution
    network = untrained(settings, resolution=resolution)
    network.layers[0].weight.data *= weight
    save_target(path, network, settings.network, resolution=resolution, about={})
    return path


def test_another_target_model_and_other_images_are_refused_on_resume(images, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.copy(images / "cifar100-train.parquet", tmp_path / "data")
    place = Place(tmp_path, tmp_path / "data", "cifar100-cpu", TINY | {"repeats": 1, "evaluate.datasets": ()})
    one, other = (target_file(place, f"target-{seed}.safetensors", seed=seed) for seed in (1, 2))
    place.run(**{"target.checkpoint": one})
    with pytest.raises(ConfigError, match="started with other settings.*\n  data.target: was '.*', now '.*'\nput them back"):
        place.run(resume=True, **{"target.checkpoint": other, "distill.updates": 4})
    cut(images / "cifar100-train.parquet", tmp_path / "data" / "cifar100-train.parquet", 119)
    with pytest.raises(ConfigError, match="data.images: was '.*', now '.*'"):
        place.run(resume=True, **{"target.checkpoint": one, "distill.updates": 4})
    assert place.distilled().metadata["updates"] == 3


def test_a_target_that_gives_nan_is_one_sentence(digits, capsys):
    path = target_file(digits, "nan.safetensors", seed=0, weight=float("nan"))
    status, said = typed(digits, capsys, "nan", "--target-checkpoint", path)
    assert status == 1
    assert said.splitlines()[-1].startswith("error: the target model gives NaN or infinity for image 0; train it anew")
    assert "Traceback" not in said and not (digits.folder / "nan" / "seed-0").exists()


def typed(place: Place, capsys, out: str, *flags: str) -> tuple[int, str]:
    """`krrst distill ...` in this process: its status and what it said on stderr."""
    path = place.folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump(place.config().model_dump(mode="json")))
    status = cli.main(["distill", "--preset", str(path), "--out", str(place.folder / out), *flags])
    return status, capsys.readouterr().err


def test_a_run_that_diverges_is_one_sentence_with_step_shard_and_checkpoint(digits, capsys):
    status, said = typed(digits, capsys, "diverging", "--distill.lr-x", "1e30", "--distill.updates", "50")
    assert status == 1
    last = said.splitlines()[-1]
    step = int(re.fullmatch(r"error: update (\d+), shard [01]: .*", last)[1])
    checkpoint = re.search(r"the last good checkpoint is (\S+), but going on from it with --resume would", last)[1]
    assert 1 <= step < 50 and (Path(checkpoint) / "manifest.json").exists()
    assert not (digits.folder / "diverging" / "seed-0" / "distilled.safetensors").exists()


def test_a_run_from_the_command_line_ends_with_status_0(digits, capsys):
    assert typed(digits, capsys, "whole")[0] == 0


def test_an_error_in_one_seed_stops_the_others_at_once(digits):
    in_the_way = digits.folder / "stopped" / "seed-1" / "tensorboard"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("a file")
    with pytest.raises(OSError, match="tensorboard"):
        digits.run("stopped", **{"repeats": 2, "distill.updates": 10**6})
    assert not (digits.folder / "stopped" / "seed-0" / "distilled.safetensors").exists()


def test_ctrl_c_stops_the_job_with_status_130_and_resume_ends_where_an_undisturbed_run_does(digits):
    endless = {"distill.updates": 10**5, "distill.decay_updates": 250, "engine.checkpoint_every": 20, "evaluate.every": 10**5}
    preset = digits.folder / "long.yaml"
    preset.write_text(yaml.safe_dump(digits.config(**endless).model_dump(mode="json")))
    checkpoints = digits.folder / "killed" / "seed-0" / "checkpoints"

    def newest() -> int:
        return max((int(path.parent.name.split("-")[1]) for path in checkpoints.glob("*/manifest.json")), default=0)

    command = [sys.executable, str(ROOT / "jobs" / "distill_imagenet.py"), "--preset", str(preset), "--out", str(digits.folder / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while process.poll() is None and newest() < 20:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped; checkpoints are kept: the same command with --resume goes on" in said and "Traceback" not in said
    assert not (digits.folder / "killed" / "seed-0" / "distilled.safetensors").exists()
    job = Beat.read(str(digits.folder / "killed"))
    assert (job.state, job.doing) == ("stopped", "stage: distil")

    assert newest() >= 20
    a_bit_more = endless | {"distill.updates": newest() + 10}
    digits.run("killed", resume=True, **a_bit_more)
    digits.run("undisturbed", **a_bit_more)
    assert same(digits.distilled("killed"), digits.distilled("undisturbed"))

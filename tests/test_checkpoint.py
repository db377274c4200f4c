"""Checkpoints: whole or absent, never from another run, and gone back to when the newest is damaged."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import engine_parts
import pytest
import ray
import torch
from engine_parts import Parts, config, measure, run, serial
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from krrst_dist.artifacts import ArtifactError
from krrst_dist.config import ConfigError
from krrst_dist.on_ray import patience
from krrst_dist.on_ray.checkpoint import Checkpoints, Facts, require_same
from krrst_dist.on_ray.errors import TakenOverError
from krrst_dist.on_ray.progress import Record, read_history
from krrst_dist.storage import StorageError

ray.cloudpickle.register_pickle_by_value(engine_parts)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

FACTS = Facts({"distill.lr_x": 0.1, "seed": 0}, decay_updates=10, cpu_capability="AVX2", torch="2")


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> Path:
    """A run of 12 updates with checkpoints at 0, 4, 8 and 12, of which three are kept. Not to be written to."""
    directory = tmp_path_factory.mktemp("run") / "finished"
    run(config(every=6), directory, measure=measure)
    return directory


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def folders(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").glob("step-*"))


def test_the_last_checkpoints_are_kept_with_all_that_a_resume_needs(finished):
    assert folders(finished) == ["step-00000006-1", "step-00000008-1", "step-00000012-1"]  # 6: before the held-out loss is measured
    newest = finished / "checkpoints" / "step-00000012-1"
    manifest = json.loads((newest / "manifest.json").read_text())
    names = sorted(path.name for path in newest.iterdir())
    assert names == ["manifest.json", "outer.safetensors", *(f"shard-{i}.safetensors" for i in range(3))]
    assert [shard["position"] for shard in manifest["shards"]] == [{"batch": 12}] * 3
    assert [shard["size"] for shard in manifest["shards"]] == [(newest / f"shard-{i}.safetensors").stat().st_size for i in range(3)]
    assert manifest["facts"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert manifest["facts"]["decay_updates"] == 12


def test_the_losses_are_in_a_table_and_in_tensorboard(finished):
    history = read_history(str(finished))
    assert history["step"].to_pylist() == list(range(13))
    assert history["loss"].null_count == 1  # nothing has been computed after 0 updates
    assert [step for step, loss in zip(range(13), history["held_out"].to_pylist(), strict=True) if loss] == [0, 6, 12]
    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    assert {"loss/outer", "loss/held-out", "learning rate", "images per second", "ridge retries",
            "seconds/meta-gradients"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss/held-out")] == [0, 6, 12]


def test_a_table_is_rewound_to_where_a_run_goes_on(copied):
    Record(str(copied), start=8).save()
    assert read_history(str(copied))["step"].to_pylist() == list(range(9))
    Record(str(copied), start=None).save()
    assert len(read_history(str(copied))) == 0


def test_an_unfinished_run_is_refused_without_resume(finished):
    with pytest.raises(ConfigError, match=r"holds an unfinished run \(12 of 20 updates\); pass --resume .* or another --out"):
        run(config(updates=20), finished)


def test_an_unfinished_run_of_other_settings_is_refused_for_those_as_resume_would_not_help(finished):
    with pytest.raises(ConfigError, match=r"started with other settings.*\n  seed: was 0, now 3\n.*another --out"):
        run(config(updates=20, seed=3), finished)


def test_a_finished_run_is_said_to_be_finished_and_given_back(finished, capsys):
    outcome = run(config(actors=3), finished)
    assert "is finished: all 12 updates are done" in capsys.readouterr().out
    assert torch.equal(outcome.values[0], serial(config())[0]) and [step for step, _ in outcome.held_out] == [0, 6, 12]


def test_changed_settings_are_refused_field_by_field(finished):
    with pytest.raises(ConfigError) as refused:
        run(config(lr=0.1, seed=3), finished, resume=True, images="other digits")
    lines = str(refused.value).splitlines()
    assert lines[1:-1] == ["  data.images: was 'digits', now 'other digits'", "  distill.lr_x: was 0.01, now 0.1",
                           "  distill.lr_y: was 0.01, now 0.1", "  seed: was 0, now 3"]
    assert "--out" in lines[-1]
    with pytest.raises(ConfigError, match="distill.decay_updates: was 12, now 50"):
        run(config(updates=50, decay_updates=50), finished, resume=True)


def test_fewer_updates_than_done_are_refused(finished):
    with pytest.raises(ConfigError, match=r"distill.updates = 5: .* has done 12 already"):
        run(config(updates=5), finished, resume=True)


def test_another_cpu_capability_is_refused_unless_gpus_compute():
    with pytest.raises(ConfigError, match="AVX2 .*ATEN_CPU_CAPABILITY=avx2"):
        require_same(FACTS, replace(FACTS, cpu_capability="AVX512"), asked_decay=None, uri="run")
    require_same(FACTS, replace(FACTS, cpu_capability=None), asked_decay=10, uri="run")


def test_more_updates_go_on_with_the_first_starts_decay(copied, capsys):
    outcome = run(config(updates=16), copied, resume=True)
    assert "falls over 12 updates" in capsys.readouterr().out
    assert torch.equal(outcome.values[0], serial(config(updates=16, decay_updates=12))[0])
    assert folders(copied)[-1] == "step-00000016-2"


def test_damaged_and_unfinished_checkpoints_are_passed_over_for_the_one_before(copied, capsys):
    checkpoints = copied / "checkpoints"
    shard = checkpoints / "step-00000012-1" / "shard-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    outer = checkpoints / "step-00000008-1" / "outer.safetensors"
    payload = bytearray(outer.read_bytes())
    payload[-5] ^= 1
    outer.write_bytes(payload)
    (checkpoints / "step-00000020-1").mkdir()  # without a manifest
    outcome = run(config(), copied, resume=True)  # its end can be read, but not from whole files
    assert outcome.updates == 12
    outcome = run(config(updates=13), copied, resume=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("damaged checkpoint")]
    assert ["shard-2.safetensors has 1000 bytes" in lines[0], "outer.safetensors has another checksum" in lines[1]] == [True, True]
    assert torch.equal(outcome.values[0], serial(config(updates=13, decay_updates=12))[0])
    assert folders(copied) == ["step-00000008-2", "step-00000012-2", "step-00000013-2"]
    assert [step for step, _ in outcome.outer] == list(range(1, 14))


def test_a_run_without_a_readable_checkpoint_is_refused(copied):
    for manifest in (copied / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    with pytest.raises(ArtifactError, match="all checkpoints .* are damaged"):
        run(config(), copied, resume=True)


def test_an_output_that_cannot_be_written_stops_before_anything_starts(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        run(config(), tmp_path / "file" / "run")


@dataclass(frozen=True)
class Obstructed(Parts):
    """Before its 7th batch, shard 1 finds that its next file cannot be written."""

    directory: str = ""

    def __call__(self, shard: int):
        built = super().__call__(shard)
        read = built.batches.next

        def next_batch():
            if shard == 1 and built.batches.state()["batch"] == 6:
                Path(self.directory, "checkpoints", "step-00000008-1", "shard-1.safetensors").mkdir(parents=True)
            return read()

        built.batches.next = next_batch
        return built


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_and_nothing_half_written(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    with pytest.raises(StorageError, match=r"cannot write .*shard-1.safetensors.*the last good checkpoint is .*step-00000004-1"):
        run(config(), tmp_path, build=Obstructed(config(), directory=str(tmp_path)))
    assert folders(tmp_path) == ["step-00000000-1", "step-00000004-1"]


def test_a_process_that_was_replaced_cannot_write_a_checkpoint(tmp_path):
    uri = f"file://{tmp_path}/checkpoints"
    old, new = Checkpoints(uri, keep=2), Checkpoints(uri, keep=2)
    old.claim()
    old.finish(1, {"x": torch.zeros(2)}, [], FACTS)
    new.claim()
    with pytest.raises(TakenOverError, match="stops, at update 2"):
        old.finish(2, {"x": torch.zeros(2)}, [], FACTS)
    assert new.whole() == ["step-00000001-1"]
    new.finish(2, {"x": torch.ones(2)}, [], FACTS)
    assert new.whole() == ["step-00000002-2", "step-00000001-1"]
    assert torch.equal(new.read("step-00000002-2").read_outer()["x"], torch.ones(2))


def test_every_start_is_a_new_incarnation_and_removes_what_was_left_unfinished(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    for incarnation in (1, 2):
        checkpoints.claim()
        assert checkpoints.folder(7).endswith(f"step-00000007-{incarnation}")
    (tmp_path / "step-00000009-5").mkdir()
    checkpoints.claim()
    assert checkpoints.folder(7).endswith("step-00000007-6") and not (tmp_path / "step-00000009-5").exists()


DAMAGED_CLAIMS = ["", "{", "[1]", "null", '{"incarnation": "x", "token": "y"}', '{"incarnation": Infinity, "token": "y"}',
                  '{"token": "y"}', "\x00" * 60]


@pytest.mark.parametrize("damaged", DAMAGED_CLAIMS)
def test_a_damaged_claim_does_not_keep_a_run_from_going_on(tmp_path, damaged):
    Checkpoints(str(tmp_path), keep=1).claim()
    (tmp_path / "step-00000003-4").mkdir()
    (tmp_path / "claim.json").write_text(damaged)
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.claim()
    assert checkpoints.folder(7).endswith("step-00000007-5")
    checkpoints.finish(7, {"x": torch.zeros(2)}, [], FACTS)
    assert checkpoints.whole() == ["step-00000007-5"]


@pytest.mark.parametrize("damaged", DAMAGED_CLAIMS)
def test_a_claim_that_is_damaged_while_the_run_goes_on_stops_it_by_the_files_name(tmp_path, damaged):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    checkpoints.claim()
    (tmp_path / "claim.json").write_text(damaged)
    with pytest.raises(ArtifactError, match=r"claim.json is damaged \(.*see to it that none does, and resume with --resume"):
        checkpoints.finish(1, {"x": torch.zeros(2)}, [], FACTS)
    assert checkpoints.whole() == []

"""Stored target representations: each image's own, whole or absent, and read beside the images they belong to."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from betons import prepared_beton, real_images

from krrst_dist import networks
from krrst_dist.artifacts import ArtifactError
from krrst_dist.augment.views import crop_flip
from krrst_dist.config import ConfigError, NetworkSettings
from krrst_dist.data import integrity
from krrst_dist.data.errors import DataError
from krrst_dist.data.memory_reader import MemoryReader
from krrst_dist.data.prefetch import Prefetcher
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import BetonReader
from krrst_dist.data.stream import TargetedBatches
from krrst_dist.data.targets import TargetFile, write_targets
from krrst_dist.evaluation.target_model import load_target, save_target

N, K = 200, 6


@pytest.fixture(scope="module")
def items(shared_data):
    return real_images(shared_data / "cifar100-test.parquet", N, 32)


@pytest.fixture(scope="module")
def prepared(items, tmp_path_factory):
    return prepared_beton(tmp_path_factory.mktemp("beton") / "cifar.beton", items, "raw")


def represent(images):
    """Six numbers of an image that depend on where its pixels are: the means of its rows 0..5."""
    return images.float().mean(dim=(1, 3))[:, :K]


def tensor(items, index):
    return torch.from_numpy(items.pixels[index]).permute(0, 3, 1, 2)


def write(path, prepared, represent=represent, *, target="g", views=0, view_seed=9, over=None, batch=64, **options):
    return write_targets(path, prepared, represent, target_fingerprint=target, views=views, view_seed=view_seed, statistics_over=over,
                         batch=batch, progress=False, **options)


def test_the_representation_of_each_image_is_found_by_its_index(prepared, items, tmp_path):
    targets = write(tmp_path / "t.npy", prepared)
    index = np.array([199, 3, 3, 64, 0])
    assert (targets.k, targets.views, targets.array.shape) == (K, 0, (N, 1, K))
    assert torch.equal(targets.look_up(index), represent(tensor(items, index)))
    assert targets.look_up(index).dtype == torch.float32
    assert sorted(file.name for file in tmp_path.iterdir()) == [".t.npy.lock", "t.npy", "t.npy.json"]


def test_the_representation_of_each_view_is_that_of_the_image_cropped_and_flipped(prepared, items, tmp_path):
    targets = write(tmp_path / "t.npy", prepared, views=3)
    index, view = np.array([5, 150, 5]), np.array([0, 2, 1])
    seen = crop_flip(tensor(items, index), torch.from_numpy(index), torch.from_numpy(view), seed=9)
    assert torch.equal(targets.look_up(index, view), represent(seen))
    assert torch.equal(targets.look_up(index), represent(tensor(items, index)))  # the image as it is comes beside its views


@pytest.mark.parametrize("index", [np.array([-1]), np.array([N])])
def test_an_image_that_is_not_there_is_not_looked_up(prepared, tmp_path, index):
    with pytest.raises(ConfigError, match="0..199"):
        write(tmp_path / "t.npy", prepared).look_up(index)


# --- standardisation -----------------------------------------------------------------------------------------


def test_targets_are_standardised_by_the_given_images_and_all_their_views(prepared, tmp_path):
    over = np.arange(0, N, 2)
    raw = write(tmp_path / "raw.npy", prepared, views=2).array[over].reshape(-1, K).astype(np.float64)
    targets = write(tmp_path / "t.npy", prepared, views=2, over=over[::-1])
    both = torch.cat([targets.look_up(over)] + [targets.look_up(over, np.full(len(over), view)) for view in range(2)]).double()
    np.testing.assert_allclose(targets.mean, raw.mean(0), rtol=1e-12)
    np.testing.assert_allclose(targets.std, raw.std(0), rtol=1e-10)
    assert both.mean(0).abs().max() < 1e-6 and (both.std(0, correction=0) - 1).abs().max() < 1e-6
    assert both.dtype == torch.float64 and targets.look_up(over, np.zeros(len(over), int)).dtype == torch.float32


def test_a_dimension_that_never_varies_becomes_zero_and_not_infinite(prepared, tmp_path):
    def with_constants(images):
        rows = represent(images)
        rows[:, 1], rows[:, 4] = 0.0, 0.1
        return rows

    standardised = write(tmp_path / "t.npy", prepared, with_constants, over=np.arange(N)).look_up(np.arange(N))
    assert torch.isfinite(standardised).all()
    assert standardised[:, [1, 4]].abs().max() < 1e-6


# --- whole or absent, resumed --------------------------------------------------------------------------------


class Counting:
    """A target model that counts its images, and fails at one of its batches."""

    def __init__(self, fails_at=None, represent=represent):
        self.images, self.batches, self.fails_at, self.represent = 0, 0, fails_at, represent

    def __call__(self, images):
        if self.batches == self.fails_at:
            raise KeyboardInterrupt
        self.batches += 1
        self.images += len(images)
        return self.represent(images)


def test_an_interrupted_computation_goes_on_where_it_stopped(prepared, tmp_path):
    path, whole = tmp_path / "t.npy", write(tmp_path / "whole.npy", prepared, over=np.arange(N))
    with pytest.raises(KeyboardInterrupt):
        write(path, prepared, Counting(fails_at=2), over=np.arange(N))
    with pytest.raises(DataError, match="not there"):
        TargetFile.open(path, prepared)
    again = Counting()
    targets = write(path, prepared, again, over=np.arange(N))
    assert again.images == N - 2 * 64
    assert path.read_bytes() == whole.path.read_bytes()
    assert np.array_equal(targets.std, whole.std)
    assert not list(tmp_path.glob("*.part*"))


def test_killed_outright_it_goes_on_from_the_last_mark(prepared, tmp_path):
    prepared.save()
    code = f"""
import os, signal
from pathlib import Path
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.targets import write_targets
from test_data_targets import represent
def killed_at_the_fourth(images):
    if len(images) != 64: os.kill(os.getpid(), signal.SIGKILL)
    return represent(images)
write_targets(Path({str(tmp_path / "t.npy")!r}), Prepared.open(Path({str(prepared.path)!r})), killed_at_the_fourth,
              target_fingerprint="g", views=0, view_seed=9, statistics_over=None, batch=64, progress=False, mark_every=0)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    again = Counting()
    targets = write(tmp_path / "t.npy", prepared, again)
    assert again.images == N - 3 * 64
    assert np.array_equal(targets.array, write(tmp_path / "whole.npy", prepared).array)


@pytest.mark.parametrize("other", [{"target": "h"}, {"views": 2}, {"batch": 32}])
def test_rows_of_an_interrupted_other_computation_are_not_taken_over(prepared, tmp_path, other):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t.npy", prepared, Counting(fails_at=2))
    again = Counting()
    targets = write(tmp_path / "t.npy", prepared, again, **other)
    assert again.images == N * (1 + targets.views)


def test_what_is_there_is_not_computed_again(prepared, tmp_path):
    first, again = write(tmp_path / "t.npy", prepared), Counting()
    assert np.array_equal(write(tmp_path / "t.npy", prepared, again).array, first.array)
    assert again.images == 0


def test_of_two_processes_that_want_the_same_file_one_computes_it_and_the_other_waits(prepared, tmp_path):
    prepared.save()
    code = f"""
import logging, sys, time
from pathlib import Path
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.targets import write_targets
from test_data_targets import represent
logging.basicConfig(level=logging.INFO, format="%(message)s")
end = time.monotonic() + 60
def slow(images):
    print("computing", len(images), flush=True)
    while not Path({str(tmp_path / "go")!r}).exists() and time.monotonic() < end: time.sleep(0.01)
    return represent(images)
write_targets(Path({str(tmp_path / "t.npy")!r}), Prepared.open(Path({str(prepared.path)!r})), slow,
              target_fingerprint="g", views=0, view_seed=9, statistics_over=None, batch=64, progress=False)
"""

    def start():
        return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    with start() as first:
        assert first.stdout.readline() == "computing 64\n"
        with start() as second:
            assert any("another process is writing t.npy; waiting for it" in line for line in second.stderr)
            (tmp_path / "go").touch()
            results = [process.communicate(timeout=120) for process in (first, second)]
        assert [first.returncode, second.returncode] == [0, 0], results
    assert results[1][0] == "" and "there already" in results[1][1]
    assert np.array_equal(TargetFile.open(tmp_path / "t.npy", prepared).array, write(tmp_path / "whole.npy", prepared).array)


def test_a_disk_that_fills_up_is_said_with_the_file_and_the_work_goes_on_from_there(prepared, tmp_path):
    def all_pixels(images):
        return images.float().flatten(1)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # a write past 1 MiB fails, as on a full disk
    try:
        with pytest.raises(DataError, match=r"t.npy.part: cannot be written \(File too large\); free some space there and run it again"):
            write(tmp_path / "t.npy", prepared, all_pixels, batch=16, mark_every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Counting(represent=all_pixels)
    targets = write(tmp_path / "t.npy", prepared, again, batch=16)
    assert again.images == N - 80  # 85 rows of 12 KiB fit, of which five whole batches are marked
    assert np.array_equal(targets.array, write(tmp_path / "whole.npy", prepared, all_pixels).array)


# --- refused -------------------------------------------------------------------------------------------------


def other_data(prepared):
    return Prepared(**vars(prepared) | {"fingerprint": "other images"})


def test_targets_of_other_data_or_another_model_are_refused(prepared, tmp_path):
    path = write(tmp_path / "t.npy", prepared).path
    TargetFile.open(path, prepared)
    TargetFile.open(path, prepared, "g")
    with pytest.raises(DataError, match="target is 'g', not 'h'"):
        TargetFile.open(path, prepared, "h")
    with pytest.raises(DataError, match="prepared is 'these images', not 'other images'"):
        TargetFile.open(path, other_data(prepared))


@pytest.mark.parametrize("other", [{"target": "h"}, {"views": 1}, {"view_seed": 8}, {"over": np.arange(5)}])
def test_targets_that_are_there_are_not_overwritten_by_others(prepared, tmp_path, other):
    before = write(tmp_path / "t.npy", prepared).path.read_bytes()
    with pytest.raises(DataError, match="of something else"):
        write(tmp_path / "t.npy", prepared, **other)
    assert (tmp_path / "t.npy").read_bytes() == before


def test_missing_truncated_and_foreign_target_files_are_refused(prepared, tmp_path):
    path = write(tmp_path / "t.npy", prepared).path
    payload, about = path.read_bytes(), path.with_name("t.npy.json")
    for wrong in (payload[:-1], payload[:40], b"", b"\x93NUMPY or not", json.dumps({}).encode()):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match="krrst target"):
            TargetFile.open(path, prepared)
    path.write_bytes(payload)
    np.save(tmp_path / "wide.npy", np.zeros((N, 1, K + 1), np.float32))
    (tmp_path / "wide.npy").replace(path)
    with pytest.raises(DataError, match="not float32"):
        TargetFile.open(path, prepared)
    about.write_text("{}")
    with pytest.raises(DataError, match="does not describe"):
        TargetFile.open(path, prepared)
    about.unlink()
    with pytest.raises(DataError, match="is gone"):
        TargetFile.open(path, prepared)
    path.unlink()
    with pytest.raises(DataError, match="not there"):
        TargetFile.open(path, prepared)


@pytest.mark.parametrize("value", [np.nan, 0.5])
def test_a_target_file_with_a_changed_value_is_refused(prepared, tmp_path, value):
    path = write(tmp_path / "t.npy", prepared).path
    array = np.load(path, mmap_mode="r+")
    array[100, 0, 2] = value
    del array
    with pytest.raises(DataError, match=r"t.npy: damaged: its bytes are not those that were written .*run `krrst target` again"):
        TargetFile.open(path, prepared)
    with pytest.raises(DataError, match="damaged"):
        write(path, prepared)


def test_a_sidecar_of_targets_without_a_checksum_is_refused(prepared, tmp_path):
    path = write(tmp_path / "t.npy", prepared).path
    about = json.loads(path.with_name("t.npy.json").read_text())
    assert about.pop("checksum") == integrity.named(integrity.crc32(path))
    path.with_name("t.npy.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=r"t.npy.json: does not describe target representations \(without checksum\); delete both files"):
        TargetFile.open(path, prepared)


def test_rows_that_were_damaged_while_the_computation_was_interrupted_are_computed_again(prepared, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "t.npy", prepared, Counting(fails_at=2))
    part = tmp_path / "t.npy.part"
    damaged = bytearray(part.read_bytes())
    damaged[1000] ^= 1
    part.write_bytes(damaged)
    again = Counting()
    targets = write(tmp_path / "t.npy", prepared, again)
    assert again.images == N
    assert np.array_equal(targets.array, write(tmp_path / "whole.npy", prepared).array)


def test_a_target_model_whose_file_lost_a_bit_is_refused_and_not_taken_for_another(tmp_path):
    settings, path = NetworkSettings(name="convnet", widths=(4, 8)), tmp_path / "target.safetensors"
    save_target(path, networks.build("convnet", resolution=16, widths=(4, 8)), settings, resolution=16, about={})
    whole = path.read_bytes()
    load_target(path, resolution=16)
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(ArtifactError, match="target.safetensors: damaged: its weights are not those that were saved; restore it"):
        load_target(path, resolution=16)
    path.write_bytes(whole.replace(b"checksum", b"chocksum"))
    with pytest.raises(ArtifactError, match="target.safetensors: has no checksum of its weights; restore it from its source, or delete"):
        load_target(path, resolution=16)


def test_a_target_model_that_gives_nonsense_is_stopped_at_the_image(prepared, tmp_path):
    def not_a_number(images):
        rows = represent(images)
        rows[10, 2] = torch.nan
        return rows

    with pytest.raises(DataError, match="NaN or infinity for image 10"):
        write(tmp_path / "t.npy", prepared, not_a_number)
    with pytest.raises(DataError, match="not one vector each"):
        write(tmp_path / "t.npy", prepared, lambda images: images.float())
    with pytest.raises(DataError, match="not one vector each"):
        write(tmp_path / "t.npy", prepared, lambda images: represent(images)[:3])


# --- batches -------------------------------------------------------------------------------------------------


def memory_reader(items, batch=48):
    return MemoryReader(items.pixels, items.labels, np.arange(10, 150), batch=batch, seed=3, purpose_index=0)


def test_batches_are_normalised_images_with_their_targets(prepared, items, tmp_path):
    batches = TargetedBatches(memory_reader(items), write(tmp_path / "t.npy", prepared, over=np.arange(N)), prepared, view_seed=9)
    reader = memory_reader(items)
    targets = TargetFile.open(tmp_path / "t.npy", prepared)
    for _ in range(4):
        (x, y), expected = batches.next(), reader.next()
        pixels = (items.pixels[expected.index] / 255 - prepared.mean) / prepared.std
        np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), pixels, atol=2e-6)
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, targets.look_up(expected.index))


def test_every_epoch_shows_the_next_view_of_an_image_with_that_views_target(prepared, items, tmp_path):
    targets = write(tmp_path / "t.npy", prepared, views=3)
    batches = TargetedBatches(memory_reader(items), targets, prepared, view_seed=9)
    reader = memory_reader(items)
    mean, std = (torch.tensor(values)[:, None, None] for values in (prepared.mean, prepared.std))
    views_of_20 = []
    for batch in range(4 * 3):
        (x, y), index = batches.next(), reader.next().index
        view = (index + batch // 3) % 3
        views_of_20 += view[index == 20].tolist()
        assert torch.equal(y, targets.look_up(index, view))
        # the target was computed from the very pixels that are handed out
        torch.testing.assert_close(represent((x * std + mean) * 255), y, atol=1e-2, rtol=0)
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert views_of_20 == [2, 0, 1, 2]


def test_batches_go_on_from_a_saved_position_also_with_views_and_reading_ahead(prepared, items, tmp_path):
    targets = write(tmp_path / "t.npy", prepared, views=3)

    def make(reader):
        return TargetedBatches(reader, targets, prepared, view_seed=9)

    beton = BetonReader(prepared, np.arange(10, 150), batch=48, seed=3, purpose_index=0)
    plain, ahead = make(memory_reader(items)), make(Prefetcher(beton, depth=2))
    for _ in range(8):
        position = plain.state()
        assert ahead.state() == position
        for one, other in zip(plain.next(), ahead.next(), strict=True):
            assert torch.equal(one, other)
    after = ahead.state()
    for start in (position, {"epoch": 1, "batch": 0}):
        plain.restore(start)
        ahead.restore(start)
        for one, other in zip(plain.next(), ahead.next(), strict=True):
            assert torch.equal(one, other)
    assert after == {"epoch": 2, "batch": 2}
    ahead.close()


def test_views_made_with_another_seed_are_refused(prepared, items, tmp_path):
    targets = write(tmp_path / "t.npy", prepared, views=1)
    with pytest.raises(ConfigError, match="view_seed = 4"):
        TargetedBatches(memory_reader(items), targets, prepared, view_seed=4)

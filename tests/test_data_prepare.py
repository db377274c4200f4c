"""Preparing a data set: what lands in the beton and its sidecar, and what happens when something is wrong or dies."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from betons import beton_of
from PIL import Image

from krrst_dist import storage
from krrst_dist.config import ConfigError
from krrst_dist.data import beton, integrity
from krrst_dist.data.errors import DataError
from krrst_dist.data.images import resize, to_rgb
from krrst_dist.data.prepare import prepare
from krrst_dist.data.prepared import Prepared, held_out_split
from krrst_dist.data.sources import open_images, spec


def stored(prepared: Prepared) -> tuple[list[bytes], np.ndarray]:
    """The bytes of each stored image and the labels int64 [n], read without FFCV."""
    payloads, labels = [], []
    for path, part in prepared.files.items():
        content = path.read_bytes()
        header = np.frombuffer(content, beton.HEADER, 1)[0]
        samples = np.frombuffer(content, beton.SAMPLE, part.count, beton.HEADER.itemsize + len(beton.FIELDS) * beton.FIELD.itemsize)
        table = np.frombuffer(content, beton.ALLOCATION, part.count, int(header["table"]))
        payloads += [content[row["start"]:row["start"] + row["size"]] for row in table]
        labels.append(samples["label"])
    return payloads, np.concatenate(labels)


def visible(directory: Path) -> list[str]:
    """Everything in a folder but the lock files."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def holiday(root: Path, count: int = 5, **damaged: bytes) -> Path:
    """A user's own folder of random images, some files overwritten."""
    folder = root / "holiday"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(folder / f"p{i}.png")
    for name, content in damaged.items():
        (folder / f"{name}.png").write_bytes(content)
    return root


def prepare_holiday(root: Path, out: Path, **settings) -> Prepared:
    return prepare("folder:holiday", "train", root=root, directory=out, **{"resolution": 16, "progress": False} | settings)


# --- what is written


def test_real_imagenet_images_at_64_px_are_stored_as_raw_pixels(shared_data, tmp_path):
    prepared = prepare("imagenet", "train", root=shared_data, directory=tmp_path, resolution=64, progress=False)
    images = open_images("imagenet", "train", shared_data)
    expected = np.stack([resize(to_rgb(images[i].image), 64, "crop") for i in range(60)])  # uint8 [n, H, W, 3]
    payloads, labels = stored(prepared)
    np.testing.assert_array_equal(np.stack([np.frombuffer(p, np.uint8).reshape(64, 64, 3) for p in payloads]), expected)
    np.testing.assert_array_equal(labels, images.labels)
    assert any((image[..., 0] == image[..., 1]).all() and (image[..., 0] == image[..., 2]).all() for image in expected)  # the grayscale one
    np.testing.assert_allclose(prepared.mean, (expected / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, (expected / 255).std((0, 1, 2)), rtol=1e-12)
    assert (prepared.encoding, prepared.count, prepared.found, prepared.official_count) == ("raw", 60, 60, 1_281_167)


def test_real_imagenet_images_at_224_px_are_stored_as_jpeg(shared_data, tmp_path):
    prepared = prepare("imagenet", "test", root=shared_data, directory=tmp_path, resolution=224, progress=False)
    images = open_images("imagenet", "test", shared_data)
    payloads, _ = stored(prepared)
    assert prepared.encoding == "jpeg"
    for i in range(0, 60, 7):
        decoded = np.asarray(Image.open(io.BytesIO(payloads[i]))).astype(float)  # [H, W, 3]
        error = np.sqrt(((decoded - resize(to_rgb(images[i].image), 224, "crop")) ** 2).mean())
        assert decoded.shape == (224, 224, 3) and error < 8


def test_tinyimagenet_with_its_grayscale_images_is_recorded_as_a_part(shared_data, tmp_path, capsys):
    prepared = prepare("tinyimagenet", "test", root=shared_data, directory=tmp_path, resolution=64)
    assert prepared.found == prepared.count == 5_000 and prepared.official_count == 10_000
    np.testing.assert_allclose(prepared.mean, spec("tinyimagenet").mean, atol=0.005)
    shown = capsys.readouterr().err
    assert "5000/5000" in shown and "images/s" in shown
    assert "5000 of the 10000 images of tinyimagenet test: a part of it" in shown


def test_the_statistics_of_cifar100_are_the_published_ones(shared_data, tmp_path):
    prepared = prepare("cifar100", "train", root=shared_data, directory=tmp_path, resolution=32, progress=False)
    np.testing.assert_allclose(prepared.mean, spec("cifar100").mean, atol=6e-5)
    np.testing.assert_allclose(prepared.std, spec("cifar100").std, atol=6e-5)


def test_the_sidecar_gives_everything_back(tmp_path):
    prepared = prepare("digits-0-4", "test", root=tmp_path, directory=tmp_path, resolution=16, progress=False)
    assert Prepared.open(prepared.path) == prepared
    assert json.loads(prepared.path.read_text())["class_names"] == ["0", "1", "2", "3", "4"]


def test_own_images_are_prepared_without_labels(tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    assert not prepared.labelled and prepared.class_names == () and (stored(prepared)[1] == -1).all()
    assert prepared.path.name.startswith("folder-holiday-train-16-crop-")


# --- once is enough


def test_a_second_call_finds_the_file_and_says_so_in_one_line(tmp_path, capsys):
    first = prepare("digits-5-9", "train", root=tmp_path, directory=tmp_path, resolution=8, progress=False)
    written = beton_of(first).stat().st_mtime_ns
    capsys.readouterr()
    again = prepare("digits-5-9", "train", root=tmp_path, directory=tmp_path, resolution=8)
    lines = capsys.readouterr().err.splitlines()
    assert again == first and beton_of(again).stat().st_mtime_ns == written
    assert len(lines) == 1 and "is prepared already" in lines[0] and str(first.path) in lines[0]


def test_other_data_or_settings_are_another_file(tmp_path):
    root, out = holiday(tmp_path), tmp_path / "out"
    settings = [{}, {"resolution": 8}, {"resize": "squash"}, {"on_bad_image": "skip"}]
    found = {prepare_holiday(root, out, **setting).fingerprint for setting in settings}
    Image.new("RGB", (50, 40)).save(root / "holiday" / "p9.png")
    found.add(prepare_holiday(root, out).fingerprint)
    assert len(found) == 5 and len(visible(out)) == 10


def test_the_same_data_gives_the_same_bytes(tmp_path):
    first, second = (prepare_holiday(holiday(tmp_path / name), tmp_path / name / "out") for name in "ab")
    assert first.path.name == second.path.name and beton_of(first).read_bytes() == beton_of(second).read_bytes()
    assert first.path.read_bytes() == second.path.read_bytes()


def test_a_truncated_or_foreign_beton_is_refused_when_opened_and_replaced_when_prepared(tmp_path, capsys):
    root, out = holiday(tmp_path), tmp_path / "out"
    prepared = prepare_holiday(root, out)
    whole = beton_of(prepared).read_bytes()
    for wrong, complaint in [(whole[:-100], "truncated, or another file"), (b"\0" * len(whole), "not a beton")]:
        beton_of(prepared).write_bytes(wrong)
        with pytest.raises(DataError, match=complaint):
            Prepared.open(prepared.path)
        prepare_holiday(root, out, progress=True)
        assert "preparing anew" in capsys.readouterr().err and beton_of(prepared).read_bytes() == whole


def test_a_beton_with_one_changed_pixel_is_refused_when_opened_and_replaced_when_prepared(tmp_path, capsys):
    root, out = holiday(tmp_path), tmp_path / "out"
    prepared = prepare_holiday(root, out)
    whole = beton_of(prepared).read_bytes()
    pixel = whole.index(stored(prepared)[0][2]) + 100
    beton_of(prepared).write_bytes(whole[:pixel] + bytes([whole[pixel] ^ 1]) + whole[pixel + 1:])
    with pytest.raises(DataError, match=r"\.beton: damaged: its bytes are not those that were written \(crc32:.*, its sidecar says crc32:.*"
                                        r"\); delete it and run `krrst prepare` again"):
        Prepared.open(prepared.path)
    prepare_holiday(root, out, progress=True)
    assert "preparing anew" in capsys.readouterr().err and beton_of(prepared).read_bytes() == whole


@pytest.fixture
def reads(tmp_path, monkeypatch) -> list[Path]:
    """The files that were read to the end to be compared with their checksum, on a node of its own."""
    found, crc32 = [], integrity.crc32
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    monkeypatch.setattr(integrity, "crc32", lambda path, length=None: (found.append(path), crc32(path, length))[1])
    return found


def test_a_beton_is_compared_with_its_checksum_once_an_hour_on_each_node(tmp_path, monkeypatch, reads):
    path = prepare_holiday(holiday(tmp_path), tmp_path / "out").path
    whole = [path.with_suffix(".beton")]
    assert reads == whole  # when it was written
    for _ in range(3):
        Prepared.open(path)
    code = f"from pathlib import Path; from krrst_dist.data import integrity; integrity.crc32 = None; " \
           f"from krrst_dist.data.prepared import Prepared; Prepared.open(Path({str(path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TMPDIR": str(tmp_path / "node")})
    assert reads == whole
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3601)
    Prepared.open(path)
    Prepared.open(path)
    assert reads == whole * 2
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "out"))  # another node
    Prepared.open(path)
    assert reads == whole * 3


def test_where_nothing_can_be_noted_every_process_looks_for_itself(tmp_path, monkeypatch, reads):
    path = prepare_holiday(holiday(tmp_path), tmp_path / "out").path
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    for _ in range(2):
        Prepared.open(path)
    assert len(reads) == 3


@pytest.mark.parametrize("content", ["", "[]", '{"count": 3}', '{"count": 5, "more": 1}'])
def test_a_sidecar_that_describes_no_data_is_refused(content, tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    prepared.path.write_text(content)
    with pytest.raises(DataError, match="does not describe a prepared data set"):
        Prepared.open(prepared.path)


@pytest.mark.parametrize("change", [
    {"std": [0, 0.2, 0.2]}, {"std": [0.2, float("inf"), 0.2]}, {"mean": [0.5, 0.5]}, {"mean": "gray"}, {"mean": [float("nan")] * 3},
    {"parts": "all"}, {"parts": []}, {"resolution": 16.5}, {"labelled": "perhaps"}, {"class_names": [1]}, {"fingerprint": None},
    {"encoding": "webp"}, {"resize": "fit"}, {"split": "val"}], ids=str)
def test_a_sidecar_with_a_value_that_cannot_be_is_refused_by_the_field(change, tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    prepared.path.write_text(json.dumps(json.loads(prepared.path.read_text()) | change))
    with pytest.raises(DataError, match=rf"\.json: does not describe a prepared data set \({next(iter(change))}.* `krrst prepare` again"):
        Prepared.open(prepared.path)


def test_a_sidecar_of_another_resolution_than_its_betons_is_refused(tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    prepared.path.write_text(prepared.path.read_text().replace('"resolution": 16', '"resolution": 32'))
    with pytest.raises(DataError, match="holds images of 16 x 16 pixels where 32 a side are expected; delete it"):
        Prepared.open(prepared.path)


def test_a_beton_without_its_sidecar_does_not_count(tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    prepared.path.unlink()
    with pytest.raises(DataError, match=r"\.json: not there; run `krrst prepare`"):
        Prepared.open(prepared.path)


# --- bad images


def test_a_corrupt_file_stops_the_run_by_its_path_and_leaves_nothing(tmp_path):
    root = holiday(tmp_path, p3=b"\x89PNG but no more")
    with pytest.raises(DataError, match=r"holiday/p3.png: cannot be decoded .*; replace it, or .* --on-bad-image skip"):
        prepare_holiday(root, tmp_path / "out")
    assert visible(tmp_path / "out") == []


def test_skipped_images_are_counted_and_listed_and_change_nothing_else(tmp_path, capsys):
    clean = prepare_holiday(holiday(tmp_path / "clean", 40), tmp_path / "out")
    damaged = holiday(tmp_path / "damaged", 40, q0=b"", p40=b"no image", a=b"nor this")
    skipped = prepare_holiday(damaged, tmp_path / "out", on_bad_image="skip", progress=True)
    assert (skipped.count, skipped.found) == (40, 43)
    assert [Path(line.split(":")[0]).name for line in skipped.bad_images] == ["a.png", "p40.png", "q0.png"]
    assert (skipped.mean, skipped.std) == (clean.mean, clean.std) and stored(skipped)[0] == stored(clean)[0]
    assert "skipped 3 bad images" in capsys.readouterr().err


def test_what_is_no_file_is_a_bad_image_and_neither_waited_for_nor_in_the_way_of_skipping(tmp_path):
    root = holiday(tmp_path, 4)
    os.mkfifo(root / "holiday" / "pipe.png")
    with pytest.raises(DataError, match=r"holiday/pipe.png: cannot be decoded \(a pipe, .* not a file\); replace it, or .* skip"):
        prepare_holiday(root, tmp_path / "out")
    (root / "holiday" / "link.png").symlink_to("/gone.png")
    (root / "holiday" / "loop.png").symlink_to("loop.png")
    skipped = prepare_holiday(root, tmp_path / "out", on_bad_image="skip")
    assert skipped.count == 4
    assert [line.partition("holiday/")[2] for line in skipped.bad_images] == [
        "link.png: cannot be decoded (a link to /gone.png, which is not there)",
        "loop.png: cannot be decoded (Too many levels of symbolic links)",
        "pipe.png: cannot be decoded (a pipe, socket, device or folder, not a file)"]


def test_a_pixel_format_that_cannot_become_rgb_counts_as_a_bad_image(tmp_path):
    root = holiday(tmp_path)
    Image.new("F", (20, 20), 0.5).save(root / "holiday" / "float.tif")
    with pytest.raises(DataError, match="float.tif: cannot be decoded .floating-point"):
        prepare_holiday(root, tmp_path / "out")


def test_skipping_every_image_is_an_error(tmp_path):
    root = holiday(tmp_path, 2, p0=b"", p1=b"")
    with pytest.raises(DataError, match="none of the 2 images can be decoded; the first: .*p0.png"):
        prepare_holiday(root, tmp_path / "out", on_bad_image="skip")
    assert visible(tmp_path / "out") == []


def test_images_that_are_all_one_colour_are_refused(tmp_path):
    folder = tmp_path / "holiday"
    folder.mkdir()
    Image.new("RGB", (20, 20), (3, 4, 5)).save(folder / "a.png")
    with pytest.raises(DataError, match="channel 0 has the same value in every pixel"):
        prepare_holiday(tmp_path, tmp_path / "out")


# --- settings and places


@pytest.mark.parametrize(("setting", "complaint"), [
    ({"resize": "crpo"}, "resize = 'crpo': must be one of crop, squash; did you mean 'crop'"),
    ({"on_bad_image": "ignore"}, "on_bad_image = 'ignore': must be one of stop, skip"),
    ({"resolution": 0}, "resolution = 0: must be at least 1"),
])
def test_wrong_settings_are_refused_before_anything_is_written(setting, complaint, tmp_path):
    with pytest.raises(ConfigError, match=complaint):
        prepare_holiday(holiday(tmp_path), tmp_path / "out", **setting)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(storage.StorageError, match=f"cannot write {tmp_path}/file/out.*or choose another --cache"):
        prepare_holiday(holiday(tmp_path), tmp_path / "file" / "out")


@pytest.mark.parametrize("damaged", [{}, {"bad": b"no image"}], ids=["after success", "after failure"])
def test_no_decoding_thread_outlives_the_preparation(tmp_path, damaged):
    before = set(threading.enumerate())
    root = holiday(tmp_path, **damaged)
    with pytest.raises(DataError) if damaged else nullcontext():
        prepare_holiday(root, tmp_path / "out")
    assert not [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("decode")]


def test_a_folder_in_the_way_of_the_file_is_named(tmp_path):
    root, out = holiday(tmp_path), tmp_path / "out"
    prepared = prepare_holiday(root, out)
    prepared.path.unlink()
    beton_of(prepared).unlink()
    beton_of(prepared).mkdir()
    name = beton_of(prepared).name
    with pytest.raises(DataError, match=rf"out: cannot write {name} \(Is a directory\); check .* in the way, or .* --cache"):
        prepare_holiday(root, out)


def test_a_cache_that_cannot_be_written_serves_while_nothing_is_missing(tmp_path, monkeypatch):
    root, out = holiday(tmp_path), tmp_path / "out"
    first = prepare_holiday(root, out)

    def read_only(*_):
        raise storage.StorageError("cannot write: [Errno 30] Read-only file system")

    monkeypatch.setattr(storage, "check_writable", read_only)
    monkeypatch.setattr("krrst_dist.data.prepare.alone", read_only)
    assert prepare_holiday(root, out) == first
    with pytest.raises(storage.StorageError, match="Read-only file system, or choose another --cache"):
        prepare_holiday(root, out, resolution=8)


def test_too_little_space_is_noticed_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    with pytest.raises(DataError, match=r"1.0 kB free, but preparing takes 3.8 kB; free some, or choose another --cache"):
        prepare_holiday(holiday(tmp_path), tmp_path / "out")


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # a write past 1 MiB fails, as on a full disk
    try:
        with pytest.raises(DataError, match=f"{tmp_path}: cannot write .*check the free space"):
            prepare("digits-0-4", "train", root=tmp_path, directory=tmp_path, resolution=64, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert visible(tmp_path) == []


# --- death and company

COMMAND = """
import sys
from pathlib import Path
from krrst_dist.data.prepare import prepare
prepared = prepare("tinyimagenet", "test", root=Path(sys.argv[1]), directory=Path(sys.argv[2]), resolution=64)
print(prepared.path)
"""


def start(root: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", COMMAND, str(root), str(out)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_a_killed_run_leaves_nothing_that_counts_and_the_next_one_sweeps_up(shared_data, tmp_path):
    killed = start(shared_data, tmp_path)
    deadline = time.monotonic() + 60
    while not any(file.stat().st_size > 10 << 20 for file in tmp_path.glob(".*.work/.*")):
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = visible(tmp_path)
    assert len(left) == 1 and left[0].endswith(".work")
    prepared = prepare("tinyimagenet", "test", root=shared_data, directory=tmp_path, resolution=64, progress=False)
    assert prepared.count == 5_000 and visible(tmp_path) == sorted([beton_of(prepared).name, prepared.path.name])


def test_two_processes_that_want_the_same_file_write_it_once(shared_data, tmp_path):
    processes = [start(shared_data, tmp_path) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    assert sum("is prepared already" in errors for _, errors in results) == 1
    assert visible(tmp_path) == sorted(Path(results[0][0].strip()).with_suffix(s).name for s in (".beton", ".json"))


# --- the held-out images


def test_held_out_images_are_a_seeded_part_and_the_rest_is_for_training():
    training, held_out = held_out_split(100, 30, 7)
    assert len(training) == 70 and len(held_out) == 30 and training.dtype == held_out.dtype == np.int64
    np.testing.assert_array_equal(np.sort(np.concatenate([training, held_out])), np.arange(100))
    assert (np.diff(training) > 0).all() and (np.diff(held_out) > 0).all()
    np.testing.assert_array_equal(held_out, held_out_split(100, 30, 7)[1])
    assert not np.array_equal(held_out, held_out_split(100, 30, 8)[1])


def test_holding_out_everything_is_refused():
    with pytest.raises(ConfigError, match="source.held_out = 100: must leave at least one of the 100 images"):
        held_out_split(100, 100, 0)

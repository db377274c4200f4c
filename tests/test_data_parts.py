"""A prepared split in several parts: the same images as in one, each part written once, whatever dies or breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_data_prepare import holiday, prepare_holiday, stored, visible

from krrst_dist.data import part
from krrst_dist.data.errors import DataError
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import read_all

COUNT = 40


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 7 images of 16 px."""
    monkeypatch.setattr("krrst_dist.data.prepare.PART_BYTES", 7 * 16 * 16 * 3 + 1)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The betons that are written from now on."""
    names, write_beton = [], part.write_beton
    monkeypatch.setattr(part, "write_beton", lambda path, *items, **how: (names.append(path.name), write_beton(path, *items, **how))[1])
    return names


def test_parts_hold_the_images_and_statistics_of_one_beton(tmp_path, monkeypatch):
    one = prepare_holiday(holiday(tmp_path, COUNT), tmp_path / "one")
    monkeypatch.setattr("krrst_dist.data.prepare.PART_BYTES", 7 * 16 * 16 * 3 + 1)
    many = prepare_holiday(tmp_path, tmp_path / "many")
    stem = one.path.stem
    assert [path.name for path in many.files] == [f"{stem}-{i:05d}-of-00006.beton" for i in range(6)]
    assert [p.count for p in many.parts] == [7, 7, 7, 7, 7, 5] and [p.first for p in many.parts] == [0, 7, 14, 21, 28, 35]
    assert (many.count, many.mean, many.std, many.fingerprint) == (one.count, one.mean, one.std, one.fingerprint)
    assert stored(many)[0] == stored(one)[0]
    assert visible(tmp_path / "many") == sorted([many.path.name, *(path.name for path in many.files)])
    assert Prepared.open(many.path) == many


def test_imagenet_is_cut_into_about_sixty_parts_and_cifar_is_one():
    from krrst_dist.data.prepare import _cut

    assert len(_cut("x", 1_281_167, 64, "raw")) == 63 and len(_cut("x", 50_000, 32, "raw")) == 1
    parts = _cut("x", 1_281_167, 64, "raw")
    assert [first for _, first, _ in parts] == [0, *(stop for *_, stop in parts[:-1])] and parts[-1][2] == 1_281_167


@pytest.mark.usefixtures("small_parts")
def test_skipped_images_are_left_out_of_their_part_and_every_image_keeps_its_place_in_the_source(tmp_path):
    root = holiday(tmp_path, COUNT)
    names = sorted(path.name for path in (root / "holiday").iterdir())
    bad = [*range(7, 14), 3, 20, 39]  # the second part is nothing but bad images
    for i in bad:
        (root / "holiday" / names[i]).write_bytes(b"no image")
    prepared = prepare_holiday(root, tmp_path / "out", on_bad_image="skip")
    good = [i for i in range(COUNT) if i not in bad]
    assert (prepared.count, prepared.found, len(prepared.bad_images)) == (30, 40, 10)
    assert [p.count for p in prepared.parts] == [6, 0, 6, 7, 7, 4] and len(prepared.files) == 5
    images, _ = read_all(prepared, np.arange(30))
    from krrst_dist.data.beton import FIELD, HEADER, SAMPLE

    index = [np.fromfile(path, SAMPLE, p.count, offset=HEADER.itemsize + 3 * FIELD.itemsize)["index"] for path, p in prepared.files.items()]
    assert np.concatenate(index).tolist() == good
    pixels = images.permute(0, 2, 3, 1).numpy().astype(np.float64) / 255
    np.testing.assert_allclose(prepared.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(prepared.std, pixels.std((0, 1, 2)), rtol=1e-12)
    assert Prepared.open(prepared.path) == prepared == prepare_holiday(root, tmp_path / "out", on_bad_image="skip")


@pytest.mark.usefixtures("small_parts")
def test_what_was_finished_before_an_error_is_not_written_again(tmp_path, written):
    root = holiday(tmp_path, COUNT)
    names = sorted(path.name for path in (root / "holiday").iterdir())
    whole = (root / "holiday" / names[30]).read_bytes()
    (root / "holiday" / names[30]).write_bytes(b"x" * len(whole))  # the size, which the fingerprint is of, stays
    with pytest.raises(DataError, match=f"{names[30]}: cannot be decoded"):
        prepare_holiday(root, tmp_path / "out")
    assert len(written) == 5 and not list((tmp_path / "out").glob("*-crop-????????????.json"))
    written.clear()
    (root / "holiday" / names[30]).write_bytes(whole)
    prepared = prepare_holiday(root, tmp_path / "out")
    assert written == [path.name for path in prepared.files][4:] and prepared.count == COUNT
    assert stored(prepared)[0] == stored(prepare_holiday(root, tmp_path / "anew"))[0]


COMMAND = """
import sys
from pathlib import Path
from krrst_dist.data import part, prepare
prepare.PART_BYTES = 7 * 16 * 16 * 3 + 1
write_beton, left = part.write_beton, [3]
def slow(*items, **how):
    left[0] -= 1
    if left[0] == 0:
        print("in the third", flush=True)
        import time; time.sleep(60)
    write_beton(*items, **how)
part.write_beton = slow
prepare.prepare("folder:holiday", "train", root=Path(sys.argv[1]), directory=Path(sys.argv[2]), resolution=16)
"""


@pytest.mark.usefixtures("small_parts")
def test_a_killed_run_is_gone_on_with_at_the_part_it_was_in(tmp_path, written):
    root = holiday(tmp_path, COUNT)
    killed = subprocess.Popen([sys.executable, "-c", COMMAND, str(root), str(tmp_path / "out")], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert killed.stdout.readline() == "in the third\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    start = time.time()
    prepared = prepare_holiday(root, tmp_path / "out")
    assert written == [path.name for path in prepared.files][2:]
    assert all((path.stat().st_mtime > start) == (path.name in written) for path in prepared.files)
    assert visible(tmp_path / "out") == sorted([prepared.path.name, *(path.name for path in prepared.files)])


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_is_refused_by_its_name_and_is_the_only_one_written_anew(tmp_path, written):
    root = holiday(tmp_path, COUNT)
    prepared = prepare_holiday(root, tmp_path / "out")
    path = list(prepared.files)[4]
    whole = path.read_bytes()
    place = whole.index(stored(prepared)[0][30])
    for wrong, complaint in [(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:], "damaged: its bytes are not those"),
                             (whole[:-9], "truncated, or another file"), (None, "not there; run `krrst prepare`")]:
        path.unlink() if wrong is None else path.write_bytes(wrong)
        with pytest.raises(DataError, match=f"{path.name}: .*{complaint}|{path.name}: {complaint}"):
            Prepared.open(prepared.path)
        written.clear()
        assert prepare_holiday(root, tmp_path / "out") == prepared
        assert written == [path.name] and path.read_bytes() == whole


@pytest.mark.usefixtures("small_parts")
def test_parts_that_were_exchanged_are_refused(tmp_path):
    prepared = prepare_holiday(holiday(tmp_path, COUNT), tmp_path / "out")
    told = json.loads(prepared.path.read_text())
    told["parts"][1], told["parts"][2] = told["parts"][2], told["parts"][1]
    prepared.path.write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"parts.1.first = 14: the parts before it end at 7"):
        Prepared.open(prepared.path)


@pytest.mark.parametrize(("change", "field"), [
    ({"name": "../../etc/x.beton"}, "name"), ({"name": "/etc/x.beton"}, "name"), ({"name": "a.npy"}, "name"),
    ({"checksum": "none"}, "checksum"), ({"count": -1}, "count"), ({"total": [1, 2]}, "total"),
    ({"squares": [0.5, 1, 1]}, "squares")], ids=str)
def test_a_part_that_cannot_be_is_refused_by_the_field(change, field, tmp_path):
    prepared = prepare_holiday(holiday(tmp_path), tmp_path / "out")
    told = json.loads(prepared.path.read_text())
    told["parts"][0] |= change
    prepared.path.write_text(json.dumps(told))
    with pytest.raises(DataError, match=rf"does not describe a prepared data set \(parts.0.{field}"):
        Prepared.open(prepared.path)


def test_what_an_earlier_version_prepared_is_refused_with_what_to_do_and_prepared_anew(tmp_path, capsys):
    root = holiday(tmp_path)
    prepared = prepare_holiday(root, tmp_path / "out")
    told = json.loads(prepared.path.read_text())
    first = told.pop("parts")[0]
    prepared.path.write_text(json.dumps(told | {key: first[key] for key in ("count", "size", "checksum")} | {"found": 5, "bad_images": []}))
    with pytest.raises(DataError, match=r"\.json: prepared by an earlier version, .* delete it and run `krrst prepare` again"):
        Prepared.open(prepared.path)
    assert prepare_holiday(root, tmp_path / "out", progress=True) == prepared
    assert "preparing anew, as what is there cannot be used: " in capsys.readouterr().err


@pytest.mark.usefixtures("small_parts")
def test_one_line_shows_the_progress_of_all_parts(tmp_path, capsys):
    prepare_holiday(holiday(tmp_path, COUNT), tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert "40/40" in shown and shown.count("\n") == 1

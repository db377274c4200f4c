"""Tar shards as a source: pairs of an image and its class, read where they are in the file."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import pytest
from test_data_sources import colour, encoded, picture

from krrst_dist.data.errors import BadImage, DataError
from krrst_dist.data.prepare import prepare
from krrst_dist.data.reader import read_all
from krrst_dist.data.sources import open_images


def write_tar(path: Path, members: dict[str, bytes | tarfile.TarInfo], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, payload in members.items():
            if isinstance(payload, tarfile.TarInfo):
                archive.addfile(payload)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def pairs(values, labels) -> dict[str, bytes]:
    return {name: payload for value, label in zip(values, labels, strict=True)
            for name, payload in ((f"{value:04d}.png", encoded(value)), (f"{value:04d}.cls", str(label).encode()))}


def test_tar_shards_hold_pairs_of_an_image_and_its_class_and_are_read_in_place(tmp_path):
    write_tar(tmp_path / "pets-train-000000.tar", pairs([10, 20, 30], [1, 0, 2]))
    write_tar(tmp_path / "pets-train-000001.tar", pairs([40, 50], [2, 1]))
    write_tar(tmp_path / "pets" / "val-000000.tar", {"0001.jpg": encoded(60), "0001.json": b"{}", "0001.cls": b"2\n"})
    images = open_images("folder:pets", "train", tmp_path)
    assert [colour(images[i]) for i in range(5)] == [10, 20, 30, 40, 50] and images.labels.tolist() == [1, 0, 2, 2, 1]
    assert images.class_names == ("0", "1", "2") and images[3].where.endswith("pets-train-000001.tar, member 0040.png")
    test = open_images("folder:pets", "test", tmp_path)
    assert (len(test), colour(test[0]), test.labels.tolist()) == (1, 60, [2])
    part = pickle.loads(pickle.dumps(images.some(2, 4)))
    assert [colour(part[i]) for i in range(2)] == [30, 40] and part.labels.tolist() == [2, 2]
    part.require_there()
    write_tar(tmp_path / "pets-train-000001.tar", pairs([40, 50, 60, 70, 80, 90, 99, 100, 101, 102], [2] * 10))
    with pytest.raises(DataError, match="pets-train-000001.tar: .* bytes here, .* where the images were listed"):
        part.require_there()


def test_tar_shards_without_classes_have_none_and_other_images_are_another_fingerprint(tmp_path):
    found = set()
    for values, labels in (([10, 20], None), ([10, 20], [0, 1]), ([10, 20], [1, 0]), ([10, 20, 30], [1, 0, 0])):
        members = pairs(values, labels or values)
        path = write_tar(tmp_path / "pets-000000.tar", members if labels else {k: v for k, v in members.items() if k.endswith("png")})
        images = open_images("folder:pets", "train", tmp_path)
        assert images.labelled == (labels is not None)
        found.add(images.fingerprint)
        path.unlink()
    assert len(found) == 4


def test_what_a_member_of_a_tar_is_called_or_links_to_leads_nowhere(tmp_path):
    link = tarfile.TarInfo("0003.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tmp_path / "data" / "pets-train-000000.tar", {"../../escaped.png": encoded(10), "/absolute.png": encoded(20), "": link})
    before = sorted(tmp_path.rglob("*"))
    images = open_images("folder:pets", "train", tmp_path / "data")
    assert [colour(images[i]) for i in range(2)] == [10, 20] and sorted(tmp_path.rglob("*")) == before
    with pytest.raises(BadImage, match=r"member 0003.png: cannot be decoded \(a link, device or sparse file, not a plain one\)"):
        images[2]


@pytest.mark.parametrize(("members", "complaint"), [
    ({"1.png": encoded(), "1.cls": b"cat"}, r"member 1.cls: b'cat' is not the number of a class"),
    ({"1.png": encoded(), "1.cls": b"1" * 10**6}, r"member 1.cls: b'1+' is not the number"),
    ({"1.png": encoded(), "1.cls": b"-2"}, "label -2"),
    ({"1.png": encoded(), "1.cls": b"1000000"}, "label 1000000 is too high for the number of a class"),
    ({"1.png": encoded(), "2.png": encoded(), "2.cls": b"0"}, "member 1.png: has no .cls beside it, though others have"),
    ({"1.png": encoded(), "1.jpg": encoded()}, "member 1.jpg: 1.png has the same name up to its ending"),
    ({"1.txt": b"text"}, "holds no images")], ids=["word", "long", "negative", "high", "missing", "twice", "none"])
def test_members_of_a_tar_that_make_no_sense_are_refused_by_name(members, complaint, tmp_path):
    write_tar(tmp_path / "pets-train-000000.tar", members)
    with pytest.raises(DataError, match=complaint):
        open_images("folder:pets", "train", tmp_path)


def test_shards_that_are_missing_cut_short_or_compressed_are_refused(tmp_path):
    one, other = (write_tar(tmp_path / f"pets-train-{i:06d}.tar", pairs([10, 20], [0, 1])) for i in (0, 2))
    with pytest.raises(DataError, match="000002.tar: shard 2 where 1 is expected; .* complete the copy"):
        open_images("folder:pets", "train", tmp_path)
    other.unlink()
    whole = one.read_bytes()
    for length in (0, 300, 700, 1024, 1200, 1536):
        one.write_bytes(whole[:length])
        with pytest.raises(DataError, match="000000.tar: (cannot be read as a tar .*|cut short, .*); get the file again"):
            open_images("folder:pets", "train", tmp_path)
    write_tar(one, pairs([10], [0]), "w:gz")
    with pytest.raises(DataError, match="cannot be read as a tar that is not compressed"):
        open_images("folder:pets", "train", tmp_path)


def test_tar_shards_are_prepared_as_the_same_images_in_a_folder_are(tmp_path):
    members = {name: picture(tmp_path / name, int(name[:4])).read_bytes() if name.endswith("png") else payload
               for name, payload in pairs([10, 60, 200], [1, 0, 1]).items()}
    write_tar(tmp_path / "tar" / "pets-train-000000.tar", members)
    for name, payload in members.items():
        if name.endswith("png"):
            file = tmp_path / "files" / "pets" / "train" / "ba"[name != "0060.png"] / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(payload)
    both = [prepare("folder:pets", "train", root=tmp_path / kind, directory=tmp_path / "out", resolution=8, resize="squash", progress=False)
            for kind in ("tar", "files")]
    assert both[0].count == both[1].count == 3 and (both[0].mean, both[0].std) == (both[1].mean, both[1].std)
    order = [0, 2, 1]  # in the folder by class
    assert (read_all(both[0], order)[0] == read_all(both[1], [0, 1, 2])[0]).all()

"""What a user takes home: the distilled set as one file, in other programs' formats, and the authors' files read back; on any storage."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import krrst_dist
from krrst_dist import cli, exports, storage
from krrst_dist.artifacts import ArtifactError, DistilledSet, Space
from krrst_dist.data import sources
from krrst_dist.sheets import to_pixels
from krrst_dist.storage import StorageError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RECIPE = {"name": "krr_st", "steps": 4000, "lr": 0.1}


def distilled(*, kind: str = "normalised", m: int = 4, k: int = 6, channels: int = 3) -> DistilledSet:
    """Small random images, some values beyond black and white."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (m, channels, 8, 8)).astype(np.float32)
    space = Space(kind, MEAN[:channels], STD[:channels])
    y = rng.normal(0, 1, (m, k)).astype(np.float32)
    return DistilledSet(x, y, "features", RECIPE, space, ("a", "b"), {"seed": 3, "commit": "c0ffee"})


@pytest.fixture(params=["disk", "file URI", "object store"])
def place(request, tmp_path) -> str:
    """A folder on each kind of storage; the object store keeps its objects in this process's memory."""
    if request.param == "object store":
        return f"fsspec+memory://{uuid.uuid4().hex}/folder"
    return str(tmp_path) if request.param == "disk" else f"file://{tmp_path}"


def test_a_set_comes_back_as_it_was_saved(place):
    saved = distilled()
    uri = storage.join(place, "new", "set.safetensors")
    saved.save(uri)
    loaded = DistilledSet.load(uri)
    assert np.array_equal(loaded.x_syn, saved.x_syn) and np.array_equal(loaded.y_syn, saved.y_syn)
    assert (loaded.label_kind, loaded.space, loaded.recipe, loaded.class_names, loaded.metadata) == \
        ("features", saved.space, RECIPE, ("a", "b"), saved.metadata)
    assert loaded.fingerprint == saved.fingerprint
    assert storage.list_names(storage.join(place, "new")) == ["set.safetensors"]


def test_one_line_gives_a_data_set_for_a_data_loader(tmp_path):
    saved = distilled()
    saved.save(tmp_path / "set.safetensors")
    x, y = next(iter(torch.utils.data.DataLoader(krrst_dist.load(str(tmp_path / "set.safetensors")), batch_size=4)))
    assert x.dtype == y.dtype == torch.float32
    assert np.array_equal(x, saved.x_syn) and np.array_equal(y, saved.y_syn)


def test_class_labels_are_whole_numbers(tmp_path):
    labels = np.array([0, 1, 1, 0])
    replace(distilled(), y_syn=labels, label_kind="class").save(tmp_path / "set.safetensors")
    assert krrst_dist.load(str(tmp_path / "set.safetensors")).tensors[1].tolist() == [0, 1, 1, 0]


def test_a_set_can_be_read_without_this_package(tmp_path):
    saved = distilled()
    saved.save(tmp_path / "set.safetensors")
    assert np.array_equal(load_file(tmp_path / "set.safetensors")["x_syn"], saved.x_syn)


def test_the_fingerprint_changes_with_all_that_training_depends_on():
    one = distilled()
    others = [replace(one, x_syn=one.x_syn + 1), replace(one, y_syn=one.y_syn + 1), replace(one, recipe=RECIPE | {"lr": 0.2}),
              replace(one, space=Space("raw", MEAN, STD)), replace(one, label_kind="soft")]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert replace(one, metadata={}, class_names=None).fingerprint == one.fingerprint


@pytest.mark.parametrize(("change", "complaint"), [
    ({"x_syn": np.zeros((4, 3, 8, 8))}, "float64; it must be [m, C, H, W] float32"),
    ({"x_syn": np.zeros((4, 3, 8), np.float32)}, "x_syn has shape (4, 3, 8)"),
    ({"y_syn": np.zeros((3, 6), np.float32)}, "4 images but 3 labels"),
    ({"y_syn": np.zeros(4, np.int64)}, "label kind 'features' takes 2 dimension(s) of float32"),
    ({"label_kind": "class"}, "label kind 'class' takes 1 dimension(s) of int64"),
    ({"space": Space("raw", (0.5,), (0.2,))}, "the space has 1 channels, the images 3"),
    ({"y_syn": np.full((4, 6), np.nan, np.float32)}, "NaN or infinite values"),
    ({"label_kind": "fuzzy"}, "the label kind is 'fuzzy'; it must be one of features, soft, class, none"),
    ({"label_kind": "none"}, "y_syn has shape (4, 6); label kind 'none' takes 0 columns, 'features' and 'soft' at least 1"),
    ({"y_syn": np.zeros((4, 0), np.float32)}, "y_syn has shape (4, 0); label kind 'none' takes 0 columns"),
    ({"recipe": ["lr"]}, "both must be dicts"),
    ({"class_names": "ab"}, "the class names are 'ab'; they must be a tuple of texts"),
])
def test_arrays_that_do_not_fit_together_are_refused(change, complaint):
    with pytest.raises(ArtifactError) as refused:
        replace(distilled(), **change)
    assert complaint in str(refused.value)


@pytest.mark.parametrize(("kind", "mean", "std", "complaint"), [
    ("lab", MEAN, STD, "the space is 'lab'; it must be one of normalised, raw"),
    ("raw", MEAN, (0.2, 0.0, 0.2), "must be finite numbers, std above 0"),
    ("raw", MEAN, (0.2, -0.1, 0.2), "must be finite numbers, std above 0"),
    ("raw", MEAN, (0.2, np.nan, 0.2), "must be finite numbers, std above 0"),
    ("raw", (np.inf, 0.4, 0.3), STD, "must be finite numbers, std above 0"),
    ("raw", ("half", 0.4, 0.3), STD, "must be finite numbers, std above 0"),
])
def test_a_space_that_cannot_be_is_refused(kind, mean, std, complaint):
    with pytest.raises(ArtifactError, match=complaint):
        Space(kind, mean, std)


@pytest.mark.parametrize("change", [
    *({key: None} for key in ("label_kind", "recipe", "space", "class_names", "metadata")),
    *({key: "mangled"} for key in ("label_kind", "recipe", "space", "class_names", "metadata")),
    {"space": "[]"}, {"space": '{"kind": "raw"}'}, {"space": '{"kind": "raw", "mean": 3, "std": 3}'},
    {"space": '{"kind": "raw", "mean": ["a", "b", "c"], "std": [1, 1, 1]}'}, {"recipe": "[]"}, {"class_names": '"cat"'},
    {"class_names": "[1, 2]"}, {"metadata": "3"},
], ids=str)
def test_a_set_whose_metadata_was_mangled_is_refused_by_its_file(tmp_path, change):
    file = tmp_path / "set.safetensors"
    distilled().save(file)
    with safe_open(file, "np") as opened:
        about = {key: value for key, value in (opened.metadata() | change).items() if value is not None}
    save_file(load_file(file), file, about)
    with pytest.raises(ArtifactError, match="set.safetensors is damaged or was changed by hand .*; restore it"):
        DistilledSet.load(file)


@pytest.mark.parametrize("tensors", [{"x_syn": distilled().x_syn}, {"x_syn": distilled().x_syn, "y_syn": np.zeros((4, 6))}],
                         ids=["no y_syn", "y_syn of another type"])
def test_a_set_whose_tensors_were_mangled_is_refused_by_its_file(tmp_path, tensors):
    file = tmp_path / "set.safetensors"
    distilled().save(file)
    with safe_open(file, "np") as opened:
        save_file(tensors, file, opened.metadata())
    with pytest.raises(ArtifactError, match="set.safetensors is damaged or was changed by hand .*y_syn"):
        DistilledSet.load(file)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    file = tmp_path / "distilled.safetensors"
    distilled().save(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="distilled.safetensors is truncated or no safetensors file"):
        krrst_dist.load(str(file))


def test_another_file_is_refused_and_the_authors_files_are_pointed_to_import(tmp_path):
    save_file({"x_syn": distilled().x_syn}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match="not a distilled set of this package.*krrst import"):
        DistilledSet.load(tmp_path / "foreign.safetensors")
    with pytest.raises(FileNotFoundError):
        DistilledSet.load(tmp_path / "nothing.safetensors")


def test_a_space_leads_to_pixels_and_back():
    pixels = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    space = Space("normalised", MEAN, STD)
    x = space.from_pixels(pixels)
    assert np.allclose(x[:, 1], (pixels[:, 1] - 0.4) / 0.25) and np.allclose(space.to_pixels(x), pixels, atol=1e-6)
    assert space.scale().ravel().tolist() == np.float32(STD).tolist()
    raw = Space("raw", MEAN, STD)
    assert np.array_equal(raw.from_pixels(pixels), pixels) and raw.scale().ravel().tolist() == [1, 1, 1]


def test_a_png_folder_holds_the_pictures_and_the_exact_arrays(tmp_path, capsys):
    saved = distilled()
    saved.save(tmp_path / "set.safetensors")
    assert cli.main(["export", "--path", str(tmp_path / "set.safetensors"), "--to", str(tmp_path / "png")]) == 0
    assert "4 images written" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "00003.png", "about.json", "x_syn.npy", "y_syn.npy"]
    shown = np.asarray(Image.open(tmp_path / "png" / "00002.png"))
    pixels = saved.x_syn[2] * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]
    assert np.abs(shown.transpose(2, 0, 1) - 255 * np.clip(pixels, 0, 1)).max() <= 0.51
    assert np.array_equal(np.load(tmp_path / "png" / "x_syn.npy"), saved.x_syn)
    about = json.loads((tmp_path / "png" / "about.json").read_text())
    assert (about["recipe"], about["metadata"]["commit"], about["space"]["kind"]) == (RECIPE, "c0ffee", "normalised")


def test_images_of_one_channel_become_gray_pictures(tmp_path):
    exports.to_png_folder(distilled(channels=1), tmp_path)
    assert Image.open(tmp_path / "00000.png").mode == "L"


def test_a_parquet_table_holds_a_row_an_image_with_the_exact_values(place):
    saved, uri = distilled(), storage.join(place, "set.parquet")
    exports.to_parquet(saved, uri)
    table = pq.read_table(io.BytesIO(storage.read_whole(uri)))
    about = json.loads(table.schema.metadata[b"krrst_dist"])
    rows = table.to_pylist()
    assert np.array_equal(np.array([row["x_syn"] for row in rows], np.float32).reshape(about["shape"]), saved.x_syn)
    assert np.array_equal(np.array([row["y_syn"] for row in rows], np.float32), saved.y_syn)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(rows[1]["image"]["bytes"]))), to_pixels(saved.x_syn, saved.space)[1])
    assert about["recipe"] == RECIPE and about["label_kind"] == "features"


def test_the_format_is_told_by_the_ending_unless_it_is_named(tmp_path):
    distilled().save(tmp_path / "set.safetensors")
    exports.export(str(tmp_path / "set.safetensors"), str(tmp_path / "out.parquet"))
    exports.export(str(tmp_path / "set.safetensors"), str(tmp_path / "out"))
    assert len(pq.read_table(tmp_path / "out.parquet")) == 4 and (tmp_path / "out" / "00003.png").exists()


def test_class_labels_survive_in_parquet(tmp_path):
    exports.to_parquet(replace(distilled(), y_syn=np.arange(4), label_kind="class"), tmp_path / "set.parquet")
    assert pq.read_table(tmp_path / "set.parquet")["y_syn"].to_pylist() == [0, 1, 2, 3]


def test_a_set_without_labels_has_empty_ones_in_every_format(tmp_path):
    saved = replace(distilled(), y_syn=np.zeros((4, 0), np.float32), label_kind="none")
    saved.save(tmp_path / "set.safetensors")
    assert krrst_dist.load(str(tmp_path / "set.safetensors")).tensors[1].shape == (4, 0)
    exports.to_parquet(saved, tmp_path / "set.parquet")
    assert pq.read_table(tmp_path / "set.parquet")["y_syn"].to_pylist() == [[]] * 4
    exports.to_png_folder(saved, tmp_path / "png")
    assert np.load(tmp_path / "png" / "y_syn.npy").shape == (4, 0)


def authors_files(folder: Path, x: torch.Tensor, y: torch.Tensor) -> list[str]:
    torch.save(x, folder / "x_syn.pt")
    torch.save(y, folder / "y_syn.pt")
    return ["--x-syn", str(folder / "x_syn.pt"), "--y-syn", str(folder / "y_syn.pt"), "--to", str(folder / "set.safetensors")]


def test_the_authors_files_are_imported_with_their_preset_and_exported_again(tmp_path):
    x, y = torch.rand(5, 3, 32, 32), torch.rand(5, 512)
    arguments = authors_files(tmp_path, torch.nn.Parameter(x), y.double())
    assert cli.main(["import", *arguments]) == 0
    loaded = DistilledSet.load(tmp_path / "set.safetensors")
    assert np.array_equal(loaded.x_syn, x) and np.array_equal(loaded.y_syn, y)
    known = sources.spec("cifar100")
    assert loaded.space == Space("raw", known.mean, known.std) and loaded.label_kind == "features"
    assert (loaded.recipe["loss"], loaded.recipe["steps"], loaded.metadata["preset"]) == ("mse", 4000, "cifar100-released")
    assert loaded.metadata["imported_from"] == [str(tmp_path / "x_syn.pt"), str(tmp_path / "y_syn.pt")]
    exports.export(str(tmp_path / "set.safetensors"), str(tmp_path / "again"), "pt")
    assert torch.equal(torch.load(tmp_path / "again" / "x_syn.pt", weights_only=True), x)
    assert torch.equal(torch.load(tmp_path / "again" / "y_syn.pt", weights_only=True), y)


@pytest.mark.parametrize("label_kind", ["features", "class", "none"])
@pytest.mark.parametrize("kind", ["normalised", "raw"])
def test_a_set_exported_to_pt_is_imported_as_it_was(tmp_path, capsys, kind, label_kind):
    saved = distilled(kind=kind)
    if label_kind == "class":
        saved = replace(saved, y_syn=np.array([0, 1, 1, 0]), label_kind="class")
    if label_kind == "none":
        saved = replace(saved, y_syn=np.zeros((4, 0), np.float32), label_kind="none")
    saved.save(tmp_path / "set.safetensors")
    assert cli.main(["export", str(tmp_path / "set.safetensors"), str(tmp_path / "pt"), "--format", "pt"]) == 0
    said = capsys.readouterr().out
    assert ("the authors' code would take it for raw pixels" in said) == (kind == "normalised")
    assert ("y_syn.pt is empty" in said) == (label_kind == "none")
    assert sorted(path.name for path in (tmp_path / "pt").iterdir()) == ["about.json", "x_syn.pt", "y_syn.pt"]
    files = [str(tmp_path / "pt" / name) for name in ("x_syn.pt", "y_syn.pt")]
    assert cli.main(["import", *files, str(tmp_path / "back.safetensors")]) == 0
    loaded = DistilledSet.load(tmp_path / "back.safetensors")
    assert loaded.fingerprint == saved.fingerprint and np.array_equal(loaded.x_syn, saved.x_syn)
    assert (loaded.space, loaded.class_names, loaded.recipe) == (saved.space, saved.class_names, saved.recipe)
    assert loaded.metadata == saved.metadata | {"imported_from": files}


def test_pt_files_come_back_from_any_storage(place):
    exports.to_pt(distilled(), place)
    loaded = exports.from_exported(storage.join(place, "x_syn.pt"), storage.join(place, "y_syn.pt"))
    assert loaded.fingerprint == distilled().fingerprint


def exported(folder: Path) -> list[str]:
    exports.to_pt(distilled(), folder)
    return [str(folder / "x_syn.pt"), str(folder / "y_syn.pt"), str(folder / "set.safetensors")]


def test_other_files_beside_an_about_json_are_refused(tmp_path, capsys):
    arguments = exported(tmp_path)
    torch.save(torch.rand(4, 3, 8, 8), tmp_path / "x_syn.pt")
    assert cli.main(["import", *arguments]) == 1
    assert "about.json belongs to other files than" in capsys.readouterr().err
    assert not (tmp_path / "set.safetensors").exists()


@pytest.mark.parametrize(("text", "wrong"), [("{", "Expecting"), ("[]", "list indices"), ("{}", "'space' is missing"), (None, "'fuzzy'")])
def test_an_about_json_that_is_damaged_or_of_another_program_is_refused(tmp_path, capsys, text, wrong):
    arguments, about = exported(tmp_path), tmp_path / "about.json"
    about.write_text(about.read_text().replace('"features"', '"fuzzy"') if text is None else text)
    assert cli.main(["import", *arguments]) == 1
    said = capsys.readouterr().err
    assert "about.json is not what `krrst export --format pt` wrote" in said and wrong in said and "move that file away" in said


def test_a_preset_for_files_that_say_what_they_are_is_refused(tmp_path, capsys):
    assert cli.main(["import", *exported(tmp_path), "--preset", "cifar100-released"]) == 1
    assert "preset = 'cifar100-released'" in capsys.readouterr().err


def test_without_an_about_json_images_that_are_no_raw_pixels_are_refused(tmp_path, capsys):
    known = sources.spec("cifar100")
    pixels = np.random.default_rng(0).random((5, 3, 32, 32)).astype(np.float32)
    normalised = Space("normalised", known.mean, known.std).from_pixels(pixels)
    for x in (normalised, pixels * 255):
        assert cli.main(["import", *authors_files(tmp_path, torch.from_numpy(x), torch.rand(5, 512))]) == 1
        said = capsys.readouterr().err
        assert "x_syn.pt holds values from" in said and "no raw pixels in [0, 1]; divide pixels of 0 to 255 by 255" in said
        assert not (tmp_path / "set.safetensors").exists()


def test_the_authors_never_clip_so_a_few_values_beyond_black_and_white_are_taken(tmp_path):
    x = torch.rand(5, 3, 32, 32)
    x[0, 0] = 3
    assert cli.main(["import", *authors_files(tmp_path, x, torch.rand(5, 512))]) == 0


def test_authors_files_of_half_precision_become_float32(tmp_path):
    x, y = torch.rand(5, 3, 32, 32).bfloat16(), torch.rand(5, 512).half()
    assert cli.main(["import", *authors_files(tmp_path, x, y)]) == 0
    loaded = DistilledSet.load(tmp_path / "set.safetensors")
    assert np.array_equal(loaded.x_syn, x.float()) and np.array_equal(loaded.y_syn, y.float())


@pytest.mark.parametrize(("x", "y", "flags", "complaint"), [
    (torch.zeros(5, 3, 32, 32).to_sparse(), torch.zeros(5, 512), [], "x_syn.pt holds a tensor of torch.float32 and torch.sparse_coo"),
    (torch.zeros(5, 3, 32, 32), torch.zeros(5, 512, dtype=torch.cfloat), [], "y_syn.pt holds a tensor of torch.complex64"),
    (torch.zeros(5, 3, 32, 32), torch.zeros(5, 2048), [], "its targets 512 dimensions"),
    (torch.zeros(5, 3, 64, 64), torch.zeros(5, 512), [], "its images have 32 px"),
    (torch.zeros(5, 3, 32, 32), torch.zeros(4, 512), [], "5 images but 4 labels"),
    (torch.zeros(5, 3, 32, 32), torch.full((5, 512), float("nan")), [], "NaN or infinite"),
    ({"x": torch.zeros(5)}, torch.zeros(5, 512), [], "x_syn.pt holds a dict; one tensor is expected"),
    (torch.zeros(5, 3, 32, 32), torch.zeros(5, 512), ["--preset", "quickstart"], "statistics of digits-0-4 are not published"),
    (torch.zeros(5, 3, 32, 32), torch.zeros(5, 512), ["--preset", "cifr100"], "did you mean 'cifar100'?"),
])
def test_files_that_do_not_belong_together_are_refused(tmp_path, capsys, x, y, flags, complaint):
    assert cli.main(["import", *authors_files(tmp_path, x, y), *flags]) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "set.safetensors").exists()


class Hostile:
    """Pickled, it is a call."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pt_file_with_code_in_it_is_refused_and_not_run(tmp_path, write, capsys):
    arguments = authors_files(tmp_path, torch.zeros(5, 3, 32, 32), torch.zeros(5, 512))
    write(Hostile(tmp_path / "hacked"), tmp_path / "y_syn.pt")
    assert cli.main(["import", *arguments]) == 1
    assert "y_syn.pt is not a tensor file that can be read without running code" in capsys.readouterr().err
    assert not (tmp_path / "hacked").exists() and not (tmp_path / "set.safetensors").exists()
    pickle.loads(pickle.dumps(Hostile(tmp_path / "hacked")))
    assert (tmp_path / "hacked").exists()  # it would have


def test_a_missing_file_is_one_sentence(tmp_path, capsys):
    assert cli.main(["export", "--path", str(tmp_path / "nothing.safetensors"), "--to", str(tmp_path / "png")]) == 1
    assert "nothing.safetensors" in capsys.readouterr().err


# storage


def test_files_are_written_read_listed_and_deleted_on_any_storage(place):
    uri = storage.join(place, "a", "b.bin")
    assert not storage.exists(uri) and storage.list_names(storage.join(place, "a")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_whole(uri)
    storage.check_writable(storage.join(place, "a"))
    for payload in (b"one", b"two two"):
        storage.write_whole(uri, payload)
        assert storage.read_whole(uri) == payload
    storage.copy(uri, storage.join(place, "a", "c.bin"))
    assert storage.read_whole(storage.join(place, "a", "c.bin")) == b"two two"
    assert storage.exists(storage.join(place, "a")) and storage.list_names(storage.join(place, "a")) == ["b.bin", "c.bin"]
    storage.delete_tree(storage.join(place, "a"))
    storage.delete_tree(storage.join(place, "a"))
    assert not storage.exists(uri)


def test_files_travel_between_a_disk_and_an_object_store(tmp_path):
    remote = f"fsspec+memory://{uuid.uuid4().hex}/x.bin"
    (tmp_path / "x.bin").write_bytes(b"x" * 100_000)
    storage.copy(tmp_path / "x.bin", remote)
    storage.copy(remote, tmp_path / "new" / "y.bin")
    assert (tmp_path / "new" / "y.bin").read_bytes() == b"x" * 100_000
    assert fsspec.filesystem("memory").size(remote.removeprefix("fsspec+memory://")) == 100_000


def test_a_local_path_is_known_as_such():
    assert storage.local_path("a/b") == storage.local_path(Path("a/b")) == Path("a/b")
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("file://localhost/a/b") == Path("/a/b")
    assert storage.local_path("s3://bucket/a") is None
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "x.bin"
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError), storage.atomic_path(file) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("the power is gone")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("uri", ["file://rel/run", "file://run", "file://"])
def test_a_file_uri_without_an_absolute_path_is_refused(uri):
    with pytest.raises(StorageError, match=f"'{uri}': a file URI gives an absolute path .* file:///folder/run"):
        storage.write_whole(uri, b"")


def test_sizes_are_said_in_a_unit_that_fits():
    assert [storage.in_words(size) for size in (12, 3840, 999_600_000, 15_700_000_000)] == ["12 bytes", "3.8 kB", "1000 MB", "16 GB"]


WRITER = """
import sys
from pathlib import Path
from krrst_dist import storage
with storage.atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    print(temporary, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_goes_with_the_next_write_and_a_living_writers_file_stays(tmp_path):
    file = tmp_path / "x.bin"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for _ in range(2)]
    dead, living = (Path(writer.stdout.readline().strip()) for writer in writers)
    writers[0].kill()
    writers[0].communicate()
    storage.write_whole(file, b"at once")
    assert dead.exists()  # on file systems that keep locks to the node it might be written on another one
    for temporary in (dead, living):
        os.utime(temporary, (time.time() - 120,) * 2)
    storage.write_whole(tmp_path / "another.bin", b"")
    assert dead.exists()
    storage.write_whole(file, b"later")
    assert not dead.exists() and living.exists()
    writers[1].communicate()
    assert file.read_bytes() == b"half" and sorted(os.listdir(tmp_path)) == ["another.bin", "x.bin"]


def test_a_temporary_file_that_is_a_day_old_goes_with_any_write_beside_it(tmp_path):
    for hours in (23, 25):
        left = tmp_path / f".partial-{uuid.uuid4().hex}-{hours}.bin"
        left.touch()
        os.utime(left, (time.time() - 3600 * hours,) * 2)
    storage.write_whole(tmp_path / "x.bin", b"")
    assert [name.rpartition("-")[2] for name in sorted(os.listdir(tmp_path))] == ["23.bin", "x.bin"]


def test_a_writer_whose_clock_is_a_day_ahead_takes_no_fresh_file_for_a_left_one(tmp_path, monkeypatch):
    fresh = tmp_path / f".partial-{uuid.uuid4().hex}-another.bin"
    fresh.touch()
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + 90_000)
    storage.write_whole(tmp_path / "x.bin", b"")
    assert fresh.exists()


def test_a_half_written_file_is_not_listed(tmp_path):
    with storage.atomic_path(tmp_path / "x.bin") as temporary:
        temporary.write_bytes(b"half")
        assert storage.list_names(tmp_path) == []
    assert storage.list_names(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("uri", ["{tmp}/file/below/x.bin", "file://{tmp}/file/x.bin", "nonsense://bucket/x.bin"])
def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path, uri):
    (tmp_path / "file").write_bytes(b"in the way")
    uri = uri.format(tmp=tmp_path)
    with pytest.raises(StorageError) as refused:
        storage.check_writable(uri.removesuffix("/x.bin"))
    assert uri.removesuffix("/x.bin") in str(refused.value) and "check the path, its permissions and the free space" in str(refused.value)
    with pytest.raises(StorageError):
        storage.copy(tmp_path / "file", uri)
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full_leaves_no_half_written_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; check the path, its permissions and the free space"):
        distilled().save(tmp_path / "set.safetensors")
    assert os.listdir(tmp_path) == []


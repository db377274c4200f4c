"""Where data sets are found and how their images are read: real Parquet files, and small copies of each published layout."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from krrst_dist.config import ConfigError
from krrst_dist.data import layouts, sources
from krrst_dist.data.errors import BadImage, DataError
from krrst_dist.data.images import resize, to_rgb
from krrst_dist.data.sources import open_images
from krrst_dist.torchvision_ops import torchvision

RNG = np.random.default_rng(0)


def picture(path: Path, value: int = 100) -> Path:
    """A small one-coloured image file, whose colour tells it from others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (value, value, value)).save(path)
    return path


def encoded(value: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, images: list[bytes | None], labels: list[int | None] | None, names: list[str] | None = None,
                  **options) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([{"bytes": payload, "path": None} for payload in images], kind)}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"class_names": json.dumps(names)} if names else None), path, **options)


def colour(item) -> int:
    """The red of an image's first pixel."""
    return to_rgb(item.image).getpixel((0, 0))[0]


# --- the registry


def test_an_unknown_data_set_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset = 'cifra100': no such data set; did you mean 'cifar100'\?"):
        open_images("cifra100", "train", tmp_path)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="split = 'val': must be train or test"):
        open_images("cifar100", "val", tmp_path)


@pytest.mark.parametrize("name", [name for name in sources.names() if not name.startswith("digits")])
def test_where_nothing_is_found_every_place_is_named(name, tmp_path):
    with pytest.raises(DataError) as caught:
        open_images(name, "test", tmp_path)
    message = str(caught.value)
    places = [place for layout in sources.spec(name).layouts for place in layout.places(tmp_path, name, "test")]
    assert len(places) >= 8 and all(str(place) in message for place in places)
    assert f"{name}, test: no images found" in message


def test_a_data_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=f"there is no folder {tmp_path}/nowhere"):
        open_images("cifar10", "train", tmp_path / "nowhere")


# --- Parquet


def test_real_cifar100_is_read_from_parquet(shared_data):
    images = open_images("cifar100", "test", shared_data)
    assert len(images) == 10_000 and images.labelled and len(images.class_names) == 100
    assert (np.bincount(images.labels) == 100).all()
    item = images[9_999]
    assert item.image.size == (32, 32) and item.label == images.labels[9_999]
    assert item.where == f"{shared_data / 'cifar100-test.parquet'}, row 9999"


def test_the_imagenet_sample_stands_for_both_splits_until_there_is_a_better_file(shared_data, tmp_path):
    train, test = (open_images("imagenet", split, shared_data) for split in ("train", "test"))
    assert len(train) == len(test) == 60 and len(train.class_names) == 1000
    assert {train[i].image.mode for i in range(60)} == {"RGB", "L"}

    (tmp_path / "imagenet-sample.parquet").symlink_to(shared_data / "imagenet-sample.parquet")
    write_parquet(tmp_path / "imagenet-val.parquet", [encoded()], [7], [str(c) for c in range(1000)])
    assert len(open_images("imagenet", "test", tmp_path)) == 1
    assert len(open_images("imagenet", "train", tmp_path)) == 60


def test_the_validation_images_of_tinyimagenet_are_its_test_split(shared_data):
    images = open_images("tinyimagenet", "test", shared_data)
    assert len(images) == 5_000 and "tinyimagenet-val-5k.parquet, row 0" in images[0].where


def test_shards_and_row_groups_are_read_in_order_and_rows_are_counted_within_their_file(tmp_path):
    for shard in range(2):
        write_parquet(tmp_path / "cifar10" / "data" / f"train-{shard:05d}-of-00002.parquet",
                      [encoded(10 * shard + i) for i in range(7)], [i for i in range(7)], [str(c) for c in range(10)], row_group_size=2)
    images = open_images("cifar10", "train", tmp_path)
    assert [colour(images[i]) for i in range(14)] == [*range(7), *range(10, 17)]
    assert [colour(images[i]) for i in (13, 0, 8)] == [16, 0, 11]  # row groups come back after others pushed them out
    assert images.where(8).endswith("train-00001-of-00002.parquet, row 1")


def test_a_missing_shard_is_noticed(tmp_path):
    write_parquet(tmp_path / "cifar10-train-00000-of-00002.parquet", [encoded()], [0], [str(c) for c in range(10)])
    with pytest.raises(DataError, match="1 shards, though cifar10-train-00000-of-00002.parquet is one of more"):
        open_images("cifar10", "train", tmp_path)


def test_two_files_that_could_both_be_meant_are_not_guessed_between(tmp_path):
    for part in ("20k", "full"):
        write_parquet(tmp_path / f"tinyimagenet-train-{part}.parquet", [encoded()], [0])
    with pytest.raises(DataError, match="2 files match .*tinyimagenet-train-20k.parquet.* not clear which"):
        open_images("tinyimagenet", "train", tmp_path)


def test_class_names_are_found_where_hugging_face_puts_them(tmp_path):
    table = pa.table({"image": pa.array([{"bytes": encoded(), "path": "a"}]), "label": [1]})
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "pets-train.parquet")
    assert open_images("folder:pets", "train", tmp_path).class_names == ("cat", "dog")


def test_parquet_without_labels_is_unlabelled(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [encoded(3)], None)
    images = open_images("folder:mine", "train", tmp_path)
    assert not images.labelled and images.class_names == () and images[0].label == -1


def test_a_row_that_cannot_be_decoded_is_named(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [encoded(), None, b"no image", encoded()[:45]], [0, 0, 0, 0])
    images = open_images("folder:mine", "train", tmp_path)
    assert images[0].image.size == (9, 7)
    for row in (1, 2, 3):
        with pytest.raises(BadImage, match=f"mine-train.parquet, row {row}: cannot be decoded"):
            images[row]


def test_what_is_wrong_with_a_row_is_said_in_the_same_words_every_time(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [b"no image"], None)
    with pytest.raises(BadImage) as bad:
        open_images("folder:mine", "train", tmp_path)[0]
    assert bad.value.reason == "UnidentifiedImageError: cannot identify image file"
    assert str(pickle.loads(pickle.dumps(bad.value))) == str(bad.value)  # as it travels from another process


def test_a_row_that_is_null_as_a_whole_is_named(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([{"bytes": encoded(), "path": "a"}, None], kind)}), tmp_path / "mine-train.parquet")
    with pytest.raises(BadImage, match="mine-train.parquet, row 1: cannot be decoded .the row holds no bytes"):
        open_images("folder:mine", "train", tmp_path)[1]


def test_bytes_that_are_stored_as_text_are_refused_before_any_image_is_read(tmp_path):
    pq.write_table(pa.table({"image": [{"bytes": "text", "path": "a"}]}), tmp_path / "mine-train.parquet")
    with pytest.raises(DataError, match="mine-train.parquet: no column image: struct<bytes, path>"):
        open_images("folder:mine", "train", tmp_path)


def test_a_shard_that_alone_lacks_labels_is_named(tmp_path):
    for shard, labels in enumerate([[0], None]):
        write_parquet(tmp_path / f"mine-train-{shard:05d}-of-00002.parquet", [encoded()], labels)
    with pytest.raises(DataError, match="mine-train-00001-of-00002.parquet: no column label, though the shards beside it have one"):
        open_images("folder:mine", "train", tmp_path)


@pytest.mark.parametrize("metadata", [
    {"class_names": "not JSON"}, {"class_names": "5"}, {"class_names": "[1, 2]"}, {"class_names": b"\xff"},
    {"huggingface": "[]"}, {"huggingface": '{"info": {"features": {"label": {"names": "ab"}}}}'}], ids=str)
def test_class_names_that_cannot_be_understood_are_refused_by_their_file(metadata, tmp_path):
    table = pa.table({"image": [{"bytes": encoded(), "path": "a"}], "label": [0]})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "mine-train.parquet")
    with pytest.raises(DataError, match=r"mine-train.parquet: its schema's metadata does not give class names .* as a JSON list"):
        open_images("folder:mine", "train", tmp_path)


def test_a_label_that_is_no_class_is_named_before_any_image_is_read(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [b"", b""], [0, -1], ["only"])
    with pytest.raises(DataError, match=r"row 1: label -1 is not one of the 1 classes"):
        open_images("folder:mine", "train", tmp_path)


@pytest.mark.parametrize("label", [2**40, 10**8, 10_000])
def test_a_label_too_high_to_number_a_class_is_named_before_classes_are_made_of_it(tmp_path, label):
    write_parquet(tmp_path / "mine-train.parquet", [b""] * 3, [0, label, 1])
    with pytest.raises(DataError, match=rf"row 1: label {label} is too high .* 3 images .* at most 10000 classes .*; correct it"):
        open_images("folder:mine", "train", tmp_path)


def test_a_few_images_of_many_classes_without_names_are_read(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [b""], [9_999])
    assert len(open_images("folder:mine", "train", tmp_path).class_names) == 10_000


def test_a_negative_label_without_class_names_is_named_with_what_to_do(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [b"", b""], [-1, -1])
    with pytest.raises(DataError, match=r"row 0: label -1 is no class: they are numbered from 0; correct it, or, .* withheld, take one"):
        open_images("folder:mine", "train", tmp_path)


def test_missing_labels_are_refused(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [encoded(), encoded()], [0, None])
    with pytest.raises(DataError, match="column label must be whole numbers without gaps"):
        open_images("folder:mine", "train", tmp_path)


def test_a_file_with_other_columns_or_that_is_no_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"img": [1], "fine_label": [2]}), tmp_path / "cifar100-train.parquet")
    (tmp_path / "cifar100-test.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"no column image: struct<bytes, path> \(columns: img, fine_label\)"):
        open_images("cifar100", "train", tmp_path)
    with pytest.raises(DataError, match="cifar100-test.parquet: cannot be read as Parquet"):
        open_images("cifar100", "test", tmp_path)


def test_the_fingerprint_of_parquet_follows_its_content(tmp_path):
    def fingerprint(value: int) -> str:
        write_parquet(tmp_path / "mine-train.parquet", [encoded(value)], [0])
        return open_images("folder:mine", "train", tmp_path).fingerprint

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


# --- folders


def test_classes_of_an_image_folder_are_numbered_in_sorted_order(tmp_path):
    for c in range(10):
        picture(tmp_path / "cifar10" / "train" / f"class{c}" / "deeper" / "a.png", c)
        picture(tmp_path / "cifar10" / "train" / f"class{c}" / ".hidden.png")
    images = open_images("cifar10", "train", tmp_path)
    assert [(colour(item), item.label) for item in (images[i] for i in range(len(images)))] == [(c, c) for c in range(10)]
    assert images.class_names[3] == "class3" and images[3].where.endswith("cifar10/train/class3/deeper/a.png")


def test_a_folder_with_another_number_of_classes_is_not_taken_for_the_data_set(tmp_path):
    picture(tmp_path / "cifar10" / "train" / "cat" / "a.png")
    with pytest.raises(DataError, match="1 classes, but cifar10 has 10; use folder:NAME"):
        open_images("cifar10", "train", tmp_path)


def test_names_that_are_not_utf8_are_read_and_shown_escaped(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    picture(tmp_path / "mine" / name / f"{name}.png", 7)
    picture(tmp_path / "mine" / name / "bad.png").write_bytes(b"")
    images = open_images("folder:mine", "train", tmp_path)
    assert images.class_names == (r"caf\xe9",) and colour(images[1]) == 7
    assert images[1].where.encode().endswith(rb"mine/caf\xe9/caf\xe9.png")
    with pytest.raises(BadImage, match=r"caf\\xe9/bad.png: cannot be decoded") as refused:
        images[0]
    str(refused.value).encode()


def test_own_images_without_folders_of_classes_are_unlabelled(tmp_path):
    for i, name in enumerate(["b.jpg", "a.PNG", "more/c.webp"]):
        picture(tmp_path / "holiday" / name, 50 * i)
    (tmp_path / "holiday" / "notes.txt").write_text("not an image")
    images = open_images("folder:holiday", "train", tmp_path)
    assert len(images) == 3 and not images.labelled
    assert [Path(images[i].where).name for i in range(3)] == ["a.PNG", "b.jpg", "c.webp"]


def test_own_images_in_folders_of_classes_are_labelled(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "pets" / split / "dog" / "a.png")
        picture(tmp_path / "pets" / split / "cat" / "b.png")
    for split in ("train", "test"):
        images = open_images("folder:pets", split, tmp_path)
        assert images.class_names == ("cat", "dog") and images.labels.tolist() == [0, 1]


def test_an_empty_folder_is_nothing_found(tmp_path):
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="folder:empty, train: no images found"):
        open_images("folder:empty", "train", tmp_path)


def test_an_empty_parquet_file_is_refused(tmp_path):
    write_parquet(tmp_path / "mine-train.parquet", [], [])
    with pytest.raises(DataError, match="holds no images"):
        open_images("folder:mine", "train", tmp_path)


def test_the_fingerprint_of_a_folder_follows_names_sizes_and_classes_and_not_where_it_lies(tmp_path):
    def fingerprint(place: str, name: str = "dog/a.png", size: int = 0) -> str:
        with open(picture(tmp_path / place / "pets" / name), "ab") as file:
            file.write(b"\0" * size)
        return open_images("folder:pets", "train", tmp_path / place).fingerprint

    first = fingerprint("one")
    assert fingerprint("two") == first
    assert len({first, fingerprint("three", "cat/a.png"), fingerprint("four", "dog/b.png"), fingerprint("five", size=1)}) == 4


# --- the published layouts, in small


def test_an_incomplete_official_copy_is_refused_with_both_counts(tmp_path):
    make_cub(tmp_path)
    with pytest.raises(DataError, match="2 classes, but cub2011 has 200"):
        open_images("cub2011", "train", tmp_path)
    make_tinyimagenet(tmp_path, classes=200)
    with pytest.raises(DataError, match="200 images in the train split, but tinyimagenet has 100000; the copy is not complete"):
        open_images("tinyimagenet", "train", tmp_path)


def test_torchvisions_refusal_is_passed_on(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(DataError, match="torchvision's CIFAR100 refuses it .*; complete the copy"):
        open_images("cifar100", "train", tmp_path)


def contents(layout, root: Path, name: str, split: str) -> list[tuple[int, int]]:
    """(colour, label) of each image that a layout finds."""
    images = next(images for place in layout.places(root, name, split) if (images := layout.read(place, split)) is not None)
    return [(colour(images[i]), images[i].label) for i in range(len(images))]


def layout_of(name: str, kind: type):
    return next(layout for layout in sources.spec(name).layouts if isinstance(layout, kind))


def make_tinyimagenet(root: Path, classes: int = 2) -> None:
    folder = root / "tiny-imagenet-200"
    for c in range(classes):
        picture(folder / "train" / f"n{c:03d}" / "images" / f"n{c:03d}_0.JPEG", 10 * c % 250)
    (folder / "wnids.txt").write_text("".join(f"n{c:03d}\n" for c in reversed(range(classes))))
    for i in range(2):
        picture(folder / "val" / "images" / f"val_{i}.JPEG", 50 + i)
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn001\t0\t0\t9\t7\nval_1.JPEG\tn000\t0\t0\t9\t7\n")


def make_cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    files = ["001.A/x.jpg", "001.A/y.jpg", "002.B/z.jpg"]
    for value, file in enumerate(files):
        picture(folder / "images" / file, 60 * value)
    (folder / "images.txt").write_text("".join(f"{i} {file}\n" for i, file in enumerate(files, 1)))
    (folder / "image_class_labels.txt").write_text("1 1\n2 1\n3 2\n")
    (folder / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (folder / "classes.txt").write_text("1 001.A\n2 002.B\n")


def test_tinyimagenet_as_published(tmp_path):
    make_tinyimagenet(tmp_path)
    layout = layout_of("tinyimagenet", layouts.TinyImageNet)
    assert contents(layout, tmp_path, "tinyimagenet", "train") == [(0, 0), (10, 1)]
    assert contents(layout, tmp_path, "tinyimagenet", "test") == [(50, 1), (51, 0)]


def test_cub_as_published(tmp_path):
    make_cub(tmp_path / "cub2011")
    layout = layout_of("cub2011", layouts.Cub)
    assert contents(layout, tmp_path, "cub2011", "train") == [(0, 0), (120, 1)]
    assert contents(layout, tmp_path, "cub2011", "test") == [(60, 0)]


def test_an_image_that_a_list_names_but_is_not_there_is_named(tmp_path):
    make_cub(tmp_path)
    (tmp_path / "CUB_200_2011" / "images" / "002.B" / "z.jpg").unlink()
    with pytest.raises(DataError, match=r"002.B/z.jpg: missing, though the data set lists it"):
        contents(layout_of("cub2011", layouts.Cub), tmp_path, "cub2011", "train")


def test_stanford_dogs_as_published(tmp_path):
    for value, file in enumerate(["n1-Chihuahua/a.jpg", "n2-Pug/b.jpg", "n2-Pug/c.jpg"]):
        picture(tmp_path / "dogs" / "Images" / file, 60 * value)
    savemat(tmp_path / "dogs" / "train_list.mat", {"file_list": np.array(["n2-Pug/c.jpg", "n1-Chihuahua/a.jpg"], object), "labels": [2, 1]})
    assert contents(layout_of("dogs", layouts.StanfordDogs), tmp_path, "dogs", "train") == [(120, 1), (0, 0)]


def test_aircraft_as_torchvision_reads_it(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for i in range(3):
        picture(data / "images" / f"{i:07d}.jpg", 60 * i)
    (data / "variants.txt").write_text("707-320\n727-200\n")
    (data / "images_variant_trainval.txt").write_text("0000002 727-200\n0000000 707-320\n")
    (data / "images_variant_test.txt").write_text("0000001 727-200\n")
    layout = layout_of("aircraft", layouts.Torchvision)
    assert contents(layout, tmp_path, "aircraft", "train") == [(120, 1), (0, 0)]
    assert contents(layout, tmp_path, "aircraft", "test") == [(60, 1)]


def test_cars_as_torchvision_reads_them(tmp_path):
    base = tmp_path / "cars" / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    kind = [("fname", "O"), ("class", "O")]
    for file, folder, names, classes in [("devkit/cars_train_annos.mat", "cars_train", ["a.jpg", "b.jpg"], [2, 1]),
                                         ("cars_test_annos_withlabels.mat", "cars_test", ["c.jpg", "d.jpg"], [1, 2])]:
        savemat(base / file, {"annotations": np.array(list(zip(names, classes, strict=True)), kind)})
        for i, name in enumerate(names):
            picture(base / folder / name, 60 * i)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(["Hummer", "Acura"], object)})
    layout = layout_of("cars", layouts.Torchvision)
    assert contents(layout, tmp_path, "cars", "train") == [(0, 1), (60, 0)]
    assert contents(layout, tmp_path, "cars", "test") == [(0, 0), (60, 1)]


def test_the_flowers_training_split_is_train_and_val_together(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)  # it insists on the original's checksums
    for i in range(1, 5):
        picture(tmp_path / "flowers-102" / "jpg" / f"image_{i:05d}.jpg", 50 * i)
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": [1, 2, 3, 4]})
    savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": [3, 1], "valid": [2, 2], "tstid": [4, 4]})
    layout = layout_of("flowers", layouts.Torchvision)
    assert contents(layout, tmp_path, "flowers", "train") == [(150, 2), (50, 0), (100, 1), (100, 1)]
    assert contents(layout, tmp_path, "flowers", "test") == [(200, 3), (200, 3)]


def test_imagenette_and_imagenet_as_torchvision_reads_them(tmp_path):
    wnids = ["n01440764", "n02102040"]
    for split in ("train", "val"):
        for c, wnid in enumerate(wnids):
            for folder in ("imagenette2", "imagenet"):
                picture(tmp_path / folder / split / wnid / "a.JPEG", 60 * c)
    torch.save(({wnid: (wnid,) for wnid in wnids}, []), tmp_path / "imagenet" / "meta.bin")
    for name in ("imagenette", "imagenet"):
        layout = layout_of(name, layouts.Torchvision)
        for split in ("train", "test"):
            assert contents(layout, tmp_path, name, split) == [(0, 0), (60, 1)]


def test_cifar_as_torchvision_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    pixels = RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    names = [f"class {c}" for c in range(100)]
    (folder / "train").write_bytes(pickle.dumps({"data": pixels.reshape(4, -1), "fine_labels": [5, 6, 7, 99]}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    layout = layout_of("cifar100", layouts.Torchvision)
    images = layout.read(folder, "train")
    assert images.labels.tolist() == [5, 6, 7, 99] and images.class_names == tuple(names)
    np.testing.assert_array_equal(np.asarray(images[2].image), pixels[2].transpose(1, 2, 0))
    assert images[2].where == f"{folder}, image 2"


def test_digits_are_parted_the_same_way_every_time_and_by_class(tmp_path):
    for name, first in (("digits-0-4", 0), ("digits-5-9", 5)):
        train, test = (open_images(name, split, tmp_path) for split in ("train", "test"))
        assert train.class_names == tuple(str(first + c) for c in range(5))
        assert 0.19 < (np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))).min()
        assert train.fingerprint == open_images(name, "train", tmp_path).fingerprint != test.fingerprint
        pictures = [np.asarray(images[i].image).tobytes() for images in (train, test) for i in range(len(images))]
        assert len(set(pictures)) == len(pictures) == sources.spec(name).train + sources.spec(name).test


# --- pixels

WHITE_OVER_RED = (255, 127, 127)  # half-transparent red, laid on white


def palette_image(transparent: bool) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(("image", "expected"), [
    (Image.new("L", (2, 2), 77), (77, 77, 77)),
    (Image.new("1", (2, 2), 1), (255, 255, 255)),
    (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
    (Image.new("RGBA", (2, 2), (255, 0, 0, 128)), WHITE_OVER_RED),
    (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
    (palette_image(transparent=False), (200, 100, 50)),
    (palette_image(transparent=True), (255, 255, 255)),
    (Image.fromarray(np.full((2, 2), 40_000, np.uint16)), (156, 156, 156)),
    (Image.fromarray(np.full((2, 2), 65_535, np.int32)), (255, 255, 255)),
    (Image.new("YCbCr", (2, 2), (128, 128, 128)), (128, 128, 128)),
    (Image.new("HSV", (2, 2), (0, 255, 255)), (255, 0, 0)),
], ids=lambda value: value.mode if isinstance(value, Image.Image) else "")
def test_any_mode_becomes_rgb(image, expected):
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    np.testing.assert_allclose(np.asarray(rgb), np.broadcast_to(expected, (2, 2, 3)), atol=1)


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "L"), ("PNG", "I;16"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("TIFF", "I;16"),
                                            ("TIFF", "CMYK"), ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("WEBP", "RGBA")])
def test_modes_survive_the_way_through_a_file(kind, mode):
    gradient = np.add.outer(np.arange(16), np.arange(16)) * 8  # [H, W]
    sixteen, eight = Image.fromarray((gradient * 257).astype(np.uint16)), Image.fromarray(gradient.astype(np.uint8))
    image = sixteen if mode == "I;16" else eight.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
    with Image.open(buffer) as opened:
        pixels = np.asarray(to_rgb(opened)).astype(int)
    np.testing.assert_allclose(pixels, np.repeat(gradient[..., None], 3, 2), atol=8)


def test_values_without_a_known_range_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (2, 2), 0.5))
    with pytest.raises(ValueError, match="do not fit 16 bits"):
        to_rgb(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


@pytest.mark.parametrize("size", [(100, 75), (75, 100), (64, 64), (20, 31), (500, 64), (33, 400)])
def test_resizing_agrees_with_torchvision_to_the_bit(size):
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), np.uint8))
    transforms = torchvision.transforms
    bicubic = transforms.InterpolationMode.BICUBIC
    cropped = transforms.Compose([transforms.Resize(64, bicubic), transforms.CenterCrop(64)])(image)
    squashed = transforms.Resize((64, 64), bicubic)(image)
    np.testing.assert_array_equal(resize(image, 64, "crop"), np.asarray(cropped))
    np.testing.assert_array_equal(resize(image, 64, "squash"), np.asarray(squashed))

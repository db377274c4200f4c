"""Betons and the readers: what is written is read back, in an order that depends on the seed alone."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from betons import Items, beton_of, describe, prepared_beton, real_images

from krrst_dist.config import ConfigError
from krrst_dist.data.beton import ALLOCATION, FIELD, HEADER, JPEG, PAGE_SIZE, RAW, SAMPLE, check_beton, write_beton
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import unused
from krrst_dist.data.memory_reader import MemoryReader
from krrst_dist.data.normalise import normalise
from krrst_dist.data.order import shard_indices
from krrst_dist.data.prefetch import Prefetcher
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import BetonReader, read_all, read_in_order

N = 300
SHARD = np.arange(20, 121)  # 101 images: 4 batches of 32, the last of 5


@pytest.fixture(scope="module")
def items(shared_data):
    return real_images(shared_data / "cifar100-test.parquet", N, 32)


@pytest.fixture(scope="module")
def prepared(items, tmp_path_factory):
    return prepared_beton(tmp_path_factory.mktemp("beton") / "cifar.beton", items, "raw")


@pytest.fixture(scope="module")
def photos(shared_data):
    return real_images(shared_data / "imagenet-sample.parquet", 24, 224)


@pytest.fixture
def damaged_photos(photos, tmp_path):
    """JPEGs at 224 px, of which image 7 cannot be decoded."""
    path = tmp_path / "photos.beton"
    prepared = prepared_beton(path, photos, "jpeg")
    header = np.fromfile(path, HEADER, 1)[0]
    table = np.fromfile(path, ALLOCATION, offset=int(header["table"]))
    with open(path, "r+b") as file:
        file.seek(int(table["start"][7]))
        file.write(bytes(200))
    return prepared


def beton_reader(prepared, indices=SHARD, batch=32, seed=1, shard=0, threads=1):
    return BetonReader(prepared, indices, batch=batch, seed=seed, purpose_index=shard, threads=threads)


def memory_reader(items, indices=SHARD, batch=32, seed=1, shard=0):
    return MemoryReader(items.pixels, items.labels, indices, batch=batch, seed=seed, purpose_index=shard)


def take(reader, count):
    return [reader.next() for _ in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert np.array_equal(batch.index, other.index)
        assert np.array_equal(batch.labels, other.labels)
        assert torch.equal(batch.images, other.images)


# --- order ---------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_with_a_short_last_batch_and_the_next_is_reshuffled(prepared):
    reader = beton_reader(prepared)
    first, second = take(reader, 4), take(reader, 4)
    assert [len(batch.index) for batch in first] == [32, 32, 32, 5]
    orders = [np.concatenate([batch.index for batch in epoch]) for epoch in (first, second)]
    for order in orders:
        assert np.array_equal(np.sort(order), SHARD)
    assert (orders[0] == orders[1]).mean() < 0.1


def test_neighbouring_seeds_and_shards_share_no_order():
    orders = []
    for seed, shard in itertools.product(range(3), range(3)):
        reader = MemoryReader(np.zeros((N, 1, 1, 3), np.uint8), np.zeros(N), SHARD, batch=101, seed=seed, purpose_index=shard)
        orders += [tuple(reader.next().index) for _ in range(4)]
    assert len(set(orders)) == 36


def test_the_shards_are_disjoint_and_together_the_training_part():
    training = np.arange(7, 107)
    shards = [shard_indices(training, shard, 7, seed=3) for shard in range(7)]
    assert np.array_equal(np.sort(np.concatenate(shards)), training)
    assert {len(shard) for shard in shards} == {14, 15}
    assert not np.array_equal(shards[0], shard_indices(training, 0, 7, seed=4))


@pytest.mark.parametrize("threads", [1, 3])
def test_beton_and_memory_give_the_same_batches_bit_for_bit_whatever_the_threads(prepared, items, threads):
    assert_same(take(beton_reader(prepared, threads=threads), 9), take(memory_reader(items), 9))


def test_readers_that_are_interleaved_or_read_ahead_in_threads_do_not_disturb_each_other(prepared, items):
    other = np.arange(150, 290)
    plain, ahead = beton_reader(prepared), Prefetcher(beton_reader(prepared, other, batch=17, seed=2, shard=5), depth=3)
    turns = [(plain.next(), ahead.next()) for _ in range(12)]
    ahead.close()
    assert_same([turn[0] for turn in turns], take(memory_reader(items), 12))
    assert_same([turn[1] for turn in turns], take(memory_reader(items, other, batch=17, seed=2, shard=5), 12))


@pytest.mark.parametrize("kind", ["beton", "memory", "read ahead"])
def test_restored_to_any_position_a_reader_goes_on_exactly_as_it_would_have(prepared, items, kind):
    make = {"beton": lambda: beton_reader(prepared), "memory": lambda: memory_reader(items),
            "read ahead": lambda: Prefetcher(beton_reader(prepared), depth=2)}[kind]
    reader, restored = make(), make()
    batches, states = [], []
    for _ in range(10):
        states.append(reader.state())
        batches.append(reader.next())
    assert states[:5] == [{"epoch": 0, "batch": i} for i in range(4)] + [{"epoch": 1, "batch": 0}]
    for start in (9, 0, 3, 4, 5, 8):
        restored.restore(states[start])
        assert restored.state() == states[start]
        assert_same(take(restored, min(3, 10 - start)), batches[start:start + 3])
    reader.close()
    restored.close()


def test_batches_are_copies_that_stay_as_they_were(prepared, items):
    batches = take(beton_reader(prepared), 12)
    batches[0].images.zero_()
    for batch in batches[1:]:
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), items.pixels[batch.index])


def test_images_come_as_uint8_in_channels_last_memory(prepared, items):
    for reader in (beton_reader(prepared), memory_reader(items)):
        batch = reader.next()
        assert batch.images.dtype == torch.uint8 and batch.images.shape == (32, 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.index.dtype == batch.labels.dtype == np.int64


def test_a_reader_leaves_torchs_thread_count_alone(prepared):
    torch.set_num_threads(2)
    try:
        Prefetcher(beton_reader(prepared)).next()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_read_all_gives_the_asked_images_in_the_asked_order(prepared, items):
    asked = np.array([5, 299, 0, 17])
    images, labels = read_all(prepared, asked)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), items.pixels[asked])
    assert np.array_equal(labels, items.labels[asked])


@pytest.mark.parametrize("indices, batch, says", [
    (SHARD, 102, "batch = 102.*1 to 101"), (SHARD, 0, "batch = 0"), (np.array([1, 2, 2]), 2, "same image"),
    (np.array([0, N]), 1, "0..299"), (np.array([-1, 3]), 1, "0..299"), (np.array([], np.int64), 1, "batch = 1"),
])
def test_a_batch_larger_than_the_shard_and_impossible_indices_are_refused(prepared, items, indices, batch, says):
    for make, source in ((beton_reader, prepared), (memory_reader, items)):
        with pytest.raises(ConfigError, match=says):
            make(source, indices, batch=batch)


@pytest.mark.parametrize("state", [{"epoch": 0, "batch": 4}, {"epoch": -1, "batch": 0}, {"epoch": 0, "batch": -1}])
def test_a_position_that_does_not_exist_is_refused(items, state):
    with pytest.raises(ConfigError, match="position"):
        memory_reader(items).restore(state)


@pytest.mark.parametrize("shard, shards", [(3, 3), (-1, 3), (0, 11)])
def test_a_shard_that_does_not_exist_is_refused(shard, shards):
    with pytest.raises(ConfigError, match="shard"):
        shard_indices(np.arange(10), shard, shards, seed=0)


# --- parts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_parts(items, tmp_path_factory):
    """The same images in 43 betons of 7 images, the last of 6."""
    return prepared_beton(tmp_path_factory.mktemp("parts") / "cifar.beton", items, "raw", part=7)


@pytest.mark.parametrize("threads", [1, 3])
def test_many_parts_give_the_batches_of_one_beton_bit_for_bit_in_every_shard_and_at_every_position(prepared, in_parts, threads):
    assert (len(in_parts.files), in_parts.count) == (43, prepared.count)
    for s in range(3):
        indices = shard_indices(np.arange(5, N), s, 3, seed=4)
        one, many = (beton_reader(p, indices, shard=s, threads=threads) for p in (prepared, in_parts))
        assert_same(take(one, 9), take(many, 9))
        for position in ({"epoch": 2, "batch": 3}, {"epoch": 0, "batch": 1}):
            one.restore(position)
            many.restore(position)
            assert_same(take(one, 2), take(many, 2))
        one.close()
        many.close()


def test_many_parts_are_read_at_once_and_in_order_as_one_beton_is(prepared, in_parts):
    asked = np.concatenate([np.arange(N)[::-1], [0, 6, 7, 13, 299, 299]])
    for whole, parted in zip(read_all(prepared, asked), read_all(in_parts, asked), strict=True):
        assert np.array_equal(np.asarray(whole), np.asarray(parted))
    assert_same(read_in_order(prepared, np.arange(N), batch=64), read_in_order(in_parts, np.arange(N), batch=64, threads=2))


def test_the_index_field_of_a_part_goes_on_where_the_part_before_it_ends(in_parts):
    index = [np.fromfile(path, SAMPLE, part.count, offset=HEADER.itemsize + 3 * FIELD.itemsize)["index"]
             for path, part in in_parts.files.items()]
    assert np.array_equal(np.concatenate(index), np.arange(N))


def test_readers_of_one_process_map_a_part_once_and_let_go_of_it_with_the_last(in_parts):
    def mapped():
        return sum(str(in_parts.path.parent) in line for line in open("/proc/self/maps"))

    readers = [beton_reader(in_parts, seed=seed) for seed in range(3)]
    assert mapped() == 43
    for reader in readers:
        reader.close()
    assert mapped() == 0


def test_a_beton_is_in_use_while_it_is_open_or_read(in_parts, tmp_path):
    in_parts.save()
    path = next(iter(in_parts.files))

    def free():
        with unused(path) as is_free:
            return is_free

    assert free()
    opened = Prepared.open(in_parts.path)
    assert not free()
    reader = beton_reader(opened)
    del opened
    assert not free()
    reader.close()
    assert free()


# --- JPEG and damage -----------------------------------------------------------------------------------------


def test_jpeg_betons_of_224_pixels_are_read_close_to_the_originals(photos, tmp_path):
    prepared = prepared_beton(tmp_path / "photos.beton", photos, "jpeg")
    table = np.fromfile(beton_of(prepared), ALLOCATION, offset=int(np.fromfile(beton_of(prepared), HEADER, 1)["table"][0]))
    assert table["size"].sum() < photos.pixels.nbytes / 3
    reader = beton_reader(prepared, np.arange(24), batch=10, threads=2)
    for batch in take(reader, 3):
        away = np.abs(batch.images.permute(0, 2, 3, 1).numpy().astype(float) - photos.pixels[batch.index])
        assert away.mean() < 4
        assert np.array_equal(batch.labels, photos.labels[batch.index])


@pytest.mark.parametrize("ahead", [False, True])
def test_a_damaged_image_is_an_error_that_names_it_and_is_not_touched_when_skipped(photos, damaged_photos, ahead):
    order = [int(batch.index[0]) for batch in take(memory_reader(photos, np.arange(24), batch=1), 24)]
    place = order.index(7)
    reader = beton_reader(damaged_photos, np.arange(24), batch=1)
    if ahead:
        reader = Prefetcher(reader)
    take(reader, place)
    for _ in range(2):
        with pytest.raises(DataError, match="image 7 cannot be decoded"):
            reader.next()
        assert reader.state() == {"epoch": 0, "batch": place}
    reader.restore({"epoch": 0, "batch": place + 1})
    assert [int(batch.index[0]) for batch in take(reader, 23 - place)] == order[place + 1:]
    reader.close()


# --- reading ahead -------------------------------------------------------------------------------------------


class Failing:
    """A reader whose third batch never comes: it raises, ends its thread, or hangs."""

    def __init__(self, reader, how):
        self.reader, self.how, self.release = reader, how, threading.Event()
        self.state, self.restore, self.close = reader.state, reader.restore, reader.close

    def next(self):
        if self.state()["batch"] == 2:
            self.how(self)
        return self.reader.next()


def raise_error(_):
    raise OSError("the disk is gone")


def end_thread(_):
    raise SystemExit


def hang(failing):
    failing.release.wait(20)


@pytest.mark.parametrize("how, says", [(raise_error, "the disk is gone"), (end_thread, "SystemExit"), (hang, "no batch within 0.5 s")])
def test_a_reading_thread_that_fails_dies_or_hangs_becomes_an_error_at_its_batch(items, how, says):
    failing = Failing(memory_reader(items), how)
    reader = Prefetcher(failing, depth=2, deadline=0.5)
    assert_same(take(reader, 2), take(memory_reader(items), 2))
    with pytest.raises(DataError, match=f"epoch 0, batch 2 failed: {says}"):
        reader.next()
    assert reader.state() == {"epoch": 0, "batch": 2}
    failing.release.set()
    reader.restore({"epoch": 0, "batch": 3})
    assert len(reader.next().index) == 5
    reader.close()


def test_it_reads_no_further_ahead_than_its_depth(items):
    inner = memory_reader(items)
    reader = Prefetcher(inner, depth=2)
    reader.next()
    assert inner.state()["batch"] <= 3
    reader.close()


def test_a_process_that_ends_while_reading_ahead_stops_its_threads_first_and_ends_quietly(prepared):
    prepared.save()
    code = f"""
import atexit, threading
atexit.register(lambda: print([t.name for t in threading.enumerate() if t.name == 'read-ahead']))  # the first registered runs last
from pathlib import Path
import numpy as np
from krrst_dist.data.prefetch import Prefetcher
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.reader import BetonReader
prepared = Prepared.open(Path({str(prepared.path)!r}))
readers = [Prefetcher(BetonReader(prepared, np.arange(300), batch=32, seed=0, purpose_index=i, threads=i + 1), depth=2) for i in range(2)]
for _ in range(12):
    for reader in readers:
        reader.next()
print([t.name for t in threading.enumerate() if t.name == 'read-ahead'])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "['read-ahead', 'read-ahead']\n[]\n", "")


# --- writing and refusing betons -----------------------------------------------------------------------------


def test_equal_images_give_equal_files(prepared, items, tmp_path):
    again = prepared_beton(tmp_path / "again.beton", items, "raw")
    assert beton_of(again).read_bytes() == beton_of(prepared).read_bytes()


class Breaking(Items):
    def __getitem__(self, i):
        if i == 150:
            raise RuntimeError("image 150 is not to be had")
        return super().__getitem__(i)


def test_an_exception_while_writing_is_raised_and_leaves_nothing_behind(items, tmp_path):
    with pytest.raises(RuntimeError, match="image 150 is not to be had"):
        write_beton(tmp_path / "x.beton", Breaking(items.pixels, items.labels), resolution=32, encoding="raw", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [PAGE_SIZE, PAGE_SIZE + 100_000, 2 * PAGE_SIZE + 5000])
def test_a_disk_that_is_full_is_an_error_and_leaves_nothing_behind(tmp_path, limit):
    photos = Items(np.zeros((24, 224, 224, 3), np.uint8), np.zeros(24))  # two pages of pixels
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError):
            write_beton(tmp_path / "x.beton", photos, resolution=224, encoding="raw", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pixels, says", [
    (np.zeros((0, 32, 32, 3), np.uint8), "no images"), (np.zeros((2, 32, 31, 3), np.uint8), "image 0 is uint8"),
    (np.zeros((2, 32, 32, 3), np.float32), "float32"), (np.zeros((2, 32, 32), np.uint8), r"\[32, 32\]")])
def test_images_of_another_size_or_type_are_not_written(tmp_path, pixels, says):
    with pytest.raises(DataError, match=says):
        write_beton(tmp_path / "x.beton", Items(pixels, np.zeros(len(pixels))), resolution=32, encoding="raw", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_ffcvs_modes_are_those_that_are_checked_and_numbas_dict_is_itself_again():
    import numba.typed
    from ffcv.fields import rgb_image

    assert rgb_image.IMAGE_MODES == {"jpg": JPEG, "raw": RAW} and numba.typed.Dict is not dict


def test_the_layout_that_is_checked_is_ffcvs_own():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, TYPE_ID_HANDLER, FieldDescType, HeaderType, get_metadata_type

    def layout(dtype):
        return [(dtype[i], *list(dtype.fields.values())[i][1:]) for i in range(len(dtype))], dtype.itemsize

    def offsets(dtype):
        return [field[1] for field in dtype.fields.values()], dtype.itemsize

    assert layout(HEADER) == layout(HeaderType)
    assert layout(ALLOCATION) == layout(ALLOC_TABLE_TYPE)
    assert offsets(FIELD) == offsets(FieldDescType)
    theirs = get_metadata_type([RGBImageField(), IntField(), IntField()])
    assert offsets(SAMPLE) == offsets(theirs)
    assert layout(SAMPLE["image"]) == layout(theirs["f0"])
    assert (CURRENT_VERSION, TYPE_ID_HANDLER[1], TYPE_ID_HANDLER[2]) == (2, IntField, RGBImageField)


def test_a_whole_beton_is_accepted_and_a_missing_one_is_not(prepared, tmp_path):
    check_beton(beton_of(prepared), N)
    with pytest.raises(DataError, match="there is no such file"):
        check_beton(tmp_path / "none.beton", N)


@pytest.mark.parametrize("length", [0, 10, 24, 3000, 1 << 21, -24, -1])
def test_a_truncated_beton_is_refused(prepared, tmp_path, length):
    path = tmp_path / "cut.beton"
    path.write_bytes(beton_of(prepared).read_bytes()[:length])
    with pytest.raises(DataError, match="krrst prepare"):
        check_beton(path, N)
    with pytest.raises(DataError, match="krrst prepare"):
        beton_reader(replace(prepared, path=path.with_suffix(".json"), parts=(replace(prepared.parts[0], name=path.name),)))


def test_a_beton_that_grew_and_one_of_another_count_are_refused(prepared, tmp_path):
    path = tmp_path / "more.beton"
    path.write_bytes(beton_of(prepared).read_bytes() + b"more")
    with pytest.raises(DataError, match="truncated or never finished"):
        check_beton(path, N)
    with pytest.raises(DataError, match="holds 300 images where 301"):
        check_beton(beton_of(prepared), N + 1)


def test_foreign_files_are_refused(shared_data, prepared, tmp_path):
    foreign = tmp_path / "foreign.beton"
    for payload in (b"\x89PNG" * 1000, np.random.default_rng(0).bytes(5000), beton_of(prepared).read_bytes().replace(b"label", b"lapel")):
        foreign.write_bytes(payload)
        with pytest.raises(DataError, match="not a beton"):
            check_beton(foreign, N)


@pytest.mark.parametrize("field, value", [("start", 1 << 40), ("start", 0), ("height", 33), ("mode", 7)])
def test_a_pointer_out_of_the_file_or_an_odd_image_is_refused(prepared, tmp_path, field, value):
    path = tmp_path / "odd.beton"
    path.write_bytes(beton_of(prepared).read_bytes())
    samples = np.memmap(path, SAMPLE, "r+", offset=HEADER.itemsize + 3 * FIELD.itemsize, shape=N)
    samples["image"][field][11] = value
    samples.flush()
    with pytest.raises(DataError, match="damaged"):
        check_beton(path, N)


def test_a_file_left_by_an_unfinished_write_is_refused(prepared, items, tmp_path):
    payload = bytearray(beton_of(prepared).read_bytes())
    payload[16:24] = bytes(8)  # the pointer to the allocation table is written last
    path = tmp_path / "unfinished.beton"
    path.write_bytes(payload)
    with pytest.raises(DataError, match="never finished"):
        beton_reader(describe([path], items, "raw"))


# --- normalise -----------------------------------------------------------------------------------------------


def test_normalise_subtracts_the_mean_and_divides_by_the_std_of_each_channel(prepared, items):
    batch = memory_reader(items).next()
    x = normalise(batch.images, prepared.mean, prepared.std)
    expected = (items.pixels[batch.index] / 255 - prepared.mean) / prepared.std  # float64 [b, H, W, C]
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)

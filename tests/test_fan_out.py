"""Parts of a prepared split written by the nodes of a real Ray cluster of two nodes. One cluster for the file."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from test_data_parts import small_parts  # noqa: F401 (a fixture)
from test_data_prepare import holiday, prepare_holiday, visible
from test_data_sources import write_parquet
from test_data_tar import write_tar

from krrst_dist import storage
from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import DataError
from krrst_dist.data.prepare import prepare
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.readers import ArrayImages
from krrst_dist.data.sources import open_images
from krrst_dist.on_ray import fan_out
from krrst_dist.on_ray.errors import EngineError

pytestmark = pytest.mark.usefixtures("small_parts")
COUNT, PARTS = 40, 6


@pytest.fixture(scope="module", autouse=True)
def nodes() -> Iterator[list[str]]:
    """Two nodes of one CPU, which get the classes of this file by value."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    made = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    made.add_node(**node)
    made.wait_for_nodes()
    ray.init(address=made.address, logging_level="error")
    yield [found["NodeID"] for found in ray.nodes()]
    ray.shutdown()
    made.shutdown()


class Watched(ArrayImages):
    """Images that write down where a part is begun, are hidden from some nodes, and stop at one of them until their process is killed."""

    def __init__(self, log: Path, *, hidden_from: tuple[str, ...] = (), stops_at: int = -1, kills: int = 1) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 16, 16, 3), np.uint8)
        super().__init__("random", pixels, np.arange(COUNT) % 2, ["a", "b"])
        self._log, self._hidden_from, self._stops_at, self._kills = log, hidden_from, stops_at, kills

    def require_there(self) -> None:
        node = ray.get_runtime_context().get_node_id()
        if node in self._hidden_from:
            raise DataError("/images: cannot be read here (No such file or directory)")
        with open(self._log, "a") as file:
            file.write(f"{self._before} {len(self)} {node}\n")

    def __getitem__(self, i: int):
        stopped = list(self._log.parent.glob("stopped-*"))
        if self._before + i == self._stops_at and len(stopped) < self._kills:
            (self._log.parent / f"stopped-{os.getpid()}").touch()
            time.sleep(60)
        return super().__getitem__(i)


def begun(log: Path) -> list[tuple[int, str]]:
    """First image and node of each part that was begun, without the questions to the nodes."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return [(int(first), node) for first, _, node in lines[len({node for *_, node in lines}):]]


def prepared(images: ArrayImages, folder: Path, **how) -> Prepared:
    settings = {"directory": folder / "out", "progress": False, "writers": fan_out.write_parts} | how
    return prepare("folder:x", "train", root=folder, resolution=16, images=images, **settings)


def same(one: Prepared, other: Prepared) -> bool:
    return one.parts == other.parts and (one.mean, one.std) == (other.mean, other.std)


def test_both_nodes_write_the_parts_that_one_process_writes(tmp_path, nodes, capfd):
    images = Watched(tmp_path / "log")
    many = prepared(images, tmp_path, progress=True)
    shown = capfd.readouterr()
    assert "6 parts are written by" in shown.out and "40/40" in shown.err
    assert sorted(first for first, _ in begun(tmp_path / "log")) == [0, 7, 14, 21, 28, 35]
    assert {node for _, node in begun(tmp_path / "log")} == set(nodes)
    assert same(many, prepared(images, tmp_path, directory=tmp_path / "alone", writers=None))
    assert len(visible(tmp_path / "out")) == PARTS + 1 and Prepared.open(many.path) == many


def test_a_nodes_files_are_read_where_they_are(tmp_path):
    root = holiday(tmp_path, COUNT)
    assert same(prepare_holiday(root, tmp_path / "out", writers=fan_out.write_parts), prepare_holiday(root, tmp_path / "alone"))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_parts_of_parquet_files_and_of_tar_shards_are_to_the_bit_those_that_one_process_writes(kind, tmp_path, capfd):
    payloads = [path.read_bytes() for path in sorted((holiday(tmp_path / "made", COUNT) / "holiday").iterdir())]
    for shard, (first, stop) in enumerate(((0, 17), (17, COUNT))):  # the third of the parts is of both
        if kind == "parquet":
            write_parquet(tmp_path / f"holiday-train-{shard:05d}-of-00002.parquet", payloads[first:stop],
                          [i % 3 for i in range(first, stop)], row_group_size=4)
        else:
            write_tar(tmp_path / f"holiday-train-{shard:06d}.tar", {name: payload for i in range(first, stop) for name, payload in (
                (f"{i:04d}.png", payloads[i]), (f"{i:04d}.cls", str(i % 3).encode()))})
    many = prepare_holiday(tmp_path, tmp_path / "out", writers=fan_out.write_parts, progress=True)
    assert "6 parts are written by" in capfd.readouterr().out
    one = prepare_holiday(tmp_path, tmp_path / "alone")
    assert same(many, one) and many.class_names == ("0", "1", "2") and len(many.files) == PARTS
    assert [path.read_bytes() for path in many.files] == [path.read_bytes() for path in one.files]


def test_a_part_whose_process_is_killed_is_written_again_and_the_rest_is_not(tmp_path, capfd):
    def kill() -> None:
        deadline = time.monotonic() + 100
        while not (stopped := list(tmp_path.glob("stopped-*"))) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int(stopped[0].name.split("-")[1]), signal.SIGKILL)

    images = Watched(tmp_path / "log", stops_at=16)
    killer = threading.Thread(target=kill)
    killer.start()
    many = prepared(images, tmp_path)
    killer.join()
    firsts = sorted(first for first, _ in begun(tmp_path / "log"))
    assert firsts == [0, 7, 14, 14, 21, 28, 35]
    assert "00002-of-00006.beton on" in (said := capfd.readouterr().out) and "was lost" in said and "given out again" in said
    assert Prepared.open(many.path).count == COUNT


def test_what_was_finished_is_not_written_again_by_the_next_call(tmp_path):
    images = Watched(tmp_path / "log")
    names = {path.name for path in prepared(images, tmp_path).files}
    (tmp_path / "out").joinpath(sorted(names)[3]).unlink()
    (tmp_path / "log").unlink()
    prepared(images, tmp_path)
    assert not (tmp_path / "log").exists()  # one part is written here: no node is asked


def test_a_node_that_does_not_see_the_images_writes_none_of_them(tmp_path, nodes, capfd):
    images = Watched(tmp_path / "log", hidden_from=(nodes[1],))
    fan_out_to = prepared(images, tmp_path)
    assert "writes no parts: /images: cannot be read here" in capfd.readouterr().out
    assert {node for _, node in begun(tmp_path / "log")} <= {nodes[0]} and fan_out_to.count == COUNT


def test_nodes_pass_parts_on_through_the_storage_and_publish_the_manifest_last(tmp_path):
    remote = (tmp_path / "remote").as_uri()
    images = Watched(tmp_path / "log")
    many = prepared(images, tmp_path, remote=remote)
    assert storage.list_names(remote) == sorted([many.path.name, *(path.name for path in many.files)])
    there = Cache(tmp_path / "other", remote).fetch_prepared(tmp_path / "other" / many.path.name)
    assert there.parts == many.parts


def test_a_bad_image_stops_the_whole_with_the_host_and_the_file(tmp_path):
    root = holiday(tmp_path, COUNT, p17=b"no image")
    with pytest.raises(DataError, match=r"^\S+: .*holiday/p17.png: cannot be decoded"):
        prepare_holiday(root, tmp_path / "out", writers=fan_out.write_parts)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_part_that_is_lost_again_and_again_is_one_sentence(tmp_path):
    ended = threading.Event()

    def kill() -> None:
        killed = set()
        while not ended.is_set():
            for path in set(tmp_path.glob("stopped-*")) - killed:
                killed.add(path)
                os.kill(int(path.name.split("-")[1]), signal.SIGKILL)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(EngineError, match=r"00000-of-00006.beton was lost 3 times, the last time on \S+: .* the same command goes on"):
            prepared(Watched(tmp_path / "log", stops_at=3, kills=9), tmp_path)
    finally:
        ended.set()
        killer.join()


def test_files_that_are_others_on_a_node_are_refused_before_they_are_read(tmp_path):
    images = open_images("folder:holiday", "train", holiday(tmp_path, 3))
    (tmp_path / "holiday" / "p1.png").write_bytes(b"shorter")
    with pytest.raises(DataError, match=r"p1.png: 7 bytes here, \d+ where the images were listed; it is not the same data"):
        images.some(1, 3).require_there()
    images.some(2, 3).require_there()
    (tmp_path / "holiday" / "p1.png").unlink()
    with pytest.raises(DataError, match=r"p1.png: cannot be read here \(No such file"):
        images.require_there()

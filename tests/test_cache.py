"""Prepared files between the nodes of a cluster: published once, fetched where they are missing."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pytest

from krrst_dist import storage
from krrst_dist.data import integrity
from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import DataError


@pytest.fixture
def remote() -> str:
    """A folder of an object store (in this process's memory)."""
    return f"fsspec+memory://{uuid.uuid4().hex}/cache"


def visible(folder: Path) -> list[str]:
    """Everything in a folder but locks and marks."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def written(cache: Cache, name: str, payload: bytes) -> Path:
    path = cache.local / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)
    return path


def test_what_one_node_publishes_another_one_fetches(tmp_path, remote):
    one, other = Cache(tmp_path / "one", remote), Cache(tmp_path / "other", remote)
    names = ["images.beton", "below/targets.npy"]
    files = [written(one, name, name.encode() * 1000) for name in names]
    wanted = [other.local / name for name in names]
    assert not other.holds(*wanted)
    one.publish(*files)
    assert other.holds(*wanted)
    other.fetch(*wanted)
    assert [path.read_bytes() for path in wanted] == [name.encode() * 1000 for name in names]
    assert visible(other.local) == ["below", "images.beton"]


@pytest.mark.parametrize("sidecar", ["x.json", "x.npy.json"])
def test_a_copy_that_is_not_what_was_published_is_refused_and_removed(tmp_path, remote, sidecar):
    one, other = Cache(tmp_path / "one", remote), Cache(tmp_path / "other", remote)
    file = written(one, "x.npy", b"whole")
    about = json.dumps({"checksum": integrity.named(integrity.crc32(file))}).encode()
    one.publish(file, written(one, sidecar, about))
    wanted = [other.local / "x.npy", other.local / sidecar]
    other.fetch(*wanted)
    wanted[0].unlink()
    storage.write_whole(storage.join(remote, "x.npy"), b"whOle")
    with pytest.raises(DataError, match=r"other/x.npy: damaged: .* copied from .*cache/x.npy: delete that, and the file it was made from"):
        other.fetch(*wanted)
    assert visible(other.local) == [sidecar]


def test_what_is_there_stays_on_either_side(tmp_path, remote):
    one, other = Cache(tmp_path / "one", remote), Cache(tmp_path / "other", remote)
    one.publish(written(one, "x", b"first"))
    other.publish(theirs := written(other, "x", b"later"))
    other.fetch(theirs)
    assert storage.read_whole(storage.join(remote, "x")) == b"first"
    assert theirs.read_bytes() == b"later"


def test_what_was_published_in_part_is_published_again(tmp_path, remote):
    cache = Cache(tmp_path, remote)
    file = written(cache, "x", b"whole")
    storage.write_whole(storage.join(remote, "x"), b"who")
    cache.publish(file)
    assert storage.read_whole(storage.join(remote, "x")) == b"whole"


def test_a_folder_that_all_nodes_share_needs_no_copies(tmp_path):
    cache = Cache(tmp_path)
    file = written(cache, "x", b"here")
    cache.publish(file)
    cache.fetch(file)
    assert cache.holds(file) and os.listdir(tmp_path) == ["x"]


def test_a_file_that_is_nowhere_is_an_error_that_says_what_to_do(tmp_path, remote):
    assert not Cache(tmp_path).holds(tmp_path / "x")
    with pytest.raises(DataError, match="x: not on this node; give --cache a folder that all nodes share, or --out a storage URI"):
        Cache(tmp_path).fetch(tmp_path / "x")
    with pytest.raises(DataError, match=f"x: not on this node, nor at {remote.replace('+', '.')}/x;"):
        Cache(tmp_path, remote).fetch(tmp_path / "x")
    assert visible(tmp_path) == []

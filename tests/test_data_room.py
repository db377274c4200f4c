"""Room on a node's disk: what was used least recently makes way for what is fetched, if it can be had again and nobody uses it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import uuid
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from betons import Items, prepared_beton
from test_cache import visible

from krrst_dist import storage
from krrst_dist.data.cache import Cache
from krrst_dist.data.errors import DataError
from krrst_dist.data.prepared import Prepared
from krrst_dist.data.targets import TargetFile, write_targets

BYTES = 1 << 22  # about that of a small beton, which is written in pages of 2 MiB


@pytest.fixture
def remote() -> str:
    """A folder of an object store (in this process's memory)."""
    return f"fsspec+memory://{uuid.uuid4().hex}/cache"


@pytest.fixture
def sets(tmp_path, remote) -> list[str]:
    """Manifests of three data sets of three parts, published by another node."""
    other = Cache(tmp_path / "other", remote)
    other.local.mkdir()
    names = []
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (15, 8, 8, 3), np.uint8)
        prepared = prepared_beton(other.local / f"set{i}.beton", Items(pixels, np.zeros(15)), "raw", part=5)
        prepared.save()
        other.publish(*prepared.files, prepared.path)
        names.append(prepared.path.name)
    return names


@pytest.fixture
def here(tmp_path, remote, sets) -> Cache:
    """A node that has fetched the three sets, one after the other."""
    cache = Cache(tmp_path / "here", remote)
    for i, name in enumerate(sets):
        cache.fetch_prepared(cache.local / name)
        os.utime(cache.local / f".{name}.used", (i, i))
    return cache


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Sets the bytes that the node's disk has left, beside what its files take."""
    def full(folder: Path, left: int) -> None:
        size = left + sum(path.stat().st_size for path in folder.iterdir())
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(size - sum(path.stat().st_size for path in folder.iterdir())))
    return full


def betons(folder: Path) -> list[str]:
    return [name for name in visible(folder) if name.endswith(".beton")]


def lost(cache: Cache, name: str) -> int:
    """Delete a set's betons; their size."""
    files = Prepared.load(cache.local / name).files
    for path in files:
        path.unlink()
    return sum(part.size for part in files.values())


def test_a_node_fetches_the_parts_that_it_lacks_and_no_others(here, sets):
    manifest = here.local / sets[0]
    path, other, _ = Prepared.load(manifest).files
    path.unlink()
    before = other.stat().st_mtime_ns
    here.fetch_prepared(manifest)
    assert path.exists() and other.stat().st_mtime_ns == before


def test_a_fetched_part_that_is_not_what_the_manifest_says_is_refused_by_its_name_and_removed(here, sets):
    path = list(Prepared.load(here.local / sets[0]).files)[1]
    payload = path.read_bytes()
    path.unlink()
    storage.write_whole(here.uri(path), payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(DataError, match=rf"here/{path.name}: damaged: .* copied from .*cache/{path.name}: delete that"):
        here.fetch_prepared(here.local / sets[0])
    assert not path.exists()


def test_the_least_recently_used_set_makes_room_and_no_more_of_it_than_is_needed(here, sets, disk, capfd):
    needed = lost(here, sets[2])
    one = Prepared.load(here.local / sets[0]).parts[0].size
    disk(here.local, needed - one - 1)  # two files of set0 have to go
    here.fetch_prepared(here.local / sets[2])
    assert betons(here.local) == ["set0-2.beton", *(f"set{i}-{k}.beton" for i in (1, 2) for k in range(3))]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and "made room, " in said[0] and "set0-0.beton, of set0-0, last used" in said[0] and "it is kept at" in said[0]
    here.fetch_prepared(here.local / sets[0])  # and back it comes, for what is now the oldest
    assert "set0-0.beton" in betons(here.local) and "set1-0.beton" not in betons(here.local)


def test_what_is_used_stays_and_so_does_what_could_not_be_fetched_again(here, sets, disk):
    needed = lost(here, sets[2])
    in_use = Prepared.open(here.local / sets[0])
    gone, short, kept = Prepared.load(here.local / sets[1]).files
    storage.delete(here.uri(gone))
    storage.write_whole(here.uri(short), b"short")
    disk(here.local, 0)
    with pytest.raises(DataError, match=rf"^\S+, {here.local}: .* free, but fetching takes .*; free some, or choose another --cache"):
        here.fetch_prepared(here.local / sets[2])
    assert needed > in_use.parts[0].size
    assert betons(here.local) == [*(f"set0-{k}.beton" for k in range(3)), gone.name, short.name]


HOLD = """
import sys
from pathlib import Path
from krrst_dist.data.prepared import Prepared
prepared = Prepared.open(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def test_a_file_that_another_process_has_open_is_never_removed_until_that_has_ended(here, sets, disk):
    lost(here, sets[2])
    disk(here.local, 0)
    reading = subprocess.Popen([sys.executable, "-c", HOLD, str(here.local / sets[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert reading.stdout.readline() == "open\n"
    here.fetch_prepared(here.local / sets[2])
    assert betons(here.local) == [f"set{i}-{k}.beton" for i in (0, 2) for k in range(3)]
    reading.communicate("")
    here.fetch_prepared(here.local / sets[1])
    assert not (here.local / "set0-0.beton").exists()


def test_a_set_does_not_make_room_for_itself_and_other_files_are_left_alone(here, sets, disk):
    (here.local / "mine.beton").write_bytes(bytes(BYTES))
    (here.local / "mine.json").write_text('{"parts": ["mine.beton"]}')
    Prepared.load(here.local / sets[0])
    path = next(iter(Prepared.load(here.local / sets[2]).files))
    path.unlink()
    for name in sets[:2]:
        lost(here, name)
    disk(here.local, 0)
    with pytest.raises(DataError, match="0 bytes free, but fetching takes"):
        here.fetch_prepared(here.local / sets[2])
    assert betons(here.local) == ["mine.beton", "set2-1.beton", "set2-2.beton"]


def test_target_files_make_room_too_unless_they_are_mapped(here, sets, disk):
    prepared = Prepared.open(here.local / sets[0])
    path = here.local / "set0-0-targets-x.npy"
    write_targets(path, prepared, lambda images: images.float().flatten(1)[:, :8], target_fingerprint="x", views=0, view_seed=0,
                  statistics_over=None, progress=False)
    here.publish(path, path.with_name(path.name + ".json"))
    lost(here, sets[1])
    lost(here, sets[2])
    needed = sum(part.size for part in prepared.parts)
    for mapped in (True, False):
        targets = TargetFile.open(path, prepared) if mapped else None
        disk(here.local, needed - 1)
        if mapped:
            with pytest.raises(DataError, match="fetching takes"):
                here.fetch_prepared(here.local / sets[1])
            assert path.exists() and targets.k == 8
        else:
            here.fetch_prepared(here.local / sets[1])
            assert not path.exists()
    disk(here.local, 2 * BYTES)
    here.fetch(path, path.with_name(path.name + ".json"))
    assert TargetFile.open(path, prepared).k == 8


def test_processes_of_a_node_that_want_the_same_set_copy_it_once(tmp_path, remote, sets, monkeypatch):
    cache, copied, copy = Cache(tmp_path / "here", remote), [], storage.copy
    monkeypatch.setattr(storage, "copy", lambda *places: (copied.append(places), copy(*places)))
    threads = [threading.Thread(target=lambda: cache.fetch_prepared(cache.local / sets[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copied) == 4  # three parts and the manifest

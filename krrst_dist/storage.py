"""Whole files on any storage: a local path or a URI that pyarrow's file systems know (s3://, gs://, file://).

A file is there whole or not at all: on local disks it is written under a temporary name, flushed and renamed; an
object store publishes an object when its upload is complete. Knows nothing of what the files contain.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from krrst_dist import paths
from krrst_dist.setting_names import ConfigError


class StorageError(ValueError):
    """A place that cannot be read or written: says where, why and what to do."""


def join(uri: str | Path, *parts: str) -> str:
    """Append path parts to a path or URI."""
    return "/".join([str(uri).rstrip("/"), *parts])


def local_path(uri: str | Path) -> Path | None:
    """The local path behind a URI, or None when it is remote. Raises StorageError for a file URI that gives no absolute path."""
    try:
        return paths.local(str(uri))
    except ConfigError as error:
        raise StorageError(str(error)) from None


def write_whole(uri: str | Path, payload: bytes) -> None:
    """Write a file, replacing any of that name; parent folders are made. Raises StorageError."""
    path = local_path(uri)
    try:
        if path is not None:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                file.write(payload)
        else:
            with _upload(uri) as stream:
                stream.write(payload)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot write {uri}: {error}; check the path, its permissions and the free space") from error


def read_whole(uri: str | Path) -> bytes:
    """A file's bytes. Raises FileNotFoundError when it is not there, StorageError when it cannot be read."""
    with _reading(uri) as (path, system, name):
        if path is not None:
            return path.read_bytes()
        with system.open_input_stream(name) as stream:
            return stream.read()


def read_start(uri: str | Path, count: int) -> bytes:
    """A file's first bytes, at most `count`. Raises what `read_whole` raises."""
    with _reading(uri) as (_, system, name), system.open_input_stream(name) as stream:
        return stream.read(count)


def read_end(uri: str | Path, count: int) -> bytes:
    """A file's last bytes, at most `count`. Raises what `read_whole` raises."""
    with _reading(uri) as (_, system, name), system.open_input_file(name) as file:
        file.seek(max(0, file.size() - count))
        return file.read(count)


@contextmanager
def _reading(uri: str | Path) -> Iterator[tuple[Path | None, fs.FileSystem, str]]:
    """Where a file is to be read. To read a pipe or a device could take for ever, so it is refused."""
    path = local_path(uri)
    try:
        if path is not None and not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no file")
        yield path, *_open(uri)
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot read {uri}: {error}") from error


def digest(uri: str | Path) -> str:
    """Hash of a file's content: 16 hex digits. Raises what `read_whole` raises."""
    return hashlib.sha256(read_whole(uri)).hexdigest()[:16]


def copy(source: str | Path, destination: str | Path) -> None:
    """Copy one file, of any size, whole or not at all. Raises StorageError."""
    try:
        path = local_path(destination)
        if path is not None:
            with atomic_path(path) as temporary:
                _stream(source, temporary)
        else:
            _stream(source, destination)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot copy {source} to {destination}: {error}; check both places and the free space") from error


def is_link(uri: str | Path) -> bool:
    """Is this file another one's name? Remote storage knows none."""
    path = local_path(uri)
    return path is not None and path.is_symlink()


def exists(uri: str | Path) -> bool:
    """Is there a file or folder of that name?"""
    return size(uri) is not None


def size(uri: str | Path) -> int | None:
    """Bytes of a file (0 for a folder), or None when there is nothing of that name."""
    with _explained("look at", uri):
        system, name = _open(uri)
        info = system.get_file_info(name)
    return None if info.type == fs.FileType.NotFound else info.size or 0


def changed(uri: str | Path) -> tuple[int, datetime] | None:
    """A file's size and when it was last written (UTC), which tell two versions of it apart; None when it is not there."""
    with _explained("look at", uri):
        system, name = _open(uri)
        info = system.get_file_info(name)
    return None if info.type == fs.FileType.NotFound else (info.size or 0, datetime.fromtimestamp((info.mtime_ns or 0) / 1e9, UTC))


def list_names(uri: str | Path) -> list[str]:
    """Base names in a folder, sorted; empty when there is no such folder."""
    return sorted(name for name, _ in _entries(uri))


def list_folders(uri: str | Path) -> list[str]:
    """Base names of the folders in a folder, sorted; empty when there is no such folder."""
    return sorted(name for name, info in _entries(uri) if info.type == fs.FileType.Directory)


def _entries(uri: str | Path) -> Iterator[tuple[str, fs.FileInfo]]:
    """What is in a folder, by base name, but what is still being written; what has a name that is not UTF-8 cannot be asked for."""
    with _explained("list", uri):
        system, name = _open(uri)
        entries = system.get_file_info(fs.FileSelector(name, allow_not_found=True))
    for entry in entries:
        with suppress(UnicodeDecodeError):
            if not entry.base_name.startswith(_TEMPORARY):
                yield entry.base_name, entry


def delete_tree(uri: str | Path) -> None:
    """Delete a folder and all in it; nothing happens when there is none."""
    with _explained("delete", uri):
        system, name = _open(uri)
        if system.get_file_info(name).type == fs.FileType.Directory:
            system.delete_dir(name)


def delete(uri: str | Path) -> None:
    """Delete a file; nothing happens when there is none."""
    with _explained("delete", uri):
        system, name = _open(uri)
        if system.get_file_info(name).type == fs.FileType.File:
            system.delete_file(name)


def check_writable(uri: str | Path) -> None:
    """Write and remove a small file there, so that a run finds out now and not at its first checkpoint."""
    probe = join(uri, f"write-test-{uuid.uuid4().hex}")
    write_whole(probe, b"krrst")
    delete(probe)


def in_words(size: int) -> str:
    """A number of bytes for people: 3.2 GB, 870 kB, 12 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.{1 if size < 10 * unit else 0}f} {name}"
    return f"{size} bytes"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, an empty file to be written over, renamed when the block succeeds and removed when it fails.

    What killed writers left is swept up: a writer holds a lock on its temporary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex}-{path.name}")
    try:
        with open(temporary, "xb") as held:
            _lock(held.fileno())
            _sweep(path, now=os.fstat(held.fileno()).st_mtime)  # by the file system's own clock: hosts that share one may differ
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


_TEMPORARY = ".partial-"
_QUIET, _DEAD = 60.0, 86400.0
"""Seconds that nobody wrote to a temporary file, after which it is left over: if nobody holds its lock (a minute, as some file systems
keep locks to the node), and whatever the locks say."""


def _lock(file: int) -> bool:
    """Take the lock of an open file, which ends with the process. False when another holds it, or the file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sweep(path: Path, *, now: float) -> None:
    """Remove the temporary files that earlier writers of `path` left, and any beside it that are a day old."""
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if entry.name.startswith(_TEMPORARY):
                with suppress(OSError):  # its writer, or another sweeper, was faster
                    quiet = now - entry.stat(follow_symlinks=False).st_mtime
                    same = entry.name[len(_TEMPORARY) + 33:] == path.name  # after 32 hex digits and a dash
                    if quiet > _DEAD or (same and quiet > _QUIET and _abandoned(entry.path)):
                        os.unlink(entry.path)


def _abandoned(file: str) -> bool:
    with open(file, "rb") as found:
        return _lock(found.fileno())


@contextmanager
def _explained(what: str, uri: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise StorageError(f"cannot {what} {uri}: {error}; check the place and the permissions") from error


def _stream(source: str | Path, destination: str | Path) -> None:
    system, name = _open(source)
    with system.open_input_stream(name) as reading, _upload(destination) as writing:
        while block := reading.read(1 << 24):
            writing.write(block)


@contextmanager
def _upload(uri: str | Path) -> Iterator[pa.NativeFile]:
    """A stream to write to. Closing it publishes what was written, so after a failure that is removed again."""
    system, name = _open(uri)
    try:
        with system.open_output_stream(name) as stream:
            yield stream
    except BaseException:
        if system.get_file_info(name).type == fs.FileType.File:
            system.delete_file(name)
        raise


def _open(uri: str | Path) -> tuple[fs.FileSystem, str]:
    path = local_path(uri)
    return (fs.LocalFileSystem(), str(path.absolute())) if path is not None else fs.FileSystem.from_uri(str(uri))

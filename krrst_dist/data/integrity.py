"""Are the bytes of a prepared file still those that were written? Asked once a node, not by every process that reads it.

A file's checksum is in its sidecar. Comparing it means reading the whole file; that it was found whole is noted among the
node's temporary files and believed for an hour, by every process of the same user, while the file's size, times and inode
stay. CRC-32 finds what disks, transfers and slips of the hand do, as fast as a file can be read; it is no guard against
malice. Knows nothing of what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
import zlib
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from krrst_dist import storage
from krrst_dist.data.errors import DataError
from krrst_dist.data.lock import alone

BELIEVED = 3600.0
"""seconds for which a file that was found whole is not read again on that node"""
PATTERN = "^crc32:[0-9a-f]{8}$"
_BLOCK = 1 << 22  # bytes

log = logging.getLogger(__name__)


def crc32(path: Path, length: int | None = None) -> int:
    """CRC-32 of a file, or of its first `length` bytes."""
    value, left, block = 0, length, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while left != 0 and (read := file.readinto(block if left is None else block[:left])):
            value = zlib.crc32(block[:read], value)
            left = None if left is None else left - read
    return value


def named(value: int) -> str:
    """A checksum as it is written in a sidecar."""
    return f"crc32:{value:08x}"


def seal(path: Path) -> str:
    """The checksum of a file that was just written, which this node need not read again."""
    state = _state(path)
    checksum = named(crc32(path))
    _keep(_note(path), state | {"checksum": checksum})
    return checksum


def require_whole(path: Path, checksum: str, *, remedy: str) -> None:
    """Raise DataError unless the file has this checksum. remedy: what a user can do otherwise."""
    note, state = _note(path), _state(path) | {"checksum": checksum}
    if _believed(note, state):
        return
    with ExitStack() as stack:
        with suppress(OSError):  # without a lock, every process looks for itself
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            stack.enter_context(alone(note, log.info))
        if _believed(note, state):
            return
        found = named(crc32(path))
        if found != checksum:
            raise DataError(f"{path}: damaged: its bytes are not those that were written ({found}, its sidecar says {checksum}); {remedy}")
        _keep(note, state)


def require_recorded(path: Path, *, remedy: str) -> None:
    """`require_whole` with the checksum in the sidecar beside the file, if it has one."""
    for sidecar in (path.with_name(path.name + ".json"), path.with_suffix(".json")):
        with suppress(OSError, ValueError):
            about = json.loads(sidecar.read_text()) if sidecar != path else None
            if isinstance(about, dict) and isinstance(about.get("checksum"), str):
                break
    else:
        return
    require_whole(path, about["checksum"], remedy=remedy)


def _state(path: Path) -> dict[str, Any]:
    """What changes whenever somebody writes to the file."""
    found = path.stat()
    return {"size": found.st_size, "modified": found.st_mtime_ns, "changed": found.st_ctime_ns, "inode": found.st_ino}


def _note(path: Path) -> Path:
    """Where it is noted that a file was found whole."""
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"krrst-whole-{os.getuid()}" / f"{name}.json"


def _believed(note: Path, state: dict[str, Any]) -> bool:
    try:
        noted = json.loads(note.read_text())
        return noted["state"] == state and abs(time.time() - noted["at"]) < BELIEVED
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _keep(note: Path, state: dict[str, Any]) -> None:
    with suppress(storage.StorageError):  # it will be read again
        storage.write_whole(note, json.dumps({"at": time.time(), "state": state}).encode())

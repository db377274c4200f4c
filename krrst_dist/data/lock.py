"""One at a time for one file: of two processes that want the same file, the second waits and then finds it there.

And files in use: whoever reads a prepared file holds a shared lock on the file itself, so that nobody deletes it to make room.
Knows nothing of what is written; whoever holds the lock looks again whether the file is there.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_IN_THIS_PROCESS: dict[Path, threading.RLock] = {}  # by file: a record lock does not keep threads of one process apart


@contextmanager
def alone(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of one file, a hidden file beside it, and `tell` when another process has it.

    It is a record lock: it ends with the process, and no child of it inherits it.
    """
    with _IN_THIS_PROCESS.setdefault(path, threading.RLock()), open(path.with_name(f".{path.name}.lock"), "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another process is writing {path.name}; waiting for it")
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def opened_in_use(path: Path) -> BinaryIO:
    """The file, opened for reading and in use until it, and every copy of its descriptor, is closed. Raises OSError."""
    file = open(path, "rb")
    with suppress(OSError):  # a file system without such locks: there `unused` finds nothing, either
        fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Does nobody use the file? Nobody begins to during the block. Raises OSError."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True

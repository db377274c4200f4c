"""One at a time for one file: of two processes that want the same file, the second waits and then finds it there.

Knows nothing of what is written; whoever holds the lock looks again whether the file is there.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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

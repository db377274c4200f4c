"""Storage that refuses a run which is under way, for a while: what has to be read or written is tried again.

An NFS server or an object store that restarts is back in minutes, and a full disk may be cleared; a run that has
computed for days need not end for that. Before a run has begun nothing is tried again: its user is still there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from krrst_dist.on_ray.stopping import Stop
from krrst_dist.storage import StorageError

PATIENCE = 600.0  # seconds that storage may refuse; a run that ends then goes on with --resume
PAUSES = 1.0, 60.0  # seconds, doubled from the one to the other

T = TypeVar("T")


def patiently(work: Callable[[], T], *, stop: Stop, say: Callable[[str], None], patience: float | None = None) -> T:
    """What `work()` returns, tried again where it raises StorageError, which is said once. It may have done a part of its work before.

    patience: seconds; default: PATIENCE. Raises the last StorageError when they are over, KeyboardInterrupt when `stop` is asked.
    """
    patience = PATIENCE if patience is None else patience
    began, pause, refused = time.monotonic(), PAUSES[0], False
    while True:
        try:
            done = work()
        except StorageError as error:
            left = began + patience - time.monotonic()
            if left <= 0:
                error.args = (f"{error}" + (f" (tried again for {patience:.0f} s)" if patience else ""),)
                raise
            if not refused or stop.soon.is_set():
                say(f"{error}; trying again for up to {patience:.0f} s")
            refused = True
            if stop.soon.wait(min(pause, left)):
                raise KeyboardInterrupt from error
            pause = min(2 * pause, PAUSES[1])
            continue
        if refused:
            say(f"storage works again, after {time.monotonic() - began:.0f} s")
        return done

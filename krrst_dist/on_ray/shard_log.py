"""What each shard does, for machines to read: JSON lines in Ray's log folder of the shard's host, `krrst-RUN-shard-S.jsonl`.

The first update of an actor, then one a minute, and what else happens to the shard. `ray logs` and Ray's dashboard show the
files, and whatever ships Ray's logs ships them. A log that cannot be written ends no run.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from ray._private import worker

EVERY = 60.0
"""seconds between the lines of a shard's updates"""


def ray_log_folder() -> Path:
    """Where this host's Ray keeps its logs."""
    return Path(worker._global_node.get_logs_dir_path())


class ShardLogs:
    """The logs of the shards of one actor.

    run: folder or URI of the run; its last two names are in those of the files. clock: seconds, for how often. Lines have time, event, run,
    shard, step (of an update: how many went before), host and pid; those of updates also loss, images, retries and seconds.
    """

    def __init__(self, run: str, shards: Iterable[int], folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        name = re.sub(r"[^\w.]+", "-", "-".join(run.rstrip("/").split("/")[-2:])).strip("-")
        self._paths = {shard: folder / f"krrst-{name}-shard-{shard}.jsonl" for shard in shards}
        self._always = {"run": run, "host": socket.gethostname(), "pid": os.getpid()}
        self._clock, self._said = clock, dict.fromkeys(self._paths, float("-inf"))

    def say(self, event: str, step: int | None = None) -> None:
        """The same of all shards."""
        for shard in self._paths:
            self._write(shard, event, step, {})

    def update(self, shard: int, step: int, loss: float, images: int, retries: int, seconds: float) -> None:
        """A shard's part of update `step`; most of them are not written."""
        if (now := self._clock()) - self._said[shard] >= EVERY:
            self._said[shard] = now
            self._write(shard, "update", step, {"loss": loss, "images": images, "retries": retries, "seconds": round(seconds, 6)})

    def _write(self, shard: int, event: str, step: int | None, values: dict[str, float]) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "shard": shard, "step": step}
        with suppress(OSError), open(self._paths[shard], "a") as file:
            file.write(json.dumps(line | self._always | values) + "\n")

"""A run's sign of life on storage, for whoever has no more than its folder (`krrst status`).

status.json is written whole, every BEAT seconds, by a thread of its own: a run that computes for long is told from one that
is gone. Whether a run lives is never judged by comparing two machines' clocks alone (`status.py`): each beat has a number.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError
from krrst_dist.on_ray.errors import TakenOverError

BEAT = 20.0  # seconds
FILE, FORMAT = "status.json", "krrst_dist status, version 1"
RECENT = 20  # updates that the speed is the median of

State = Literal["running", "finished", "stopped", "failed"]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Beat:
    """What a run said last.

    updates: in all; 0 for a job of several stages, which has none of its own. number: of this beat in its process, which `process`
    names. doing: the last line it printed, or the stage. step: updates done, None before any is known. seconds: one update, None before
    the first. checkpoint: the last good one. written: Unix time by the writer's clock.
    """

    state: State
    updates: Count
    host: str
    pid: int
    process: str
    number: Count = 0
    written: Seconds = 0.0
    doing: str = "starting"
    step: Count | None = None
    seconds: Seconds | None = None
    checkpoint: str | None = None

    @classmethod
    def read(cls, directory: str) -> Beat | None:
        """What is in a run's folder or URI; None where nothing is. Raises ArtifactError for a file that is not one of ours."""
        uri = storage.join(directory, FILE)
        try:
            about = json.loads(storage.read_whole(uri))
            if about.pop("format") != FORMAT:
                raise ValueError("it was written by another version of this package")
            return TypeAdapter(cls).validate_python(about)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = "{loc}: {msg}".format_map(error.errors()[0]) if isinstance(error, ValidationError) else error
            raise ArtifactError(f"{uri} does not tell how the run is doing ({why}); a run that goes on writes it anew") from None


class Heartbeat:
    """Writes the beats of the run in `directory`, between `start` and `end`. Storage that refuses a beat does not stop the run."""

    def __init__(self, directory: str, *, updates: int, every: float = BEAT, clock: Callable[[], float] = time.time) -> None:
        self._directory, self._every, self._clock = directory, every, clock
        self._beat = Beat("running", updates, socket.gethostname(), os.getpid(), uuid.uuid4().hex)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._change, self._write_one = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)

    def start(self) -> None:
        """Begin to beat."""
        self._thread.start()

    def says(self, line: str) -> None:
        """What the run does now."""
        self._set(doing=line)

    def update(self, step: int, seconds: float) -> None:
        """`step` updates are done, the last of which took `seconds`."""
        self._recent.append(seconds)
        self._set(step=step, seconds=sorted(self._recent)[len(self._recent) // 2])

    def checkpoint(self, uri: str, step: int) -> None:
        """The last good checkpoint."""
        self._set(checkpoint=uri, step=step)

    def stop(self) -> None:
        """Beat no more."""
        self._over.set()
        self._thread.join(timeout=self._every)

    def end(self, state: State, line: str | None = None) -> None:
        """The last beat. line: why."""
        self.stop()
        self._set(state=state, **({"doing": line} if line else {}))
        self._write()

    def _set(self, **values: object) -> None:
        with self._change:
            self._beat = replace(self._beat, **values)

    def _beat_on(self) -> None:
        self._write()
        while not self._over.wait(self._every):
            self._write()

    def _write(self) -> None:
        with self._write_one:
            self._set(number=self._beat.number + 1, written=self._clock())
            payload = json.dumps({"format": FORMAT} | asdict(self._beat), indent=1)
            try:
                storage.write_whole(storage.join(self._directory, FILE), payload.encode())
            except (OSError, storage.StorageError):
                pass  # the next one tells as much


@contextmanager
def of_job(directory: str) -> Iterator[Callable[[str], None]]:
    """Beats for a job of several stages, until the block ends; gives what tells what it does now."""
    heart = Heartbeat(directory, updates=0)
    heart.start()
    try:
        yield heart.says
    except TakenOverError:
        heart.stop()  # the folder is another process's now
        raise
    except KeyboardInterrupt:
        heart.end("stopped")
        raise
    except BaseException as error:
        heart.end("failed", str(error))
        raise
    heart.end("finished")

"""Reads the next batches while the current one is computed.

Knows nothing of what is read. Its position is that of the next batch handed out, however far it has read ahead.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque

from krrst_dist.data.errors import DataError
from krrst_dist.data.order import State
from krrst_dist.data.reader import Batch, Reader

_TIME_TO_END = 10.0  # seconds, for all reading threads of a process together


class Prefetcher:
    """A `Reader` in front of another one, which it owns from then on and reads in a thread.

    The thread starts with the first `next()`. Every wait ends: with a batch, with the thread's error, or at the deadline.
    One that was never closed is stopped when the process ends.
    """

    def __init__(self, reader: Reader, *, depth: int = 1, deadline: float = 300.0) -> None:
        """depth: batches held ready. deadline: seconds that one batch may take."""
        self._reader, self._depth, self._deadline = reader, depth, deadline
        self._position = reader.state()
        self._thread: _ReadAhead | None = None

    def next(self) -> Batch:
        """Raises DataError when the batch could not be read, or did not come before the deadline."""
        if self._thread is None:
            self._thread = _ReadAhead(self._reader, self._depth)
            self._thread.start()
        try:
            batch, self._position = self._thread.take(self._deadline)
        except _Failed as failed:
            at = f"epoch {self._position['epoch']}, batch {self._position['batch']}"
            raise DataError(f"reading {at} failed: {failed}") from failed.__cause__
        return batch

    def state(self) -> State:
        return dict(self._position)

    def restore(self, state: State) -> None:
        self._stop()
        self._reader.restore(state)
        self._position = self._reader.state()

    def close(self) -> None:
        self._stop()
        self._reader.close()

    def _stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and not thread.stop(self._deadline):
            raise DataError(f"the reading thread has not stopped within {self._deadline:g} s; is the disk of the data reachable?")


class _Failed(Exception):
    pass


class _ReadAhead(threading.Thread):
    """Keeps up to `depth` batches ready, each with the position after it."""

    def __init__(self, reader: Reader, depth: int) -> None:
        super().__init__(name="read-ahead", daemon=True)  # one that hangs must not keep its process from ending
        self._reader, self._depth = reader, depth
        self._ready: deque[tuple[Batch, State]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._error: BaseException | None = None
        _reading.add(self)

    def run(self) -> None:
        try:
            while self._wait_for_room():
                read = self._reader.next(), self._reader.state()
                with self._changed:
                    self._ready.append(read)
                    self._changed.notify()
        except BaseException as error:  # whatever it is, the consumer must hear of it
            with self._changed:
                self._error = error
                self._changed.notify()

    def take(self, deadline: float) -> tuple[Batch, State]:
        """The oldest batch that is ready. Raises _Failed."""
        until = time.monotonic() + deadline
        with self._changed:
            while not self._ready:
                if self._error is not None:
                    raise _Failed(str(self._error) or type(self._error).__name__) from self._error
                if not self.is_alive():
                    raise _Failed("the reading thread has died without a word")
                if time.monotonic() > until:
                    raise _Failed(f"no batch within {deadline:g} s; is the disk of the data reachable?")
                self._changed.wait(min(1.0, deadline))
            read = self._ready.popleft()
            self._changed.notify()
        return read

    def ask_to_stop(self) -> None:
        """It ends once the batch that it reads is read."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, deadline: float) -> bool:
        """Ask the thread to end; has it?"""
        self.ask_to_stop()
        self.join(deadline)
        return not self.is_alive()

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or len(self._ready) < self._depth)
            return not self._stopping


_reading: weakref.WeakSet[_ReadAhead] = weakref.WeakSet()


@atexit.register
def _stop_reading() -> None:
    """An interpreter that ends unwinds the threads still running, which aborts the process if one is inside torch's C++."""
    threads = [thread for thread in _reading if thread.is_alive()]
    for thread in threads:
        thread.ask_to_stop()
    until = time.monotonic() + _TIME_TO_END
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))

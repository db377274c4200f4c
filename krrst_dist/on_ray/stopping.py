"""How a run is asked to end: Ctrl-C, SIGTERM (`ray job stop`, a host that is taken away), an error in a run beside it.

Asked once, a distillation ends after the update that it is in, with a checkpoint; asked again, at once. Everything else
(`sigterm_as_interrupt`) ends at once. Knows signals and nothing of runs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""exit status after Ctrl-C, and after any end that may have lost work"""
TOLD = b"\nstopping: the update that is being done is finished and a checkpoint written; once more stops at once\n"


class Stopped(KeyboardInterrupt):
    """A run has ended because it was asked to. status: exit status of its process."""

    def __init__(self, status: int = INTERRUPTED) -> None:
        super().__init__()
        self.status = status


class Stop:
    """Asks runs to end, from any thread. soon: set by the first asking; now: by the second."""

    def __init__(self) -> None:
        self.soon, self.now = threading.Event(), threading.Event()
        self.status = INTERRUPTED
        """exit status of a process that ends in order, with nothing lost: 0 when it was SIGTERM that asked"""

    def ask(self, status: int = INTERRUPTED) -> None:
        """Ask, or insist."""
        if self.soon.is_set():
            self.now.set()
        else:
            self.status = status
            self.soon.set()

    @contextmanager
    def by_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM ask, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked(number: int, _: FrameType | None) -> None:
            if self.now.is_set():
                raise KeyboardInterrupt  # something does not hear
            if not self.soon.is_set():
                os.write(2, TOLD)  # `print` may be what the signal came in
            self.ask(0 if number == signal.SIGTERM else INTERRUPTED)

        with handled(asked, signal.SIGINT, signal.SIGTERM):
            yield


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, where Python allows it: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handled(signal.default_int_handler, signal.SIGTERM):
        yield


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object], *numbers: signal.Signals) -> Iterator[None]:
    """These signals call `handler` in the block. In the main thread only."""
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier or signal.SIG_DFL)

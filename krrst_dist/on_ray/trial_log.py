"""A trial's log: what it is, where it runs, how far it is, what warned or failed. Ray Tune carries it to the trial's folder in storage."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

FILE = "log.txt"
EVERY = 10.0
"""seconds between two lines of progress"""
_LOG = logging.getLogger("krrst_dist.trial")
_LOG.setLevel(logging.INFO)


class TrialLog:
    """Lines of one trial."""

    def __init__(self) -> None:
        self._said = float("-inf")

    def progress(self, step: int, loss: float) -> None:
        """A line now and then."""
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            _LOG.info("step %d, loss %.6g", step, loss)


@contextmanager
def trial_log(title: str) -> Iterator[TrialLog]:
    """Until the block ends, lines, warnings and the error that ends it go to log.txt in this process's folder, which Tune makes the
    trial's."""
    handler = logging.FileHandler(FILE)
    handler.setFormatter(_Utc("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%SZ"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        _LOG.info("%s: host %s, process %d", title, socket.gethostname(), os.getpid())
        yield TrialLog()
        _LOG.info("done")
    except BaseException:
        _LOG.exception("ended by an error")
        raise
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


class _Utc(logging.Formatter):
    converter = time.gmtime

"""Where the processes that a test has started listen."""

from __future__ import annotations

from contextlib import suppress

import psutil


def listening(program: str) -> set[tuple[str, int]]:
    """Address and port of each TCP socket on which descendants of this process with `program` in their command line listen."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if program in " ".join(process.cmdline()):
                found |= {tuple(socket.laddr) for socket in process.net_connections("tcp") if socket.status == psutil.CONN_LISTEN}
    return found

"""What can go wrong with a run because of the machines it is on; each says what was lost and what to do."""

from __future__ import annotations

from krrst_dist.data.errors import DataError


class EngineError(RuntimeError):
    """The run cannot go on, for a reason that lies in the machines."""


class LostActor(EngineError):
    """An actor died, or was silent for too long: worth another try with fresh actors."""


class UnfitHost(DataError):
    """A host cannot use its data, or has no room for it; others may. node: the cluster's name of it."""

    node: str = ""


class Moved(Exception):
    """A run has left its actors at a checkpoint, to go on with others: hosts leave or have joined. No failure."""


class TakenOverError(EngineError):
    """Another process goes on with this run: this one must not write any more."""


def last_line(error: BaseException) -> str:
    """What matters of Ray's many lines: the exception that ended a task, or the reason it gives for a death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

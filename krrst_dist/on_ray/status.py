"""`krrst status URI`: is a job alive, how far is its distillation, when will that end? Told from its folder on storage alone.

A run is alive when it beats (`heartbeat.py`). A beat that is young by the clock here is believed; where the clocks may differ,
or nothing has come for a while, the next beat is waited for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from krrst_dist import paths, storage
from krrst_dist.config import ConfigError
from krrst_dist.on_ray.heartbeat import BEAT, Beat

LATE = 3 * BEAT  # seconds after a beat within which the next must have come


def main(argv: Sequence[str]) -> int:
    """Prints some lines a run; returns 0 when each is alive or finished, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="krrst status", allow_abbrev=False, description=f"""Is the job in a folder or at a URI alive (a
        distillation with all its stages, a grid), how far is it, when will its distillation end? Reads its storage alone. Waits up to
        {LATE:.0f} s for a sign of life where there is doubt. Exits with status 0 when each run there is alive or finished.""")
    parser.add_argument("uri", help="what --out was: the folder or URI of a run or a grid, or one seed's folder in it")
    directory = paths.resolve(parser.parse_args(argv).uri, name="uri")
    runs = watched(runs_in(directory))
    for run, (beat, alive) in runs.items():
        print(in_words(run, beat, alive=alive))
    return 0 if all(beat.state == "finished" or alive for beat, alive in runs.values()) else 1


def runs_in(directory: str) -> dict[str, Beat]:
    """The last beat of the job or run in a folder, and of each seed's run below it. Raises ConfigError where there is none."""
    places = [directory, *(storage.join(directory, name) for name in storage.list_names(directory) if name.startswith("seed-"))]
    found = {place: beat for place in places if (beat := Beat.read(place)) is not None}
    if not found:
        raise ConfigError(f"{directory}: no run has left a sign of life there; give the folder or URI that --out was")
    return found


def watched(runs: dict[str, Beat], *, clock: Callable[[], float] = time.time,
            sleep: Callable[[float], None] = time.sleep) -> dict[str, tuple[Beat, bool]]:
    """The last beat of each run, and is it alive? One whose beat is young by `clock` is; of the others a new beat is waited for."""
    now = clock()
    known = {run: (beat, beat.state == "running" and 0 <= now - beat.written < LATE) for run, beat in runs.items()}
    doubtful = {run for run, (beat, alive) in known.items() if beat.state == "running" and not alive}
    waited = 0.0
    while doubtful and waited < LATE:
        sleep(1.0)
        waited += 1.0
        for run in sorted(doubtful):
            beat = Beat.read(run)
            if beat is not None and (beat.process, beat.number) != (runs[run].process, runs[run].number):
                known[run] = beat, beat.state == "running"
                doubtful.remove(run)
    return known


def in_words(run: str, beat: Beat, *, alive: bool) -> str:
    """A run's state, step, time left and last checkpoint; a job's state and stage."""
    state = "alive" if alive else "gone without a word" if beat.state == "running" else beat.state
    step = "no update yet" if beat.step is None else f"update {beat.step} of {beat.updates}"
    lines = [f"{run}: {state}" + (f", {step}" if beat.updates else "")]
    if alive and beat.step is not None and beat.seconds is not None:
        left = timedelta(seconds=round(beat.seconds * (beat.updates - beat.step)))
        lines.append(f"  {beat.seconds:.3g} s an update, time left {left}")
    lines.append(f"  on {beat.host}, process {beat.pid}: {beat.doing}")
    go_on = not alive and beat.state in ("running", "stopped")  # a run that failed has said what to do
    if beat.updates:
        further = "; the same command with --resume goes on from it" if go_on else ""
        lines.append(f"  last checkpoint: {beat.checkpoint or 'none'}{further}")
    return "\n".join(lines)

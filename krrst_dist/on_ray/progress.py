"""What a user sees of a run: a line with the time left, TensorBoard, and a table of the loss at every update.

Knows where a run's folder is and what is measured; neither Ray nor the algorithm. Everything here can be deleted
without changing a result. Where the folder is remote, TensorBoard's files are written locally and copied at checkpoints.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from krrst_dist import parquet, storage
from krrst_dist.on_ray.aggregate import Update

HISTORY, TENSORBOARD = "history.parquet", "tensorboard"
_SCHEMA = pa.schema([("step", pa.int64()), ("loss", pa.float64()), ("held_out", pa.float64()), ("seconds", pa.float64()),
                     ("retries", pa.int64()), ("lr", pa.float64())])


def read_history(directory: str) -> pa.Table:
    """The run's table, one row a number of updates done: step, loss (of the update that led there, on the pool's
    models; null at 0), held_out (null where not measured), seconds (of that update), retries (of its factorisations),
    lr (learning rate of X_s in that update; tables of earlier versions have no such column).
    Empty when there is none, or none that can be read."""
    try:
        return parquet.decode(storage.read_whole(storage.join(directory, HISTORY)))
    except (OSError, pa.ArrowException):
        return _SCHEMA.empty_table()


def curve(history: pa.Table, column: str) -> list[tuple[int, float]]:
    """(step, value) where the column `loss` or `held_out` of a run's table has one."""
    pairs = zip(history["step"].to_pylist(), history[column].to_pylist(), strict=True)
    return [(step, value) for step, value in pairs if value is not None]


class ProgressLine:
    """A bar on a terminal; elsewhere (a job's log) a line every 10 s at first, one a minute after two."""

    def __init__(self, what: str, total: int, *, start: int = 0) -> None:
        self._what, self._total, self._start = what, total, start
        self._began = self._said = time.monotonic()
        self._bar = tqdm(total=total, initial=start, desc=what, leave=False) if sys.stderr.isatty() else None

    def show(self, done: int, note: str = "") -> None:
        """`done` of `total` are done."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._said >= (10.0 if now - self._began < 120 else 60.0):
            self._said = now
            rate = (done - self._start) / (now - self._began)
            left = timedelta(seconds=round(max(0, self._total - done) / rate)) if rate else "unknown"
            print(f"{self._what} {done}/{self._total}  {note}{'  ' if note else ''}{rate:.3g}/s  time left {left}", flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


class Record:
    """Table and TensorBoard of one run that goes on after `start` updates, where what was recorded beyond is dropped;
    None: of a run that begins."""

    def __init__(self, directory: str, *, start: int | None) -> None:
        self._directory = directory
        kept = [row for row in read_history(directory).to_pylist() if start is not None and row["step"] <= start]
        self._rows = {row["step"]: row for row in kept}
        local = storage.local_path(directory)
        self._upload_from = Path(tempfile.mkdtemp(prefix="krrst-")) if local is None else None
        self._board_folder, self._purge = self._upload_from or local / TENSORBOARD, 0 if start is None else start + 1
        self._board: SummaryWriter | None = self._open_board()
        self._shown, self._recent = 0.0, []
        self._retries = sum(row["retries"] or 0 for row in kept)
        self.held_out = next((row["held_out"] for row in reversed(kept) if row["held_out"] is not None), None)
        """the latest held-out ridge loss"""

    def update(self, step: int, update: Update, *, lr: float) -> None:
        """`step` updates are done, `update` was the last. lr: learning rate of X_s. TensorBoard gets one mean a second."""
        self._row(step).update(loss=update.contribution.loss, seconds=update.total, retries=update.contribution.retries, lr=lr)
        self._retries += update.contribution.retries
        self._recent.append(update)
        if time.monotonic() - self._shown >= 1.0:
            self._show(step, lr)

    def measured(self, step: int, held_out: float) -> None:
        """The held-out ridge loss after `step` updates."""
        self._row(step).update(held_out=held_out)
        self.held_out = held_out
        self._draw({"loss/held-out": held_out}, step)

    def knows_held_out(self, step: int) -> bool:
        """Was it measured after `step` updates?"""
        return step in self._rows and self._rows[step]["held_out"] is not None

    def save(self) -> None:
        """Write the table, whole, and bring TensorBoard up to date."""
        table = pa.Table.from_pylist(list(self._rows.values()), schema=_SCHEMA)
        storage.write_whole(storage.join(self._directory, HISTORY), parquet.encode(table))
        if self._board is None:
            with suppress(OSError):
                self._board = self._open_board()
        self._draw({})
        if self._upload_from:
            for file in self._upload_from.iterdir():
                storage.write_whole(storage.join(self._directory, TENSORBOARD, file.name), file.read_bytes())

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        if self._upload_from:
            shutil.rmtree(self._upload_from, ignore_errors=True)

    def _row(self, step: int) -> dict:
        return self._rows.setdefault(step, {"step": step, "loss": None, "held_out": None, "seconds": None, "retries": None,
                                             "lr": None})

    def _show(self, step: int, lr: float) -> None:
        def mean(values: list[float]) -> float:
            return math.fsum(values) / len(values)

        recent, self._recent, self._shown = self._recent, [], time.monotonic()
        scalars = {"loss/outer": mean([u.contribution.loss for u in recent]), "learning rate": lr, "ridge retries": self._retries,
                   "images per second": sum(u.contribution.images for u in recent) / sum(u.total for u in recent),
                   "seconds/train pool models": mean([u.train for u in recent]),
                   "seconds/meta-gradients": mean([u.contribute for u in recent]),
                   "seconds/combine and step": mean([u.combine for u in recent]), "seconds/update": mean([u.total for u in recent])}
        self._draw(scalars, step)

    def _open_board(self) -> SummaryWriter:
        return SummaryWriter(self._board_folder, flush_secs=10, purge_step=self._purge)

    def _draw(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        """Points for TensorBoard, and all that it has so far to the disk. What a disk refuses is lost: that ends no run.

        A writer that has met an error repeats it for ever, so that there is none until `save` finds that the disk works again.
        """
        if self._board is None:
            return
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError:
            self._board = None

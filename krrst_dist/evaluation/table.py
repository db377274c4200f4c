"""The small table at the end of a run: one number a method, metric and seed, shown as mean and spread.

Knows nothing of how the numbers came about. Percentages are stored as they are shown (31.2, not 0.312), and the
metric's name says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import floor, isfinite, log10, nan
from statistics import fmean, pstdev

SCRATCH = "from scratch"
RANDOM = "random images + targets"
LABELLED = "random images + labels"
ALONE = "random images alone"
KRRST = "KRR-ST"
METHODS = (SCRATCH, RANDOM, LABELLED, ALONE, KRRST)
MISSING = "-"


@dataclass(frozen=True)
class Row:
    """One measurement. seed: the distillation seed. value: NaN where the run diverged."""

    method: str
    metric: str
    seed: int
    value: float


def text_table(rows: Iterable[Row]) -> str:
    """The table for a terminal: methods as rows, metrics as columns, mean +- std (population) over the seeds."""
    grid, caption = _grid(list(rows))
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(line, widths, strict=True))).rstrip() for line in grid]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:], caption]) + "\n"


def markdown_table(rows: Iterable[Row]) -> str:
    """The same table in Markdown."""
    grid, caption = _grid(list(rows))
    rule = ["---", *["---:"] * (len(grid[0]) - 1)]
    lines = ["| " + " | ".join(line) + " |" for line in [grid[0], rule, *grid[1:]]]
    return "\n".join([*lines, "", caption]) + "\n"


def drop(rows: Iterable[Row], metric: str, *, method: str = KRRST, against: str | None = RANDOM) -> dict[int, float]:
    """By how much `method` lies below `against`, as a fraction of the latter, for each seed that has both."""
    values = {(row.method, row.seed): row.value for row in rows if row.metric == metric}
    return {seed: 1 - values[method, seed] / values[against, seed]
            for name, seed in sorted(values) if name == method and (against, seed) in values}


def to_json(rows: Iterable[Row]) -> str:
    """One JSON array of rows; a value that is not finite is null."""
    return json.dumps([asdict(row) | {"value": row.value if isfinite(row.value) else None} for row in rows], indent=1)


def from_json(text: str) -> list[Row]:
    """The rows that `to_json` wrote."""
    return [Row(**row | {"value": nan if row["value"] is None else row["value"]}) for row in json.loads(text)]


def _grid(rows: list[Row]) -> tuple[list[list[str]], str]:
    """Cells with their headings, and the line that says what they are."""
    values: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        seeds = values.setdefault((row.method, row.metric), {})
        if row.seed in seeds:
            raise ValueError(f"two values for {row.method!r}, {row.metric!r}, seed {row.seed}: a table takes one; "
                             f"drop the older")
        seeds[row.seed] = row.value
    found = dict.fromkeys(row.method for row in rows)
    methods = [m for m in METHODS if m in found] + [m for m in found if m not in METHODS]
    metrics = list(dict.fromkeys(row.metric for row in rows))
    everywhere = sorted({row.seed for row in rows})
    columns = [_column([values.get((method, metric), {}) for method in methods], len(everywhere)) for metric in metrics]
    what = f"mean ± population std over seeds {', '.join(map(str, everywhere))}" if len(everywhere) > 1 \
        else f"one run, seed {everywhere[0]}"
    return [["method", *metrics], *map(list, zip(methods, *columns, strict=True))], what


def _column(by_method: list[dict[int, float]], seeds: int) -> list[str]:
    """'0.544 ± 0.012', three significant digits of the smallest mean; fewer seeds than the table has are counted,
    one seed has no spread, none is a dash."""
    means = [abs(fmean(by_seed.values())) for by_seed in by_method if by_seed]
    digits = max([0, *(2 - floor(log10(mean)) for mean in means if isfinite(mean) and mean > 0)])
    cells = []
    for values in map(list, map(dict.values, by_method)):
        cell = f"{fmean(values):.{digits}f}" if values else MISSING
        if len(values) > 1:
            cell += f" ± {_std(values):.{digits}f}"
        cells.append(cell + (f" (n = {len(values)})" if 0 < len(values) < seeds else ""))
    return cells


def _std(values: list[float]) -> float:
    return pstdev(values) if all(map(isfinite, values)) else nan

"""Tables as text, Markdown, LaTeX and CSV. Accuracies are fractions inside and percentages for people; CSV keeps what is stored.

Names come from anywhere, so each format escapes them: a method's name can neither break a table nor run in a spreadsheet
or a terminal. Knows no statistics: what a place says is `tables.py`'s business.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import floor, log10

from krrst_dist.results.tables import Difference, Entry, PaperTable

NOTHING = "There are no results yet."
MISSING = "–"


@dataclass(frozen=True)
class _Style:
    """How a format writes names and marks the best."""

    escape: Callable[[str], str]
    bold: Callable[[str], str]


def one_line(text: str) -> str:
    """Text without line breaks, control characters and invisible marks."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def escape_markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", one_line(text))


def escape_latex(text: str) -> str:
    return re.sub(r"[\\{}$&#^_~%<>–±]", lambda found: _LATEX.get(found[0], "\\" + found[0]), one_line(text))


_LATEX = {"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
          "–": "--", "±": r"$\pm$"}


def spreadsheet_safe(text: str) -> str:
    """Text that a spreadsheet takes for text: what would start a formula gets an apostrophe in front."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else text


def to_text(tables: Iterable[PaperTable]) -> str:
    """For a terminal; the best number of a column has a star before it."""
    return _joined(tables, _one_text)


def to_markdown(tables: Iterable[PaperTable]) -> str:
    return _joined(tables, _one_markdown)


def to_latex(tables: Iterable[PaperTable]) -> str:
    """For a paper that loads booktabs."""
    return _joined(tables, _one_latex, comment="% ")


def to_csv(tables: Iterable[PaperTable]) -> str:
    """A line for each place of each table, numbers as stored and in full; a place without a number has an empty mean, and a difference
    that is not paired 0 pairs."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["table", "task", "source", "resolution", "architecture", "target", "label_fraction", "metric", "spread_over",
                     "method", "column", "mean", "std", "n", "diverged", "failed", "state", "best", "p_value",
                     "against", "difference", "difference_low", "difference_high", "pairs"])
    for table in tables:
        for method in table.methods:
            for column in table.columns:
                entry, best = table.entry(method, column), method in table.best(column)
                p_value = table.p_value(column) if table.significance and best else None
                line = [table.subject.paper, *table.subject, table.metric, table.over, method, column, entry.mean, entry.std, entry.n,
                        entry.diverged, entry.failed, entry.state, int(best), p_value]
                gain = table.differences.get((method, column))
                line += [table.against, gain.mean, gain.low, gain.high, gain.pairs] if gain else [table.against, None, None, None, 0]
                writer.writerow([spreadsheet_safe(value) if isinstance(value, str) else value for value in line])
    return sink.getvalue()


def title(table: PaperTable) -> str:
    """What a table is about, in one line."""
    about = table.subject
    parts = [about.task, about.source and f"source {about.source}", about.target and f"target {about.target}", f"{about.resolution} px",
             about.architecture, "" if about.label_fraction == 1 else f"{100 * about.label_fraction:g}% of the labels",
             (table.metric or "no number") + (" [%]" if _is_share(table) else "")]
    return (f"{about.paper}: " if about.paper else "") + ", ".join(filter(None, parts))


def notes(table: PaperTable) -> list[str]:
    """What a reader must know to trust the table."""
    runs = _usual_runs(table)
    every = "evaluation seeds" if table.one_set_each else "all runs (distillation and evaluation seeds)"
    spread = every if table.over == "evaluation" else \
        "distillation seeds, each the mean of its evaluation seeds (over evaluation seeds where nothing was distilled)"
    best = f"; best: {'lowest' if table.lower_is_better else 'highest'}{' mean' if runs > 1 else ''}" if table.ranked else ""
    lines = [f"mean ± population std over {spread}; n = {runs} unless stated{best}" if runs > 1 else f"single runs{best}"]
    lines += [f"p: Welch's t-test of the best against the runner-up; {MISSING}: too few runs"] if table.significance else []
    lines += [f"less {table.against}: {'; '.join(_comparisons(table))}"] if table.against else []
    lines += ["a method with diverged runs is not ranked"] if any(e.diverged and e.n for e in table.entries.values()) else []
    lines += [f"{method}, {column}: not averaged, there are {entry.mixed}; narrow it down with --where"
              for (method, column), entry in sorted(table.entries.items()) if entry.mixed]
    dirty = " (+: with uncommitted changes)" if any(commit.endswith("+") for commit in table.commits) else ""
    return [*lines, f"commit {', '.join(table.commits)}{dirty}"]


def _comparisons(table: PaperTable) -> list[str]:
    """How methods are compared with the one that the table is against."""
    paired = {difference.paired for difference in table.differences.values()}
    found = ["difference of the runs with the same seeds, mean and its 95 % interval (Student's t)"] if True in paired else []
    found += ["not paired: difference of means, Welch's 95 % interval"] if False in paired else []
    return found or ["there is nothing to compare with it"]


def _grid(table: PaperTable, style: _Style) -> list[list[str]]:
    """Everything that stands between a table's lines, escaped, the heading first."""
    digits, runs = _digits(table), _usual_runs(table)
    best = {column: table.best(column) for column in table.columns}
    lines = [["method", *map(style.escape, table.columns)]]
    for method in table.methods:
        cells = {column: style.escape(_place(table, table.entry(method, column), digits, runs)) for column in table.columns}
        lines.append([style.escape(method), *(style.bold(cell) if method in best[column] else cell for column, cell in cells.items())])
    if table.significance:
        lines.append(["p", *map(style.escape, p_values(table))])
    for method in [m for m in table.methods if any((m, column) in table.differences for column in table.columns)]:
        gains = [_gain(table, table.differences.get((method, column)), digits) for column in table.columns]
        lines.append([style.escape(f"{method}, less {table.against}"), *map(style.escape, gains)])
    return lines


def _gain(table: PaperTable, gain: Difference | None, digits: int) -> str:
    """'+1.20 (0.40 to 2.00)'; how many pairs there are where not every run has one, and that there are none where others have some.

    digits: of the table's numbers. What is no share has one more here, as losses differ by little; a zero has no sign.
    """
    if gain is None:
        return MISSING
    scale, digits = (100, digits) if _is_share(table) else (1, digits + 1)
    mean = round(scale * gain.mean, digits)
    remarks = [] if gain.low is None else [f"{scale * gain.low:z.{digits}f} to {scale * gain.high:z.{digits}f}"]
    if gain.paired:
        remarks += [f"{gain.pairs} pairs"] if gain.pairs != _usual_runs(table) else []
    elif any(other.paired for other in table.differences.values()):
        remarks.append("not paired")
    return "+" * (mean > 0) + f"{mean:z.{digits}f}" + (f" ({', '.join(remarks)})" if remarks else "")


def place(table: PaperTable, method: str, column: str) -> str:
    """What stands in one place of a table, as text."""
    return _place(table, table.entry(method, column), _digits(table), _usual_runs(table))


def advantage(table: PaperTable, method: str, column: str) -> str:
    """A method less the one that the table is against, as text; '' where there is nothing to compare."""
    found = table.differences.get((method, column))
    return _gain(table, found, _digits(table)) if found else ""


def p_values(table: PaperTable) -> list[str]:
    """Of each column, as text; [] where the table has none."""
    return [_p(table.p_value(column)) for column in table.columns] if table.significance else []


def _place(table: PaperTable, entry: Entry, digits: int, runs: int) -> str:
    """'54.40 ± 1.20'; how many runs there are where it is not as many as usual; a word or a dash where there is no number."""
    others = [f"{count} {what}" for what, count in (("diverged", entry.diverged), ("failed", entry.failed)) if count]
    if entry.mean is None:
        return entry.state if entry.state != "missing" else MISSING
    scale = 100 if _is_share(table) else 1
    number = f"{scale * entry.mean:.{digits}f}" + ("" if entry.std is None else f" ± {scale * entry.std:.{digits}f}")
    remarks = ([f"n = {entry.n}"] if entry.n != runs or others else []) + others
    return number + (f" ({', '.join(remarks)})" if remarks else "")


def _digits(table: PaperTable) -> int:
    """Two decimals for percentages and FID; else three significant digits of the smallest mean."""
    if _is_share(table) or table.metric == "fid":
        return 2
    return max([0, *(min(12, 2 - floor(log10(abs(entry.mean)))) for entry in table.entries.values() if entry.mean)])


def _usual_runs(table: PaperTable) -> int:
    return max([entry.n for entry in table.entries.values()], default=0)


def _is_share(table: PaperTable) -> bool:
    return "accuracy" in table.metric


def _p(value: float | None) -> str:
    return MISSING if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _joined(tables: Iterable[PaperTable], one: Callable[[PaperTable], str], comment: str = "") -> str:
    return "\n".join(map(one, tables)) or f"{comment}{NOTHING}\n"


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right; a rule below the heading."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
            for line in lines]
    return [line.rstrip() for line in [text[0], "-" * len(text[0]), *text[1:]]]


def _one_text(table: PaperTable) -> str:
    lines = aligned(_grid(table, _Style(one_line, lambda cell: f"*{cell}")))
    return "\n".join([one_line(title(table)), "", *lines, *map(one_line, notes(table))]) + "\n"


def markdown_rows(lines: list[list[str]]) -> list[str]:
    """A Markdown table of escaped cells, the heading first."""
    return ["| " + " | ".join(line) + " |" for line in [lines[0], ["---", *["---:"] * (len(lines[0]) - 1)], *lines[1:]]]


def _one_markdown(table: PaperTable) -> str:
    lines = markdown_rows(_grid(table, _Style(escape_markdown, lambda cell: f"**{cell}**")))
    below = [f"- {escape_markdown(note)}" for note in notes(table)]
    return "\n".join([f"### {escape_markdown(title(table))}", "", *lines, "", *below]) + "\n"


def _latex_row(cells: list[str]) -> str:
    """What comes after the row before may not look like an argument of its end: * or [."""
    return "{}" * cells[0].startswith(("*", "[")) + " & ".join(cells) + r" \\"


def _one_latex(table: PaperTable) -> str:
    heading, *lines = [_latex_row(line) for line in _grid(table, _Style(escape_latex, lambda cell: rf"\textbf{{{cell}}}"))]
    caption = escape_latex(f"{title(table)}. {'; '.join(notes(table))}.")
    return "\n".join([r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
                      r"\toprule", heading, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

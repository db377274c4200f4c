"""The paper's tables from the long table of results: which runs stand in which place, and what they say together.

A table has one task, source, resolution, share of labels, metric and architecture; methods are its rows, targets its
columns. Task kd has architectures as columns, fid sources. A method without a distilled set (from scratch, Gaussian
noise) does not depend on the source and stands in every table that it fits. Numbers are kept as stored; how they are
written is `render.py`'s business.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from krrst_dist.results import layout
from krrst_dist.results.columns import codes, values
from krrst_dist.results.layout import Subject
from krrst_dist.results.schema import NO_METRIC, UNKNOWN, ResultsError
from krrst_dist.setting_names import flatten, nearest

Over = Literal["evaluation", "distillation"]


@dataclass(frozen=True)
class Entry:
    """One place of a table: the numbers of a method's runs in a column, and how many other runs have none.

    mixed: why the runs do not belong together, '' if they do. Mixed runs are never averaged.
    """

    values: tuple[float, ...] = ()
    diverged: int = 0
    failed: int = 0
    mixed: str = ""
    seeds: tuple[Any, ...] = ()
    """of each value, by which methods are paired"""

    @property
    def state(self) -> Literal["mixed", "ok", "diverged", "failed", "missing"]:
        return "mixed" if self.mixed else "ok" if self.values else "diverged" if self.diverged else "failed" if self.failed else "missing"

    @property
    def n(self) -> int:
        """Runs behind the mean."""
        return len(self.values) if not self.mixed else 0

    @cached_property
    def mean(self) -> float | None:
        return fmean(self.values) if self.n else None

    @cached_property
    def std(self) -> float | None:
        """Population standard deviation; a single run has none."""
        return _std(self.values) if self.n > 1 else None


@dataclass(frozen=True)
class Difference:
    """A method's numbers less another's: their mean, and its 95 % interval by Student's t, None where either has one run only.

    pairs: the seeds that are in both, by which numbers are paired; 0: there are not two, and it is the difference of the means.
    """

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def paired(self) -> bool:
        return self.pairs > 0

    @classmethod
    def of(cls, ours: Entry, theirs: Entry) -> Difference | None:
        """None where either has no mean."""
        if not (ours.n and theirs.n):
            return None
        other = dict(zip(theirs.seeds, theirs.values, strict=True))
        gains = [value - other[seed] for seed, value in zip(ours.seeds, ours.values, strict=True) if seed in other]
        if len(gains) > 1:
            return cls._within(fmean(gains), stdev(gains) / sqrt(len(gains)), len(gains) - 1, len(gains))
        if min(ours.n, theirs.n) < 2:
            return cls(ours.mean - theirs.mean, None, None, 0)
        error, freedom = _welch(ours, theirs)
        return cls._within(ours.mean - theirs.mean, error, freedom, 0)

    @classmethod
    def _within(cls, mean: float, error: float, freedom: float, pairs: int) -> Difference:
        """The interval of a mean with that standard error and so many degrees of freedom."""
        from scipy.stats import t  # slow to import, and rarely asked for

        half = float(t.ppf(0.975, freedom)) * error
        return cls(mean, mean - half, mean + half, pairs)


@dataclass(frozen=True)
class PaperTable:
    """One table. places: the runs behind each (method, column); a pair that is not in it has not been run.

    against: the method that all others are compared with; '' for none.
    """

    subject: Subject
    metric: str
    over: Over
    significance: bool
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    places: Mapping[tuple[str, str], Sequence[Run]]
    against: str = ""

    @cached_property
    def entries(self) -> dict[tuple[str, str], Entry]:
        """What stands in each place. Worked out when it is first asked for, as most tables of a large store are not looked at."""
        return {place: _entry(found, self.metric, self.over) for place, found in self.places.items()}

    @cached_property
    def commits(self) -> tuple[str, ...]:
        """Of the code behind the numbers; + for uncommitted changes."""
        found = {(run.about["commit"], run.about["dirty"]) for runs_there in self.places.values() for run in runs_there}
        return tuple(sorted({commit[:12] + "+" * dirty for commit, dirty in found}))

    @property
    def one_set_each(self) -> bool:
        """Do the runs behind each mean differ in their evaluation seed only?"""
        return all(len({run.about["distillation_seed"] for run in _counted(there, self.metric)}) < 2 for there in self.places.values())

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """Each method less the one that `against` names, where both have a number."""
        found = {(method, column): Difference.of(self.entry(method, column), self.entry(self.against, column))
                 for method, column in self.places if method != self.against}
        return {place: difference for place, difference in found.items() if difference}

    def entry(self, method: str, column: str) -> Entry:
        return self.entries.get((method, column), Entry())

    @property
    def ranked(self) -> bool:
        """Does the metric say how good a method is? A teacher's accuracy does not."""
        return not self.metric.startswith("teacher")

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "fid" or "loss" in self.metric

    def ranking(self, column: str) -> list[str]:
        """Methods from the best mean to the worst. Where a run diverged, the mean of the others says too much, and there is no rank."""
        if not self.ranked:
            return []
        ranked = [m for m in self.methods if self.entry(m, column).n and not self.entry(m, column).diverged]
        return sorted(ranked, key=lambda m: self.entry(m, column).mean, reverse=not self.lower_is_better)

    def best(self, column: str) -> set[str]:
        """The method with the best mean, with any that equal it; empty when there is nothing to compare."""
        ranked = self.ranking(column)
        return {m for m in ranked if self.entry(m, column).mean == self.entry(ranked[0], column).mean} if len(ranked) > 1 else set()

    def p_value(self, column: str) -> float | None:
        """Welch's t-test (two-sided) of the best against the runner-up; None when either has no spread to go by."""
        ranked = self.ranking(column)[:2]
        samples = [self.entry(m, column).values for m in ranked]
        if len(samples) < 2 or min(map(len, samples)) < 2 or not any(map(_std, samples)):
            return None
        from scipy.stats import ttest_ind  # slow to import, and rarely asked for

        return float(ttest_ind(*samples, equal_var=False).pvalue)


@dataclass
class Run:
    """One cell: the columns that all its rows share, and its numbers by metric."""

    about: dict[str, Any]
    values: dict[str, float | None]


def paper_tables(results: pa.Table | Sequence[Run], *, over: Over | None = None, significance: bool = False,
                 against: str = "") -> list[PaperTable]:
    """All tables that a store's best attempts (`ResultStore.read()`), or some `runs` of them, fill, in the paper's order.

    over: what the spread is over. evaluation: every run counts, as in the paper. distillation: one number for each
    distillation seed, the mean of its evaluation seeds; a method without distillation has one for each evaluation seed.
    None: distillation where methods are compared (significance, against), as runs of one set are not independent; else evaluation.
    against: a method that the others are compared with. Raises ResultsError for one that no result has.
    """
    over = over or ("distillation" if significance or against else "evaluation")
    if over not in ("evaluation", "distillation"):
        raise ResultsError(f"over = {over!r}: must be 'evaluation' or 'distillation'")
    chosen = runs(results) if isinstance(results, pa.Table) else results
    known = sorted({run.about["method"] for run in chosen})
    if against and against not in known:
        raise ResultsError(f"against = {against!r}: no result is of this method; {nearest(against, known)}")
    tables = []
    for subject, there in _by_subject(chosen).items():
        across = layout.across(subject.task)
        metrics = {metric for run in there if run.about["status"] == "ok" for metric in run.values} or {NO_METRIC}
        everywhere: dict[tuple[str, str], list[Run]] = defaultdict(list)
        for run in there:
            everywhere[run.about["method"], run.about[across]].append(run)
        for metric in sorted(metrics):
            places = {place: having for place, found in everywhere.items()
                      if (having := [run for run in found if metric in run.values or run.about["status"] != "ok"])}
            tables.append(PaperTable(subject, metric, over, significance, layout.methods(method for method, _ in places),
                                     layout.columns(subject, (column for _, column in places)), places, against))
    return sorted(tables, key=lambda t: (t.subject.place, t.metric))


def runs(results: pa.Table) -> list[Run]:
    """The cells of a store's best attempts. Data sets of several versions have them in their names."""
    wanted = ["cell", "status", "method", "source", "source_fingerprint", "set_fingerprint", "distillation_seed", "target",
              "target_fingerprint", "task", "architecture", "resolution", "label_fraction", "evaluation_seed", "hyperparameters",
              "distillation", "commit", "dirty"]
    cells = codes(results["cell"])
    firsts = np.unique(cells, return_index=True)[1]
    of_cells = results.select(wanted).take(pa.array(firsts))
    found = [Run(dict(zip(wanted, row, strict=True)), {}) for row in zip(*map(values, of_cells.columns), strict=True)]
    for cell, metric, value in zip(cells.tolist(), values(results["metric"]), results["value"].to_pylist(), strict=True):
        found[cell].values[metric] = value
    for name in ("source", "target"):
        _tell_versions_apart([run.about for run in found], name)
    return found


def _std(values: Sequence[float]) -> float:
    """Population standard deviation; the library's is exact, and a hundred times slower."""
    mean = fmean(values)
    return 0.0 if min(values) == max(values) else sqrt(fmean((value - mean) * (value - mean) for value in values))


def _welch(ours: Entry, theirs: Entry) -> tuple[float, float]:
    """Standard error of the difference of two means, and its degrees of freedom by Welch and Satterthwaite."""
    parts = [entry.std ** 2 / (entry.n - 1) for entry in (ours, theirs)]  # sample variance / n
    error = sqrt(sum(parts))
    if not error:
        return 0.0, 1.0
    return error, 1 / sum((part / sum(parts)) ** 2 / (entry.n - 1) for part, entry in zip(parts, (ours, theirs), strict=True))


def _tell_versions_apart(abouts: list[dict[str, Any]], name: Literal["source", "target"]) -> None:
    """Where a data set has several fingerprints at one resolution and task (another crop, another split), put them into its name."""
    versions: dict[Any, set[str]] = defaultdict(set)
    for about in abouts:
        versions[about[name], about["resolution"], about["task"]].add(about[f"{name}_fingerprint"])
    several = {place for place, found in versions.items() if len(found - {""}) > 1}
    for about in abouts if several else ():
        if (about[name], about["resolution"], about["task"]) in several:
            about[name] += f" ({about[f'{name}_fingerprint'][:8] or 'unknown version'})"


def _by_subject(runs: Iterable[Run]) -> dict[Subject, list[Run]]:
    subjects: dict[Subject, list[Run]] = defaultdict(list)
    without_set = []
    for run in runs:
        if run.about["set_fingerprint"] or run.about["task"] == "fid":
            subjects[Subject.of(run.about)].append(run)
        else:
            without_set.append(run)
    homes: dict[Subject, list[Subject]] = defaultdict(list)
    for subject in subjects:
        homes[subject._replace(source="")].append(subject)
    for run in without_set:
        subject = Subject.of(run.about)
        for home in homes.get(subject._replace(source="")) or [subject]:
            subjects[home].append(run)
    return subjects


def _counted(runs: Sequence[Run], metric: str) -> list[Run]:
    """Those that have a number and did not diverge."""
    return [run for run in runs if run.about["status"] == "ok" and run.values[metric] is not None]


def _entry(runs: Sequence[Run], metric: str, over: Over) -> Entry:
    numbers = [(run.about, run.values[metric]) for run in _counted(runs, metric)]
    failed = sum(run.about["status"] == "failed" for run in runs)
    by_seed: dict[Any, list[float]] = defaultdict(list)
    for about, value in numbers:
        seeds = about["distillation_seed"], about["evaluation_seed"]
        by_seed[seeds[0] if over == "distillation" and seeds[0] is not None else seeds].append(value)
    return Entry(tuple(map(fmean, by_seed.values())), len(runs) - len(numbers) - failed, failed, _mixed([about for about, _ in numbers]),
                 tuple(by_seed))


def _mixed(abouts: list[dict[str, Any]]) -> str:
    """Why runs must not be averaged, '' if they may."""
    if differing := _differing({about["hyperparameters"] for about in abouts}):
        return f"several recipes, which differ in {differing}"
    if differing := _differing({about["distillation"] for about in abouts} - {UNKNOWN}):
        return f"sets that were made with different settings: {differing}"
    if len({(about["distillation_seed"], about["set_fingerprint"]) for about in abouts}) > len({a["distillation_seed"] for a in abouts}):
        return "several distilled sets with the same distillation seed (set_fingerprint tells them apart)"
    return ""


def _differing(texts: set[str]) -> str:
    """The names of the settings in which canonical JSON dicts differ, '' where they are equal."""
    if len(texts) < 2:
        return ""
    written = [{name: json.dumps(value) for name, value in flatten(json.loads(text)).items()} for text in texts]
    names = {name for settings in written for name in settings}
    return ", ".join(sorted(name for name in names if len({settings.get(name) for settings in written}) > 1)) or "what they leave empty"

"""How the paper lays out its tables: which results share one, and the order of rows, columns and tables.

Knows names only, no numbers. Names are compared in lower case and by their first words, so that 'Random + targets'
stands where Random does; what the paper does not have comes last, in alphabetical order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

METHODS = ("from scratch", "gaussian", "random", "k means", "dsa", "dm", "mtt", "kip", "frepo", "krr st")
ALIASES = {"w o pre": "from scratch", "scratch": "from scratch", "kmeans": "k means", "krrst": "krr st"}
SOURCES = ("cifar100", "tinyimagenet", "imagenet", "imagenette")
TARGETS = ("cifar10", "cifar100", "aircraft", "cars", "cub2011", "dogs", "flowers")
"""behind the source itself, which Tables 1 and 2 have first"""
ARCHITECTURES = ("convnet", "vgg11", "alexnet", "mobilenet", "resnet10", "resnet18", "resnet50")

PAPER = {("finetune", "cifar100", 32, True): "Table 1", ("finetune", "tinyimagenet", 64, True): "Table 2",
         ("finetune", "imagenet", 64, True): "Table 3", ("finetune", "tinyimagenet", 64, False): "Figure 3, Tables 5-8",
         ("kd", "tinyimagenet", 64, False): "Table 4", ("finetune", "imagenette", 224, True): "Appendix D, first table",
         ("finetune", "imagenette", 224, False): "Appendix D, second table", ("fid", "", 32, True): "Appendix F",
         ("fid", "", 64, True): "Appendix F"}
"""(task, source, resolution, is it the paper's ConvNet; for fid, Inception) of the published tables, in the paper's order; all with all
labels"""
CONVNETS = {32: "convnet-128-256-512", 64: "convnet-64-128-256-512", 224: "convnet-32-64-128-256-512"}
"""the paper's, by resolution"""


class Subject(NamedTuple):
    """What a table is about; empty where its columns say it."""

    task: str
    source: str
    resolution: int
    architecture: str
    target: str
    label_fraction: float

    @classmethod
    def of(cls, row: dict[str, Any]) -> Subject:
        """The table that a row of results belongs to."""
        columns = across(row["task"])
        return cls(row["task"], "" if columns == "source" else row["source"], row["resolution"],
                   "" if columns == "architecture" else row["architecture"], row["target"] if columns == "architecture" else "",
                   row["label_fraction"])

    @property
    def paper(self) -> str:
        """The published table of the same layout, or ''."""
        return PAPER.get(self._published, "") if self.label_fraction == 1 else ""

    @property
    def place(self) -> tuple[Any, ...]:
        """To sort by: the paper's tables in its order, then the others."""
        return (list(PAPER).index(self._published) if self.paper else len(PAPER), *self)

    @property
    def _published(self) -> tuple[str, str, int, bool | None]:
        published = self.architecture == ("inception" if self.task == "fid" else CONVNETS.get(self.resolution))
        other_convnet = not published and _rank(self.architecture, ("convnet",)) == 0
        return self.task, self.source, self.resolution, None if other_convnet else published


def across(task: str) -> str:
    """What the columns of a task's tables are."""
    return {"kd": "architecture", "fid": "source"}.get(task, "target")


def methods(names: Iterable[str]) -> tuple[str, ...]:
    """Methods in the paper's order, each once."""
    return _ordered(names, METHODS)


def columns(subject: Subject, names: Iterable[str]) -> tuple[str, ...]:
    """The columns of a table in the paper's order, each once."""
    return _ordered(names, {"architecture": ARCHITECTURES, "source": SOURCES}.get(across(subject.task), (subject.source, *TARGETS)))


def _ordered(names: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=lambda name: (_rank(name, known), name.casefold(), name)))


def _rank(name: str, known: tuple[str, ...]) -> int:
    """Where a name stands in an order; behind all when it is not there."""
    words = _words(name)
    words = next((full + words.removeprefix(short) for short, full in ALIASES.items() if f"{words} ".startswith(f"{short} ")), words)
    return next((i for i, candidate in enumerate(known) if f"{words} ".startswith(f"{_words(candidate)} ")), len(known))


def _words(name: str) -> str:
    return re.sub("[^a-z0-9]+", " ", name.lower()).strip()

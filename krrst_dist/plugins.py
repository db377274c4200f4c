"""Distillation methods by name: a module of `krrst_dist.methods`, or an entry point of the group `krrst_dist.methods`.

Either has a `Method` to show: the module's METHOD, what the entry point names. A method is imported when it is asked for, so
that settings can be read without any. Knows no method.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

GROUP = "krrst_dist.methods"
_FOLDER = str(Path(__file__).parent / "methods")


def names() -> list[str]:
    """The methods that there are."""
    return sorted(_own() | {point.name for point in entry_points(group=GROUP)})


def load(name: str) -> Any:
    """The method of that name; one of ours goes before another package's. Raises KeyError where there is none."""
    if name in _own():
        return importlib.import_module(f"{GROUP}.{name}").METHOD
    for point in entry_points(group=GROUP, name=name):
        return point.load()
    raise KeyError(name)


def _own() -> set[str]:
    return {module.name for module in pkgutil.iter_modules([_FOLDER]) if not module.ispkg}

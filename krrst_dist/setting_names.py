"""Settings by name: dotted ones, the nearest to a wrong one, and the error that names one. What needs no settings imports these alone,
as they load at once."""

from __future__ import annotations

import difflib
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: says which field, its value, the rule and the remedy."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, known: list[str]) -> str:
    """' Did you mean X?' for the closest known name, or the list of all."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"

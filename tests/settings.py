"""Every setting that there is with KRR-ST, and for each another value that is allowed: for tests that leave none out."""

from __future__ import annotations

from typing import Any, get_args

from krrst_dist.config import Config, flatten
from krrst_dist.methods.krr_st import DistillSettings

_NAMES = {"source.dataset": "flowers", "target.network.name": "vgg11", "distill.pool.network.name": "mobilenet",
          "evaluate.datasets": ["cars", "dogs"], "preset": "another", "engine.min_actors": 1}


def another_value(field: str, value: Any) -> Any:
    """A value of the setting that differs from this one; all of them together are a run, too."""
    if field in _NAMES:
        return _NAMES[field]
    annotation = _annotation(field)
    choices = next((get_args(a) for a in (annotation, *get_args(annotation)) if all(isinstance(c, (str, int)) for c in get_args(a))), ())
    if choices:
        return next(choice for choice in choices if choice != value)
    if annotation == str | None:
        return "another.pt"
    if isinstance(value, bool) or annotation == bool | None:
        return not value
    if isinstance(value, list) or "tuple" in str(annotation):
        return [0.25, 0.5] if "float" in str(annotation) else [24, 48]
    if isinstance(value, float):
        return value / 2 + 0.125
    return 2 * value if value else 2


def settings(config: Config) -> dict[str, Any]:
    """All settings by dotted name, but the method, on which it depends which there are."""
    return {field: value for field, value in flatten(config.model_dump(mode="json")).items() if field != "method"}


def _annotation(field: str) -> Any:
    group: Any = Config
    *parents, leaf = field.split(".")
    for parent in parents:
        group = DistillSettings if parent == "distill" else group.model_fields[parent].annotation
    return group.model_fields[leaf].annotation

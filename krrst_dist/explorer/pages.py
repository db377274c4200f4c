"""Pages as HTML: templates filled with what the other modules worked out. Whatever comes from a result is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_SHORT = {"hyperparameters.": "recipe ", "distillation.": "set "}


def render(template: str, **values: Any) -> str:
    """A page. Names of templates are ours."""
    return _environment.get_template(template).render(**values)


def address(path: str, query: Mapping[str, Any], **changes: Any) -> str:
    """path?query with some values changed, or left out where they are None."""
    left = {name: value for name, value in (dict(query) | changes).items() if value not in (None, "", [])}
    return f"{path}?{urlencode(left, doseq=True)}" if left else path


def picture(svg: bytes, says: str) -> Markup:
    """A chart as an image of a page. As an image it cannot do anything, whatever the names in it. says: for those who do not see it."""
    source = base64.b64encode(svg).decode()
    return Markup('<img class="chart" src="data:image/svg+xml;base64,{}" alt="{}">').format(source, says)


def _metric(value: float | None, name: str) -> str:
    """As in the tables: shares in per cent."""
    return f"{100 * value:.2f} %" if value is not None and "accuracy" in name else _number(value)


def _number(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(name: str) -> str:
    for long, short in _SHORT.items():
        name = name.replace(long, short)
    return name


_environment = Environment(loader=PackageLoader("krrst_dist.explorer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                           lstrip_blocks=True)
_environment.globals |= {"address": address}
_environment.filters |= {"number": _number, "metric": _metric, "setting": _setting}

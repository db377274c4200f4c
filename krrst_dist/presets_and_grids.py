"""Settings as YAML files: the presets and grids that ship with the package, the user's own, and what starts from what.

A preset is a YAML file that may start from another (`base: NAME`, or the path of one, relative to the file that names
it). A setting that is not listed keeps the default written in `config.py`; an unknown key is refused with the nearest known one.
`distill` is for the preset's own `method`; what other methods are run with at its scale is in `methods: {NAME: ...}`.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from krrst_dist.config import DEFAULT_METHOD, Config, ConfigError, nearest, parse

CARRIED = "KRRST_SETTINGS"
"""Environment variable: the user's own YAML files that a job was submitted with, as YAML {path: settings, bases merged in}."""


def preset_names() -> list[str]:
    """The presets that ship with the package."""
    return shipped("presets")


def shipped(folder: str) -> list[str]:
    """Names of the YAML files in a folder of the package."""
    return sorted(p.name.removesuffix(".yaml") for p in resources.files(__package__).joinpath(folder).iterdir()
                  if p.name.endswith(".yaml"))


def load_preset(name: str, *, method: str | None = None, **overrides: Any) -> Config:
    """Read a preset (a name, or the path of a .yaml file), for another method than its own if one is named, and apply overrides given
    by dotted name.

    Example: `load_preset("cifar100", **{"distill.shards": 4, "seed": 1})`.

    Raises:
        ConfigError: unknown preset or key (with the nearest name), or a value out of range.
    """
    tree = read_yaml(name, "presets") | {"preset": Path(name).stem}
    tree = _of_method(tree, method or tree.get("method", DEFAULT_METHOD))
    tree.pop("methods", None)
    for dotted, value in overrides.items():
        for part in reversed(dotted.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
    return parse(tree)


def read_yaml(name: str, folder: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings in a YAML file and in its bases.

    name: of a file in `folder` ("presets", "grids") of the package, or the path of one; inside a job that was submitted with it, the
    path need not exist. above: the files that led here. The other files that a user's file names (its `base`, a grid's `preset`) are
    relative to its folder. Raises ConfigError.
    """
    kind = folder.removesuffix("s")
    if name in above:
        raise ConfigError(f"{kind} = {above[0]!r}: its bases go in a circle ({' -> '.join([*above, name])}); end it with one that has none")
    carried = yaml.safe_load(os.environ.get(CARRIED, "{}"))
    if name in carried:
        return carried[name]
    own = is_own_file(name)
    file = Path(name).expanduser() if own else resources.files(__package__).joinpath(folder, f"{name}.yaml")
    if not file.is_file():
        raise ConfigError(f"{kind} = {name!r}: no such {kind}; {nearest(name, shipped(folder))} (your own: a path that ends in .yaml)")
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{kind} = {name!r}: not YAML: {error}") from None
    if _values(tree, {}) > MOST_VALUES:
        raise ConfigError(f"{kind} = {name!r}: has more than {MOST_VALUES:,} values, each counted as often as an alias repeats it; "
                          f"settings are few")
    if not isinstance(tree, dict):
        raise ConfigError(f"{kind} = {name!r}: must be a mapping of settings, as in the {folder} that ship with the package")
    for key in tree:
        if not isinstance(key, str):
            raise ConfigError(f"{kind} = {name!r}: key {key!r} is not text, as YAML reads it; settings have names, put it in quotes if it "
                              f"is one")
    if own:
        tree = _named_beside(tree, name)
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{kind} = {name!r}: base = {base!r} must be the name of a {kind}")
    below = read_yaml(base, folder, (*above, name))
    return _merge(_of_method(below, tree["method"]) if "method" in tree else below, tree)


MOST_VALUES = 100_000
"""in a file of settings"""


def _values(tree: Any, known: dict[int, int]) -> int:
    """How many values there are in what a YAML file holds, in which one part may stand in many places. known: of parts seen before."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        known[id(tree)] = MOST_VALUES + 1  # a part that holds itself is without end
        known[id(tree)] = sum(_values(value, known) for value in (tree.values() if isinstance(tree, dict) else tree))
    return known[id(tree)]


def _of_method(tree: dict[str, Any], method: Any) -> dict[str, Any]:
    """A preset's settings with `method` instead of its own: of `distill` m alone stays, the rest is what `methods` has for it."""
    if method == tree.get("method", DEFAULT_METHOD):
        return tree
    shared = {key: value for key, value in (tree.get("distill") or {}).items() if key == "m"}
    return tree | {"method": method, "distill": _merge(shared, (tree.get("methods") or {}).get(method) or {})}


def is_own_file(name: str) -> bool:
    """Is it the path of a user's YAML file, and not the name of one that ships with the package?"""
    return name.endswith(".yaml")


def _named_beside(tree: Any, name: str) -> Any:
    """What the file `name` holds, with the paths of other YAML files in it, which are relative to its folder, from where `name` starts."""
    folder = os.path.dirname(os.path.expanduser(name))
    if isinstance(tree, list):
        return [_named_beside(value, name) for value in tree]
    if not isinstance(tree, dict):
        return tree
    return {key: os.path.normpath(os.path.join(folder, os.path.expanduser(value)))
            if key in ("base", "preset") and isinstance(value, str) and is_own_file(value) else _named_beside(value, name)
            for key, value in tree.items()}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both_trees = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_trees else value
    return merged

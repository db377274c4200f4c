"""Where a run's files are: what a path means depends on whether the run is a Ray job.

A job works in Ray's unpacked copy of the project on some node, where the caller's directory means nothing and results
would be lost; so paths inside a job are absolute or URIs. Reads environment variables and does not know Ray.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from krrst_dist.setting_names import ConfigError

PROJECT = Path(__file__).resolve().parents[1]
"""The folder that holds the krrst_dist package: the project's root, or Ray's copy of it inside a job."""

DATA = "KRRST_DATA"
"""Environment variable: the folder with the data sets when no --data is given."""

STORAGE = "KRRST_STORAGE"
"""Environment variable: folder or URI under which a job's results land when no --out is given."""


_KEY = re.compile(r"://[^/@:]*:(?!\d+(/|$)).*@")  # name and key before the host, and no host and port; a key may hold a slash


def in_ray_job() -> bool:
    """Is this the entry point of a submitted Ray job? (Ray sets this variable for it alone.)"""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def is_uri(path: str) -> bool:
    return "://" in path


def local(path: str) -> Path | None:
    """The local path behind a path or URI, None when it is remote. Raises ConfigError for a file URI that gives no absolute path, and for a
    URI with a key in it."""
    if _KEY.search(path):
        raise ConfigError(f"{_KEY.sub('://...@', path)!r}: has a key in it, and URIs are written to logs and results; give keys by "
                          f"environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or in ~/.aws/credentials")
    if not path.startswith("file://"):
        return None if is_uri(path) else Path(path)
    host, slash, rest = path.removeprefix("file://").partition("/")
    if host not in ("", "localhost") or not slash:
        raise ConfigError(f"{path!r}: a file URI gives an absolute path after three slashes, as in file:///folder/run; write it so, or "
                          f"give a plain path")
    return Path(slash + rest)


def absolute(path: str, *, base: Path) -> str:
    """A URI as it is; any other path made absolute, relative to `base`, with ~ expanded. Raises ConfigError as `local` does."""
    if is_uri(path):
        local(path)
        return path
    return os.path.normpath(base / Path(path).expanduser())


def resolve(path: str, *, name: str) -> str:
    """A path given by the user as an absolute path or URI; outside a job, relative to the working directory.

    name: the flag or variable it came from. Raises ConfigError for a relative path inside a job, or in a file URI.
    """
    if in_ray_job() and not is_uri(path) and not Path(path).expanduser().is_absolute():
        raise ConfigError(f"{name} = {path!r}: inside a Ray job a path is absolute or a URI, because the job runs in Ray's copy of the "
                          f"project on a node of the cluster; give an absolute path or a URI, or submit with `krrst submit`, which does so")
    try:
        return absolute(path, base=Path.cwd())
    except ConfigError as error:
        raise ConfigError(f"{name} = {error}") from None


def data_directory(data: str | None) -> Path:
    """Where the data sets are: `data`, else $KRRST_DATA, else the folder `data` under the project root.

    Raises ConfigError for a relative path inside a job, and for a URI.
    """
    given = data or os.environ.get(DATA)
    if given is None:
        return PROJECT / "data"
    if is_uri(given):
        raise ConfigError(f"--data = {given!r}: data sets are read from a folder; mount or copy it there first")
    return Path(resolve(given, name="--data" if data else DATA))


def output_directory(out: str | None, *, name: str) -> str:
    """Where a run writes: `out`, or by default a folder of its own.

    The default is runs/<name> under the project root (name: <preset>-<seed>); inside a job, the same name under
    $KRRST_STORAGE, or under ~/krrst_runs of the node that runs it. Raises ConfigError for a relative path inside a job, a
    whole bucket, and a file where a folder should be.
    """
    if out is not None:
        where = resolve(out, name="--out")
        if is_uri(where) and not where.partition("://")[2].rstrip("/").partition("/")[2]:
            raise ConfigError(f"--out = {out!r}: names a whole bucket; give a folder in it, as in {out.rstrip('/')}/run")
        here = local(where)
        there = next(folder for folder in (here, *here.parents) if os.path.exists(folder)) if here else None
        if there and not there.is_dir():
            raise ConfigError(f"--out = {out!r}: {there} is a file; give a folder")
        return where
    if not in_ray_job():
        return str(PROJECT / "runs" / name)
    storage = resolve(os.environ.get(STORAGE) or "~/krrst_runs", name=STORAGE)
    return f"{storage.rstrip('/')}/{name}"

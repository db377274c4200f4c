"""Which code is running: its commit, its fingerprint, and whether it is the code that was meant.

A Ray job sees neither .git nor the caller's directory, and an editable install on a node can shadow the code that was
uploaded; so the submitting side passes the commit along and the job checks what it imported. Does not know Ray.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from krrst_dist.paths import PROJECT
from krrst_dist.setting_names import ConfigError

COMMIT, DIRTY = "KRRST_COMMIT", "KRRST_DIRTY"


class Revision(NamedTuple):
    commit: str
    """40 hex digits, or "unknown" where there is no git"""
    dirty: bool
    """are there changes that the commit does not hold?"""

    def environment(self) -> dict[str, str]:
        """The variables that carry it into a job."""
        return {COMMIT: self.commit, DIRTY: str(int(self.dirty))}


def revision(root: Path = PROJECT) -> Revision:
    """The commit of the code: as the submitting side passed it along, else as git says."""
    if COMMIT in os.environ:
        return Revision(os.environ[COMMIT], os.environ.get(DIRTY) == "1")
    try:
        return Revision(_git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain")))
    except (OSError, subprocess.CalledProcessError):
        return Revision("unknown", False)


@cache
def code_fingerprint() -> str:
    """Hash of the package's .py and .yaml files (16 hex digits): equal on two machines that run the same code."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".yaml")):
        digest.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


DECIDING = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "ffcv", "ray")
"""The packages on whose versions results, or their way between hosts, depend."""


@cache
def versions() -> tuple[tuple[str, str], ...]:
    """What results depend on here beside our own code: Python and some packages, as (name, version)."""
    return ("Python", platform.python_version()), *((name, metadata.version(name)) for name in DECIDING)


def cpu_name() -> str:
    """This machine's processor, as Linux names it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def verify_uploaded_code(root: Path) -> None:
    """Make sure that this package was imported from `root`, the tree that a job script lies in.

    Raises ConfigError when another copy (an editable install, PYTHONPATH) was imported instead.
    """
    if PROJECT != root.resolve():
        raise ConfigError(f"krrst_dist was imported from {PROJECT}, but the job's own code is in {root.resolve()}: results would come from "
                          f"other code than was submitted; remove {PROJECT} from PYTHONPATH, or submit with `krrst submit`")


def _git(root: Path, *arguments: str) -> str:
    """Ask git about `root` alone, not about a repository that `root` happens to lie in."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}
    run = subprocess.run(["git", "-C", str(root), *arguments], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()

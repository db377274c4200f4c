"""What every test may rely on: one thread, this checkout's code in every process, real data, a small real cluster."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]

# Before torch and Ray read them, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
for name in ("RAY_ADDRESS", "KRRST_STORAGE", "KRRST_COMMIT", "KRRST_DIRTY"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from running import Running

    from krrst_dist.config import Config

torch.set_num_threads(1)
STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End with the tests' status. No user starts a dozen Ray clusters in one interpreter; unwinding what they leave in native threads
    has crashed it (139) after every test had passed. What users start is started by the tests as a process, and its status looked at.
    """
    if STATUS in config.stash:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets in Parquet: $KRRST_DATA, or ../shared/data beside the project."""
    folder = Path(os.environ.get("KRRST_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "cifar100-train.parquet").exists():
        pytest.fail(f"{folder} does not hold the real images that the tests read (cifar100-train.parquet and others): put them "
                    f"there, or set KRRST_DATA to the folder that holds them", pytrace=False)
    return folder


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A one-machine Ray cluster of two CPUs, with tokens on as everywhere."""
    ray.init(address="local", num_cpus=2, object_store_memory=300_000_000, include_dashboard=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts runs of the engine in `tmp_path`; those that still run when the test ends are stopped."""
    from running import Running

    runs = []

    def started(settings: Config, **how: bool | float) -> Running:
        runs.append(Running(settings, tmp_path, **how))
        return runs[-1]

    yield started
    for run in runs:
        run.insist()


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

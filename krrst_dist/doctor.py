"""`krrst doctor`: can this machine run everything, and what to do if not.

One small function a question; each answers with what was found and, where that is a problem, the remedy. Versions are
read from the packages' metadata; what has to be tried is tried in a process of its own, so that a broken package is reported
and ends nothing. Changes nothing on the machine, but for the logs of a small Ray cluster that lives for seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packaging.requirements import Requirement

from krrst_dist.paths import PROJECT

SETUP = "run `bash clusters/setup_node.sh` in the project's root"
GIB = 2**30


class Finding(NamedTuple):
    subject: str
    found: str
    remedy: str = ""
    """what to do; empty when all is well"""

    def __str__(self) -> str:
        line = f"{'problem' if self.remedy else 'ok     '}  {self.subject}: {self.found}"
        return f"{line}\n         -> {self.remedy}" if self.remedy else line


def main(arguments: Sequence[str]) -> int:
    """Print a line a finding; exit status 1 when there is a problem."""
    parser = argparse.ArgumentParser(prog="krrst doctor", description="Can this machine run krrst_dist? Says what to do if not.")
    parser.add_argument("--out", type=Path, default=PROJECT, help="folder that results and prepared data will go to (default: the project)")
    findings = examine(parser.parse_args(arguments).out)
    print("\n".join(map(str, findings)))
    problems = sum(bool(finding.remedy) for finding in findings)
    print(f"{problems} problem{'s' * (problems != 1)}" if problems else "this machine is ready")
    return int(problems > 0)


def examine(out: Path) -> list[Finding]:
    """All findings, in the order a user would mend them. out: folder that results will go to."""
    checks: Iterable[Callable[[], Finding]] = (
        python, packages, torchvision_fits, ffcv_works, gpu, ray_works, file_limit,
        lambda: disk("disk for results", out), lambda: disk("disk for Ray's files", Path(tempfile.gettempdir())), shared_memory,
    )
    return [check() for check in checks]


def python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    good = (3, 11) <= version <= (3, 12)
    return Finding("Python", f"{version[0]}.{version[1]}", "" if good else f"install Python 3.11 or 3.12, then {SETUP}")


def packages(requirements: Sequence[str] | None = None) -> Finding:
    """Is every package there that pyproject.toml asks for, in a version it allows?"""
    try:
        wanted = [Requirement(text) for text in (requirements if requirements is not None else metadata.requires("krrst_dist") or [])]
    except metadata.PackageNotFoundError:
        return Finding("packages", "krrst_dist itself is not installed", SETUP)
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        installed = _version(requirement.name)
        if installed is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, not {requirement.specifier}")
    main_ones = ", ".join(f"{name} {_version(name) or '-'}" for name in ("torch", "torchvision", "ray", "ffcv"))
    return Finding("packages", "; ".join(wrong) or main_ones, SETUP if wrong else "")


def torchvision_fits() -> Finding:
    """Every torchvision is made for one torch."""
    torch, made_for = _version("torch"), None
    for text in metadata.requires("torchvision") or [] if _version("torchvision") else []:
        requirement = Requirement(text)
        made_for = requirement.specifier if requirement.name == "torch" else made_for
    if torch is None or made_for is None:
        return Finding("torch and torchvision", "one of them is missing", SETUP)
    if not made_for.contains(torch, prereleases=True):
        return Finding("torch and torchvision", f"torch {torch} beside a torchvision made for torch{made_for}", SETUP)
    tried = _in_fresh_process("from krrst_dist.torchvision_ops import torchvision; print(torchvision.__version__)")
    if tried.returncode != 0:
        return Finding("torch and torchvision", _last_line(tried), SETUP)
    return Finding("torch and torchvision", "they fit")


def ffcv_works() -> Finding:
    """Write a tiny file of images and read it back, in a process of its own: a broken library may end it."""
    tried = _in_fresh_process("from krrst_dist import doctor; doctor.write_and_read_a_beton()")
    if tried.returncode == 0:
        return Finding("FFCV", "wrote and read a small file")
    return Finding("FFCV", _last_line(tried), f"{SETUP}; if that does not help, reinstall it against this machine's libraries: "
                   f"{sys.executable} -m pip install --force-reinstall --no-deps --no-binary ffcv --no-cache-dir ffcv")


def write_and_read_a_beton() -> None:
    """Eight 16-px images through FFCV. Raises whatever is wrong."""
    from krrst_dist.data.beton import write_beton
    from krrst_dist.data.beton_decoder import BetonDecoder

    images = np.arange(8 * 16 * 16 * 3, dtype=np.uint8).reshape(8, 16, 16, 3)  # [n, H, W, 3]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.beton")
        write_beton(path, [(image, 0) for image in images], resolution=16, encoding="raw", progress=False)
        decoder = BetonDecoder([(path, 8)])
        read = decoder.read(np.arange(8))[0]
        decoder.close()
    if not np.array_equal(read, images):
        raise RuntimeError("FFCV read other pixels than were written")


def gpu() -> Finding:
    """A GPU is not needed; one that torch cannot use is a problem."""
    tried = _in_fresh_process("import torch; print(*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep=', ')")
    if tried.returncode != 0:
        return Finding("GPU", _last_line(tried), SETUP)
    if names := tried.stdout.strip():
        return Finding("GPU", names)
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout.strip():
        return Finding("GPU", f"there is one, but torch {_version('torch')} cannot use it", "install a CUDA build of torch that fits the "
                       "driver (pytorch.org, Get started), in the version that clusters/constraints.txt names")
    return Finding("GPU", "none, work is done on CPUs")


def ray_works(deadline_s: float = 60) -> Finding:
    """Start a cluster of one CPU, as every run without a cluster does, and let it run a task.

    `ray job submit` needs the dashboard's HTTP server, which ray[default] brings.
    """
    missing = [name for name in ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client") if _version(name) is None]
    if missing:
        return Finding("Ray", f"{_version('ray')}, without its dashboard ({', '.join(missing)} missing)", SETUP)
    tried = _in_fresh_process("from krrst_dist.on_ray import cluster; cluster.start_local(num_cpus=1); import ray; "
                              "assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42", deadline_s=deadline_s)
    if tried.returncode == 0:
        return Finding("Ray", f"{_version('ray')}, with its dashboard, started a cluster and ran a task")
    return Finding("Ray", f"{_version('ray')} could not start a cluster here and run a task: {_last_line(tried)}",
                   "see gcs_server.out, raylet.out and dashboard.log in /tmp/ray/session_latest/logs; Ray needs a machine that is not too "
                   "busy, room for files and processes (`ulimit -n`, `ulimit -u`) and connections to its own address, which a firewall, a "
                   f"VPN or proxy variables (`unset http_proxy`) can prevent; if an import failed, {SETUP}")


def file_limit(minimum: int = 4096) -> Finding:
    """Ray holds several sockets and files a worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = f"run `ulimit -n {min(hard, 65536)}` in the shell that starts the run" + (
        "" if hard >= minimum else f" after raising the hard limit ({hard}) in /etc/security/limits.conf")
    return Finding("open files", f"at most {soft}", "" if soft >= minimum else remedy)


def disk(subject: str, folder: Path, *, minimum: float = 5 * GIB, fullest: float = 0.95) -> Finding:
    """Enough free space on the disk that holds `folder` (or will hold it)? Ray stops spilling at 95 % full."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    usage = shutil.disk_usage(there)
    found = f"{usage.free / GIB:.1f} GiB free at {there} ({usage.used / usage.total:.0%} full)"
    enough = usage.free >= minimum and usage.used / usage.total < fullest
    return Finding(subject, found, "" if enough else f"free some space ({minimum / GIB:g} GiB at least, below {fullest:.0%} full) or "
                   "use another disk (--out and --cache; TMPDIR and `ray start --temp-dir` for Ray's files)")


def shared_memory(folder: Path = Path("/dev/shm"), *, minimum: float = GIB) -> Finding:
    """Ray's object store lives in shared memory, and falls back to slow files when there is little."""
    if not folder.is_dir():
        return Finding("shared memory", f"there is no {folder}", f"mount a tmpfs of a few GiB at {folder}")
    free = shutil.disk_usage(folder).free
    return Finding("shared memory", f"{free / GIB:.1f} GiB free at {folder}", "" if free >= minimum else
                   f"enlarge it (`mount -o remount,size=4g {folder}`; in a container `docker run --shm-size=4g`)")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _in_fresh_process(code: str, *, deadline_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program. One that is not done in time is ended, and has failed with that as its last line."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:  # no pipes, which its children could keep open
        process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True,
                                   start_new_session=True)
        late = False
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = [(stream.seek(0), stream.read())[1] for stream in (out, err)]
    error = f"it was not done in {deadline_s:g} s" if late else said[1]
    return subprocess.CompletedProcess(process.args, process.returncode, said[0], error)


def _last_line(run: subprocess.CompletedProcess[str]) -> str:
    lines = run.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with status {run.returncode}"

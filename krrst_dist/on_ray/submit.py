"""Hands a job to a Ray cluster by `ray job submit`, and stays with it until it ends.

The cluster is one that runs, or, without an address, one on this machine that lives as long as the job. What a job cannot
know is passed along: paths are made absolute, and the commit and the user's own YAML files travel as environment variables.
Does not know what the job does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import requests
import yaml

from krrst_dist.grid_config import load_grid
from krrst_dist.on_ray.cluster import ClusterError, job_cluster, ray_command, token
from krrst_dist.on_ray.group import PINNED
from krrst_dist.on_ray.stopping import handled
from krrst_dist.paths import PROJECT, STORAGE, absolute, data_directory
from krrst_dist.presets_and_grids import CARRIED, is_own_file, read_yaml
from krrst_dist.provenance import Revision, revision

JOB = "jobs/distill_imagenet.py"
PATH_FLAGS = ("--data", "--out", "--cache", "--target-checkpoint", "--target.checkpoint")
LEFT_BEHIND = [".git", ".venv", "runs", "/data", "/build", "__pycache__", "*.egg-info", ".pytest_cache", ".ruff_cache",
               ".import_linter_cache"]
STOP_SECONDS = 60  # that a stopped job has to write its last checkpoint
ANSWER_SECONDS = 10  # that a cluster's dashboard has to answer a first question
READY_SECONDS = 120  # that a cluster may take, after it answers, until it takes jobs
ACCEPTED, NOT_READY = b"submitted successfully", b"No available agent to submit job"  # what `ray job submit` prints
OVERRULING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # to Ray's commands these mean more than their --address


def submit(arguments: Sequence[str], *, address: str | None = None, script: str = JOB, root: Path = PROJECT) -> int:
    """Run `python SCRIPT ARGUMENTS` as a Ray job, show what it prints, and return the exit status of `ray job submit`.

    address: of the cluster's dashboard, http://host:8265; default: $RAY_ADDRESS. Without either the job gets a
        one-machine cluster of its own.
    script: the job, relative to `root`, the folder that is uploaded.

    Ctrl-C (or SIGTERM, or a closed terminal) stops the job: it gets a SIGTERM and STOP_SECONDS to end by itself.

    Raises ClusterError when no cluster answers at the address; ConfigError for a YAML file that cannot be read.
    """
    if name := "--address" if address else "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else None:
        address = address or os.environ["RAY_ADDRESS"]
        check_address(address, name=name)
    arguments = absolute_paths(_with_data(arguments), base=Path.cwd())
    settings = own_files(arguments)
    with handled(signal.default_int_handler, signal.SIGTERM, signal.SIGHUP):
        if address:
            return _run(address, ["python", script, *arguments], root=root, storage=os.environ.get(STORAGE), settings=settings)
        storage = absolute(os.environ.get(STORAGE) or "runs", base=root)
        folder = Path(tempfile.mkdtemp(prefix="krrst-ray-"))
        with job_cluster(folder) as address:
            status = _run(address, [sys.executable, script, *arguments], root=root, storage=storage, settings=settings)
        if status == 0:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"Ray's logs of this job are in {folder}")
        return status


def check_address(address: str, *, name: str) -> None:
    """Does a cluster's dashboard answer there? Raises ClusterError, in seconds: Ray itself tries for minutes and ends in a traceback.

    name: where the address came from.
    """
    scheme, _, rest = address.rpartition("://")
    if scheme not in ("http", "https") or not rest:
        host = rest.partition(":")[0] if rest != "auto" else ""
        raise ClusterError(f"{name} = {address!r}: a job is submitted to the cluster's dashboard, http://HOST:8265; host:port (usually "
                           f"6379) is what `krrst distill` and jobs/ join with RAY_ADDRESS; give --address http://{host or 'HOST'}:8265")
    shown = token()
    headers = {"Authorization": f"Bearer {shown}"} if shown else {}
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", headers=headers, timeout=ANSWER_SECONDS)
        found = f"something answers there that is no Ray dashboard (status {answer.status_code})"
        wants_token, is_ray = answer.status_code in (401, 403), "ray_version" in answer.text
    except requests.RequestException as error:
        found, wants_token, is_ray = f"no cluster answers there ({_reason(error)})", False, False
    if wants_token:
        found = "there is none here" if shown is None else "the one here is another (that of RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, if set)"
        raise ClusterError(f"{name} = {address!r}: the cluster asks for its token and {found}; copy the head's ~/.ray/auth_token to the "
                           f"same place here")
    if not is_ray:
        raise ClusterError(f"{name} = {address!r}: {found}; check that the cluster is up (`ray status` on its head), that the port is the "
                           f"dashboard's (8265 by default) and that this machine reaches it (`ray dashboard CLUSTER.yaml` opens a tunnel)")


def _reason(error: BaseException) -> str:
    """In a few words, what is at the bottom of an error of `requests`, which wraps the cause several times."""
    while inner := next((e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, BaseException)), None):
        error = inner
    return str(error).rpartition(": ")[2] or type(error).__name__


def own_files(arguments: Sequence[str]) -> dict[str, str]:
    """The variable that carries the user's own YAML files into a job: those its arguments name, and presets that such a grid names.

    Empty when there are none. Raises ConfigError.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default="")
    parser.add_argument("--grid", default="")
    given, _ = parser.parse_known_args(arguments)
    files = {}
    presets = [given.preset]
    if is_own_file(given.grid):
        files[given.grid] = read_yaml(given.grid, "grids")
        presets += [entry.preset or "" for entry in load_grid(given.grid).sets]
    files |= {preset: read_yaml(preset, "presets") for preset in presets if is_own_file(preset)}
    return {CARRIED: yaml.safe_dump(files)} if files else {}


def _with_data(arguments: Sequence[str]) -> list[str]:
    """The arguments with the folder that --data stands for here when it is not given: a job would look for it in Ray's copy."""
    given = any(argument == "--data" or argument.startswith("--data=") for argument in arguments)
    default = data_directory(None)
    return list(arguments) if given or not default.is_dir() else [*arguments, "--data", str(default)]


def absolute_paths(arguments: Sequence[str], *, base: Path) -> list[str]:
    """The arguments with every path flag's value as an absolute path or URI (`--data X` and `--data=X`)."""
    def is_path(flag: str, value: str) -> bool:
        return flag in PATH_FLAGS or (flag in ("--preset", "--grid") and value.endswith(".yaml"))

    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if equals and is_path(flag, value):
            result.append(f"{flag}={absolute(value, base=base)}")
        elif result and is_path(result[-1], argument):
            result.append(absolute(argument, base=base))
        else:
            result.append(argument)
    return result


def runtime_env(code: Revision, storage: str | None, settings: Mapping[str, str]) -> dict[str, object]:
    """What the job's processes get beside the uploaded code. settings: as `own_files` makes them."""
    variables = code.environment() | settings | {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    variables |= {name: os.environ[name] for name in PINNED if name in os.environ}
    return {"env_vars": variables | ({STORAGE: storage} if storage else {}), "excludes": LEFT_BEHIND}


def _run(address: str, entrypoint: list[str], *, root: Path, storage: str | None, settings: Mapping[str, str]) -> int:
    code = revision(root)
    submission = f"krrst-{uuid.uuid4().hex[:12]}"
    # Clients show the token only when told to, even where there is one.
    environment = ({"RAY_AUTH_MODE": "token"} if token() else {}) | {k: v for k, v in os.environ.items() if k not in OVERRULING}
    command = [ray_command(), "job", "submit", "--address", address, "--submission-id", submission, "--working-dir", str(root),
               "--runtime-env-json", json.dumps(runtime_env(code, storage, settings)),
               "--metadata-json", json.dumps({"commit": code.commit, "dirty": str(code.dirty)}), "--", *entrypoint]
    stop = [ray_command(), "job", "stop", "--address", address, submission]
    end = time.monotonic() + READY_SECONDS
    while True:
        held = bytearray()
        # In a session of its own, so that Ctrl-C reaches us alone.
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True) as shown:
            try:
                _pass_on(shown, held)
            except KeyboardInterrupt:
                print(f"stopping job {submission}", flush=True)
                subprocess.run(stop, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
                if ACCEPTED not in held:
                    shown.terminate()
                _pass_on(shown, held)
                return 128 + signal.SIGINT
        if ACCEPTED in held:
            return shown.returncode
        if NOT_READY not in held or time.monotonic() > end:
            _print(held)
            return shown.returncode


def _pass_on(process: subprocess.Popen, held: bytearray) -> None:
    """Print what the process prints, from the line on that says that its job is accepted; what came before is kept in `held`."""
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        if ACCEPTED not in held:
            held += piece
            piece = bytes(held[held.rfind(b"\n", 0, held.find(ACCEPTED)) + 1:]) if ACCEPTED in held else b""
        _print(piece)


def _print(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()

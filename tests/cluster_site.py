"""A cluster as a user has one, for tests: a laptop with a copy of the project, three hosts, and an S3 server that all of them reach.

`ray up` with the shipped clusters/onprem.yaml makes the cluster, with its marked lines edited. See `hosts.py` for what a host is.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from hosts import LAPTOP, VENV, Host, missing, several

NAMES = ("head", "one", "two")
S3 = f"http://{LAPTOP}:9000"
KEYS = "[default]\naws_access_key_id = tests\naws_secret_access_key = only-for-tests\n"
PROJECT = "/root/project"
DESCRIPTION = "clusters/onprem.yaml"
DASHBOARD = "http://127.0.0.1:8265"
"""To which the laptop submits jobs: the tunnel of `ray dashboard`"""
PROMPT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "0", "RAY_AUTH_MODE": "token", "AWS_ENDPOINT_URL": S3}
ASK = """
from urllib.request import Request, urlopen
token = open("/root/.ray/auth_token").read().strip()
asked = Request("http://127.0.0.1:8265/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
print(urlopen(asked, timeout=50).read().decode())
"""
LEFT_OUT = (".venv", "runs", "__pycache__", "*.egg-info", ".*_cache")

# What a user edits, and what this user writes instead. Each stands on a line marked EDIT, or below one that is.
EDITS = {
    "head_ip: 192.0.2.10": "head_ip: {head}",
    "worker_ips: [192.0.2.11, 192.0.2.12]": "worker_ips: [{one}, {two}]",
    "ssh_user: ubuntu": "ssh_user: root",
    "# \"~/.aws/credentials\":": "\"~/.aws/credentials\":",
    "# - grep -qs AWS_ENDPOINT_URL": "- grep -qs AWS_ENDPOINT_URL",
    "http://192.0.2.20:9000": S3,
}


@dataclass(frozen=True)
class Site:
    """The laptop, the hosts by name, and what one does with them."""

    laptop: Host
    hosts: dict[str, Host]

    def on_laptop(self, command: str, *, timeout: float, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of the user's, in the project's folder."""
        return self.laptop.run(command, timeout=timeout, check=check, cwd=PROJECT, environment=PROMPT | environment)

    def begin(self, command: str, log: Path) -> subprocess.Popen:
        """The same, without waiting for its end."""
        with open(log, "wb") as file:
            return subprocess.Popen(self.laptop.command(command, cwd=PROJECT, environment=PROMPT), cwd="/", stdin=subprocess.DEVNULL,
                                    stdout=file, stderr=file)

    def up(self) -> None:
        """`ray up`, a tunnel to the dashboard, and wait until all hosts have joined."""
        self.on_laptop(f"ray up -y {DESCRIPTION}", timeout=900)
        self.begin(f"exec ray dashboard {DESCRIPTION}", self.laptop.folder / "dashboard.log")
        self.wait_for_nodes(len(self.hosts))

    def nodes(self) -> list[str]:
        """Addresses of the nodes that live, as the head's dashboard has it; none where it does not answer."""
        with suppress(RuntimeError, subprocess.TimeoutExpired, ValueError):
            said = self.hosts["head"].run(f"python -I -S -c {shlex.quote(ASK)}", timeout=60).stdout
            raylets = [node["raylet"] for node in json.loads(said)["data"]["summary"]]
            return sorted(raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE")
        return []

    def listing(self, uri: str) -> str:
        """What the S3 server holds below a URI, as it tells it."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        address = f"{S3}/{bucket}?list-type=2&prefix={prefix}"
        look = f"from urllib.request import urlopen; print(urlopen('{address}', timeout=50).read().decode())"
        return self.laptop.run(f'python -I -S -c "{look}"').stdout

    def wait_for_nodes(self, number: int, deadline_s: float = 600) -> None:
        wait(lambda: len(self.nodes()) == number, f"{number} nodes", deadline_s=deadline_s, every=2)


def wait(ready: Callable[[], object], what: str, *, deadline_s: float, every: float = 0.5) -> None:
    """Until it is so. Raises AssertionError at the deadline."""
    end = time.monotonic() + deadline_s
    while not ready():
        assert time.monotonic() < end, f"waited {deadline_s:.0f} s in vain for {what}"
        time.sleep(every)


@contextmanager
def site() -> Iterator[Site]:
    """The machines, with nothing of Ray running yet."""
    lacking = missing()
    assert not lacking, f"this machine lacks {', '.join(lacking)}; `bash tests/run.sh --cluster` as root installs what it can"
    with tempfile.TemporaryDirectory(prefix="krrst-hosts-") as folder, several(Path(folder), NAMES) as (laptop, hosts):
        made = Site(laptop, {host.name: host for host in hosts})
        _furnish_laptop(made)
        for host in hosts:
            _furnish(host)
        yield made


def _furnish_laptop(made: Site) -> None:
    """The project, its edited description of the cluster, keys, and the S3 server (a container or another machine's, elsewhere)."""
    home = made.laptop.home
    _install(made.laptop, PROJECT)
    shutil.copytree(ROOT, home / "project", symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    file = home / "project" / DESCRIPTION
    text = file.read_text()
    for before, after in EDITS.items():
        lines = text.splitlines()
        places = [i for i, line in enumerate(lines) if before in line]
        assert len(places) == 1 and "EDIT" in "\n".join(lines[max(0, places[0] - 1):places[0] + 1]), f"{before!r} is no line to edit"
        text = text.replace(before, after.format(**{name: host.address for name, host in made.hosts.items()}))
    file.write_text(text)
    (home / ".aws").mkdir()
    (home / ".aws/credentials").write_text(KEYS)
    (home / ".aws/credentials").chmod(0o600)
    made.laptop.run("ray get-auth-token --generate > /dev/null", timeout=120)
    made.begin("exec python -m moto.server -H 0.0.0.0 -p 9000 > /dev/null", made.laptop.folder / "s3.log")
    make = "import boto3; boto3.client('s3', region_name='us-east-1').create_bucket(Bucket='bucket')"
    wait(lambda: made.on_laptop(f'python -c "{make}"', timeout=60, check=False).returncode == 0, "the S3 server", deadline_s=120)


def _furnish(host: Host) -> None:
    """What the cluster's set-up would have made, so that it has nothing to do: hosts have no network to install from.

    ~/krrst/.venv is the tests' own environment, in which the package is installed in place from ~/krrst, as set-up does it. (Set-up
    itself is tested where the tests begin, and in a bare system by test_node.py.)
    """
    (host.home / "krrst").mkdir()
    (host.home / "krrst/.venv").symlink_to(VENV)
    resources = json.dumps({"CPU": 1, "object_store_memory": 300_000_000})  # of the whole machine's
    (host.home / ".bashrc").write_text(f"export OMP_NUM_THREADS=1 RAY_OVERRIDE_RESOURCES='{resources}'\n")
    _install(host, "/root/krrst")
    # Its stamp is a hash of these files, which `ray up` copies, and of the place (setup_node.sh).
    files = [ROOT / name for name in ("clusters/constraints.txt", "pyproject.toml", "clusters/setup_node.sh")]
    stamp = hashlib.sha256(b"".join(file.read_bytes() for file in files) + b"/root/krrst\n").hexdigest()
    (host.folder / "venv/.krrst-setup").write_text(f"{stamp}\n")


def _install(host: Host, place: str) -> None:
    """As if the package were installed in place from there in the host's environment, and not from this checkout."""
    for finder in Path(VENV).glob("lib/python*/site-packages/__editable___krrst_dist*finder.py"):
        there = host.folder / "venv" / finder.relative_to(VENV)
        there.parent.mkdir(parents=True)
        there.write_text(re.sub(r"'[^']*(/krrst_dist[^']*)'", rf"'{place}\1'", finder.read_text()))

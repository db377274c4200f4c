"""A new node of a cluster, from nothing: the set-up commands of clusters/gpu.yaml, one after the other, in a bare Debian.

The bare system is this machine's release, in a folder, with this machine's network, package sources and certificates. Takes many
minutes: FFCV is built there. Needs root and debootstrap; `bash tests/run.sh --cluster` runs it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

pytestmark = pytest.mark.cluster

OURS = ("PATH", "HOME", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "KRRST_VENV")  # everything else of the environment goes along
TAKEN_ALONG = ("/etc/apt", "/etc/pip.conf", "/etc/ssl/certs", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates",
               "/root/.config/pip", "/root/.pip")  # what apt and pip may be told here
ENTER = r"""
set -e
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --rbind /opt "$1/opt"  # where pip may be told to look
exec chroot "$@"
"""


class Bare:
    """A folder with a bare system in it, whose root's home is /root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: str, timeout: float) -> str:
        """A command as `ray up` would run it over ssh; its output. Raises AssertionError when it fails."""
        environment = {name: value for name, value in os.environ.items() if name not in OURS}
        environment |= {"HOME": "/root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        shell = ["bash", "--login", "-c", "-i", f"source ~/.bashrc; cd; {command}"]
        ran = subprocess.run(["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                              "bash", "-c", ENTER, "enter", self.folder, *shell], env=environment, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
        assert ran.returncode == 0, f"{command}\n{ran.stdout}"
        return ran.stdout


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Iterator[Bare]:
    """As a new machine has it: nothing but the base system, and what `ray up` copies to it."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        pytest.fail("needs root and debootstrap, which `bash tests/run.sh --cluster` installs", pytrace=False)
    folder = tmp_path_factory.mktemp("bare")
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    sources = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME)"], check=True, capture_output=True, text=True)
    mirror = next(line.split()[0] for line in sources.stdout.splitlines() if line.split()[1:] == [release])
    subprocess.run(["debootstrap", "--variant=minbase", release, folder, mirror], check=True, stdout=subprocess.DEVNULL, timeout=1800)
    for path in map(Path, TAKEN_ALONG):
        there = folder / path.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, there, dirs_exist_ok=True)
        elif path.exists():
            shutil.copy(path, there)
    (folder / "opt").mkdir(exist_ok=True)
    shutil.copy("/etc/resolv.conf", folder / "etc")
    shutil.copy("/etc/hosts", folder / "etc")
    home = folder / "root"
    for remote, local in description()["file_mounts"].items():
        there = home / remote.removeprefix("~/")
        there.parent.mkdir(parents=True, exist_ok=True)
        if local.startswith("~"):
            there.write_text("a token")
        elif (ROOT / local).is_dir():
            shutil.copytree(ROOT / local, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / local, there)
    yield Bare(folder)
    shutil.rmtree(folder)


def description() -> dict:
    return yaml.safe_load((ROOT / "clusters/gpu.yaml").read_text())


def test_a_bare_machine_becomes_a_node_by_the_commands_of_the_description(bare):
    for command in (*description()["setup_commands"], *description()["head_setup_commands"]):
        print(f"\n$ {command}\n{bare.run(command, timeout=3600)}", flush=True)
    assert (bare.folder / "root/.ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert "ray, version" in bare.run("ray --version", timeout=300)
    assert "ready" in bare.run("python -c 'import boto3, ffcv, krrst_dist, torch; print(\"ready\")'", timeout=300)
    assert "nothing to do" in bare.run("bash ~/krrst/clusters/setup_node.sh", timeout=300)

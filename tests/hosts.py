"""Several hosts on one machine, for tests: each has its own network, processes, name, /root, /tmp, /run and /dev/shm, and an sshd.

A host is a set of Linux namespaces whose first process is sshd: killing that is a power-off. What it sees of this machine is
the system (/usr, /etc, ...) and the Python environment, at its own path and writable for this host alone; not the checkout. The
first host is the "laptop": it holds the bridge that the others are plugged into. There is no way from here to the machine's own
network, which stays as it is. Nothing of a host has a name on the machine, and all of it ends with this process, however that ends.

Needs Linux, root, and Debian's openssh-server, rsync and iproute2.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NEEDED = ("setpriv", "unshare", "nsenter", "ip", "rsync", "ssh", "ssh-keygen", "/usr/sbin/sshd")
NETWORK = "10.77.0"
LAPTOP = f"{NETWORK}.1"
VENV, PYTHON = (str(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix))
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt")

# In the new namespaces, as process 1: puts the host's own file system together and becomes sshd.
# $1: the host's folder; $2: its name; $3: its address; $4: the virtual environment; $5: the Python it was made from.
BOOT = r"""
set -eu
host=$1 name=$2 address=$3 venv=$4 python=$5 root=$1/view
mount --make-rprivate /
hostname "$name"
mkdir -p "$root"
mount -t tmpfs host "$root"
cd "$root"
mkdir -p dev proc sys run root tmp var/tmp etc mnt
for part in SYSTEM; do
    if [ -L "/$part" ]; then cp -d "/$part" "$part"
    elif [ -d "/$part" ]; then mkdir "$part"; mount --bind -o ro "/$part" "$part"; fi
done
mount -t overlay etc -o "lowerdir=/etc,upperdir=$host/etc,workdir=$host/etc-work" etc
mount --bind "$host/root" root
mount --bind "$host/tmp" tmp
mount --rbind /dev dev
mount -t tmpfs -o size=2g,mode=1777 shm dev/shm
mount -t proc proc proc
mount --rbind /sys sys
if [ "$python" != /usr ]; then mkdir -p ".$python"; mount --bind -o ro "$python" ".$python"; fi
mkdir -p ".$venv"
mount -t overlay venv -o "lowerdir=$venv,upperdir=$host/venv,workdir=$host/venv-work" ".$venv"
mkdir -p run/sshd
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > etc/hosts
echo 'nameserver 127.0.0.1' > etc/resolv.conf  # which refuses at once
ip link set lo up
exec chroot . env -i HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    /usr/sbin/sshd -D -e -f /etc/ssh/sshd_config
""".replace("SYSTEM", " ".join(SYSTEM))

SSHD = """
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
MaxStartups 100
PidFile none
"""


def missing() -> list[str]:
    """What this machine lacks to be several."""
    lacking = [] if os.geteuid() == 0 and sys.platform == "linux" else ["root on Linux"]
    return lacking + [tool for tool in NEEDED if shutil.which(tool) is None]


class Host:
    """One host. Its /root and /tmp lie in `folder` and outlive a power-off."""

    def __init__(self, folder: Path, name: str, address: str, laptop: Host | None = None) -> None:
        self.folder, self.name, self.address, self._laptop = folder, name, address, laptop
        self._shell: subprocess.Popen | None = None
        self._log = folder / "sshd.log"
        for part in ("root", "tmp", "etc/ssh", "etc-work", "venv", "venv-work"):
            (folder / part).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "etc/ssh/sshd_config").write_text(SSHD)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "etc/ssh/host_key"], check=True)

    @property
    def home(self) -> Path:
        """Its /root, as seen from here."""
        return self.folder / "root"

    def boot(self) -> None:
        """Power on. Raises RuntimeError when its sshd does not come up."""
        with open(self._log, "ab") as log:
            self._shell = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child",
                 "bash", "-c", BOOT, "boot", self.folder, self.name, self.address, VENV, PYTHON],
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        _until(self._is_sshd, 30, f"{self.name} to boot, see {self._log}", self._shell)
        if self._laptop is None:
            self.run("ip link add bridge type bridge && ip link set bridge up && ip address add " + self.address + "/24 dev bridge")
        else:
            self._laptop.enter(f"ip link add {self.name} type veth peer name eth0 netns {self._pid()} && "
                               f"ip link set {self.name} master bridge up", "--net")
            self.run(f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up")

    def power_off(self) -> None:
        """Kill every process on it at once."""
        if self._shell is not None:
            with _ignoring(ProcessLookupError, IndexError):
                os.kill(self._pid(), signal.SIGKILL)
            self._shell.kill()
            self._shell.wait()
            self._shell = None
            shutil.rmtree(self.folder / "tmp", ignore_errors=True)
            (self.folder / "tmp").mkdir(mode=0o1777)

    def cut(self) -> None:
        """Pull its network cable."""
        self._laptop.run(f"ip link set {self.name} down")

    def heal(self) -> None:
        """Plug it in again."""
        self._laptop.run(f"ip link set {self.name} up")

    def command(self, command: str, *, environment: dict[str, str] | None = None, cwd: str = "/root") -> list[str]:
        """What runs a bash command line on it, with the environment's programs on PATH."""
        given = {"PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root",
                 "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"} | (environment or {})
        pairs = [f"{name}={value}" for name, value in given.items()]
        inside = ["--net", "--mount", "--pid", "--uts", "--ipc", "--root"]
        return ["setpriv", "--pdeathsig", "KILL", "nsenter", "--target", str(self._pid()), *inside, "env", "-i", "-C", cwd, *pairs,
                "bash", "-c", command]

    def run(self, command: str, *, timeout: float = 120, check: bool = True, **how: object) -> subprocess.CompletedProcess[str]:
        """Run a bash command line on it; how: as in `command`. Raises RuntimeError with what it printed where it fails."""
        ran = subprocess.run(self.command(command, **how), cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, timeout=timeout)
        if check and ran.returncode:
            raise RuntimeError(f"on {self.name}: {command}: status {ran.returncode}\n{ran.stdout}")
        return ran

    def enter(self, command: str, *namespaces: str) -> None:
        """Run a bash command line in some of its namespaces only."""
        subprocess.run(["nsenter", "--target", str(self._pid()), *namespaces, "bash", "-c", command], check=True)

    def processes(self, pattern: str) -> list[int]:
        """Its processes whose command line matches, by their number there."""
        found = self.run(f"exec pgrep -f -- {shlex.quote(pattern)}", check=False)  # in place of the shell, which would match, too
        return [int(pid) for pid in found.stdout.split()]

    def _pid(self) -> int:
        """Of its first process, as seen from here."""
        children = Path(f"/proc/{self._shell.pid}/task/{self._shell.pid}/children").read_text().split()
        return int(children[0])

    def _is_sshd(self) -> bool:
        with _ignoring(OSError, IndexError):
            return Path(f"/proc/{self._pid()}/comm").read_text() == "sshd\n"
        return False


@contextmanager
def several(folder: Path, names: Sequence[str]) -> Iterator[tuple[Host, list[Host]]]:
    """The laptop and hosts of these names, which it can reach by ssh, at 10.77.0.10 and on. folder: empty, on a disk."""
    laptop = Host(folder / "laptop", "laptop", LAPTOP)
    hosts = [Host(folder / name, name, f"{NETWORK}.{10 + i}", laptop) for i, name in enumerate(names)]
    try:
        for host in (laptop, *hosts):
            host.boot()
        laptop.run("mkdir -m 700 .ssh && ssh-keygen -q -t ed25519 -N '' -f .ssh/id_ed25519")
        for host in hosts:
            (host.home / ".ssh").mkdir(mode=0o700)
            shutil.copy(laptop.home / ".ssh/id_ed25519.pub", host.home / ".ssh/authorized_keys")
        yield laptop, hosts
    finally:
        for host in (*hosts, laptop):
            host.power_off()


def _until(ready, deadline_s: float, what: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + deadline_s
    while not ready():
        if time.monotonic() > end or process.poll() is not None:
            raise RuntimeError(f"waited in vain for {what}")
        time.sleep(0.05)


@contextmanager
def _ignoring(*errors: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except errors:
        pass

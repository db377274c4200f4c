"""How processes of torch.distributed find each other. On one host they meet in a file and talk over the loopback, so that nothing listens
to the network. On several, the device is the one of the host's address: gloo guesses by the host's name, and may take the loopback."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import uuid
from pathlib import Path

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of a device


def interface_of(address: str) -> str | None:
    """Name of the device that has an IPv4 address; None where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # has no IPv4 address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


LOOPBACK = "127.0.0.1"


def use_device_of(address: str) -> None:
    """Let process groups of this process use the device with that address: gloo, unless $GLOO_SOCKET_IFNAME names one; NCCL, which guesses
    well, for the loopback only."""
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if address == LOOPBACK:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def meeting_place(address: str, folder: Path) -> str:
    """Where a process group can begin, as torch.distributed's `init_method`. address: of this host; LOOPBACK for a group on it alone, which
    meets in a file in `folder`."""
    if address == LOOPBACK:
        return f"file://{folder}/krrst-group-{uuid.uuid4().hex}"
    return f"tcp://{address}:{free_port(address)}"


def free_port(address: str) -> int:
    """A TCP port on which nothing listens now."""
    with socket.create_server((address, 0)) as unused:
        return unused.getsockname()[1]

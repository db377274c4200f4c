"""Which network device torch.distributed is to use on a host: gloo guesses by the host's name, and may take the loopback."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

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


def tell_gloo(address: str) -> None:
    """Let process groups of this process use the device of the host's address, unless $GLOO_SOCKET_IFNAME names one."""
    if name := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def free_port(address: str) -> int:
    """A TCP port on which nothing listens now."""
    with socket.create_server((address, 0)) as unused:
        return unused.getsockname()[1]

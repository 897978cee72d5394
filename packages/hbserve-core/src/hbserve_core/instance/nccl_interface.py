"""Network interface on which NCCL listens: that of the address at which an instance's peers reach it."""

import array
import fcntl
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

SIOCGIFCONF = 0x8912
IFREQ_BYTES, IFNAME_BYTES = 40, 16
"""Sizes of Linux's `struct ifreq` and of its name on 64-bit machines. After the name comes a socket address, whose IPv4
address is 4 bytes after its start."""
MOST_ADDRESSES = 1024
VARIABLE, FAMILY = "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"


def keep_nccl_to(address: str) -> None:
    """Make NCCL in this process, and in those that it starts, listen on the interface of an IP address, unless the
    environment names one. By default NCCL takes the first interface that is not the loopback, even if all peers are on
    this host.

    NCCL reads the variables once, when a process makes its first group.
    """
    if VARIABLE in os.environ:
        return
    name = interface_of(address)
    if name is None:
        logger.debug("no interface has %s: NCCL takes the one that it finds", address)
        return
    os.environ[VARIABLE] = f"={name}"
    if ":" in address:
        os.environ.setdefault(FAMILY, "AF_INET6")


def interface_of(address: str) -> str | None:
    """Return the name of this host's interface that has an IP address, or None. All of 127.0.0.0/8 belongs to the
    loopback."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 4 and wanted.is_loopback:
        wanted = ipaddress.ip_address("127.0.0.1")
    return next((name for name, found in _addresses(wanted.version) if found == wanted), None)


def _addresses(version: int) -> Iterator[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    if version == 6:
        table = Path("/proc/net/if_inet6")
        for row in table.read_text().splitlines() if table.exists() else []:
            digits, *_, name = row.split()
            yield name, ipaddress.IPv6Address(bytes.fromhex(digits))
        return
    entries = array.array("B", bytes(IFREQ_BYTES * MOST_ADDRESSES))
    where, size = entries.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        told = fcntl.ioctl(asking, SIOCGIFCONF, struct.pack("iP", size, where))
    (num_bytes,) = struct.unpack_from("i", told)
    for start in range(0, num_bytes, IFREQ_BYTES):
        name = entries[start : start + IFNAME_BYTES].tobytes().partition(b"\0")[0].decode()
        first = start + IFNAME_BYTES + 4
        yield name.partition(":")[0], ipaddress.IPv4Address(entries[first : first + 4].tobytes())

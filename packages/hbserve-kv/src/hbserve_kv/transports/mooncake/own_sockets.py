"""Sockets that a library has opened in this process, found and changed from outside, for what it has no call for.

Linux: /proc/self/fd has the sockets, /proc/thread-self/net the connections of the network namespace that they are in.
"""

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path


def _own_sockets() -> Iterator[tuple[str, socket.socket]]:
    """(inode, the socket, which may be closed here without closing the library's)."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since, or no socket that Python knows
            inode = os.readlink(f"/proc/self/fd/{name}")
            if inode.startswith("socket:["):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    yield inode[len("socket:[") : -1], found


def _connections_to(host: str, port: int) -> set[str]:
    """Inodes of the sockets of this namespace that are connected or connecting to there."""
    try:
        wanted = str(ipaddress.ip_address(host))
    except ValueError:  # a name: then the port must do
        wanted = ""
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path(f"/proc/thread-self/net/{table}")
        for row in path.read_text().splitlines()[1:] if path.exists() else []:
            columns = row.split()
            address, _, remote_port = columns[2].partition(":")
            if int(remote_port, 16) == port and wanted in ("", _readable(address)):
                found.add(columns[9])
    return found


def _readable(address: str) -> str:
    """An address as /proc writes it: words of 4 bytes, hexadecimal, each with its lowest byte first."""
    words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
    found = ipaddress.ip_address(struct.pack(f"<{len(words)}I", *words))
    return str(getattr(found, "ipv4_mapped", None) or found)


def hang_up(host: str, port: int) -> None:
    """End what this process has connected there, or is connecting: calls that wait for an answer fail at once."""
    wanted = _connections_to(host, port)
    for inode, found in _own_sockets():
        if inode in wanted:
            found.shutdown(socket.SHUT_RDWR)


def look_every(port: int, interval_s: float) -> None:
    """How long accept() waits at most where this process listens on `port`."""
    seconds, rest_s = divmod(interval_s, 1)
    for _, found in _own_sockets():
        if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and found.getsockname()[1] == port:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest_s * 1e6)))

"""Sockets that a library has opened in this process: found and changed from outside, because the library has no call
for that.

On Linux, /proc/self/fd lists the sockets, and /proc/thread-self/net the connections of their network namespace.
"""

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

SO_ATTACH_FILTER = 26
FEWEST_HOPS_LEFT = {
    socket.AF_INET: (socket.IPPROTO_IP, 21),  # IP_MINTTL
    socket.AF_INET6: (socket.IPPROTO_IPV6, 73),  # IPV6_MINHOPCOUNT
}
"""Socket options that set how many hops a packet must have left, or be dropped."""
MOST_HOPS = 255
BPF_LOAD_WORD, BPF_LOAD_BYTE, BPF_JUMP_IF_EQUAL, BPF_SHIFT_RIGHT, BPF_RETURN = 0x20, 0x30, 0x15, 0x74, 0x06
NETWORK_HEADER = 0x1_0000_0000 - 0x10_0000
"""SKF_NET_OFF of linux/filter.h, where the codes above come from too; Python has no names for these."""
WHOLE, NOTHING = 0xFFFF_FFFF, 0
"""Return values of a filter: how many bytes of the packet to keep."""
LONGEST_NAME = 1 << 10
_Instruction = tuple[int, int, int, int]
"""An instruction: operation, how many instructions to skip if it is true and if it is false, and operand."""


def _own_sockets() -> Iterator[tuple[str, socket.socket]]:
    """Yield the inode of each socket of this process, with a duplicate of the socket, whose end leaves the library's
    open."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since, or not a socket that Python knows
            inode = os.readlink(f"/proc/self/fd/{name}")
            if inode.startswith("socket:["):
                with socket.socket(fileno=os.dup(int(name))) as found:
                    yield inode[len("socket:[") : -1], found


def _connections_to(host: str, port: int) -> set[str]:
    """Return the inodes of the sockets of this namespace that are connected, or connecting, to that address."""
    try:
        wanted = str(ipaddress.ip_address(host))
    except ValueError:  # a name, so that only the port is compared
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
    """Convert an address from the form that /proc has: hexadecimal words of 4 bytes, each with its lowest byte
    first."""
    words = struct.unpack(f">{len(address) // 8}I", bytes.fromhex(address))
    found = ipaddress.ip_address(struct.pack(f"<{len(words)}I", *words))
    return str(getattr(found, "ipv4_mapped", None) or found)


def hang_up(host: str, port: int) -> None:
    """End this process's connections to that address, and attempts to connect. Calls that wait for an answer fail at
    once."""
    wanted = _connections_to(host, port)
    for inode, found in _own_sockets():
        if inode in wanted:
            found.shutdown(socket.SHUT_RDWR)


def look_every(port: int, interval_s: float) -> None:
    """Make accept() return at least every `interval_s` where this process listens on `port`."""
    seconds, rest_s = divmod(interval_s, 1)
    for _, found in _listening():
        if found.getsockname()[1] == port:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(rest_s * 1e6)))


def let_nobody_in(published: Iterable[bytes]) -> None:
    """Drop what arrives at those listening sockets of this process whose address, in C's form, is in one of these
    values.

    Existing connections stay. This uses a socket filter, because closing or shutting down a listening socket makes the
    library's thread that waits on it fail. If the kernel does not let this process set a filter (see `_filter`), this
    drops packets with no more than the usual 64 hops.
    """
    for _, found in _listening():
        if any(_as_in_c(found) in value for value in published):
            try:
                _filter(found, [(BPF_RETURN, 0, 0, NOTHING)])
            except PermissionError:
                found.setsockopt(*FEWEST_HOPS_LEFT[found.family], MOST_HOPS)


def checked_address(value: bytes, published: Sequence[bytes]) -> bytes:
    """Return what a peer publishes for Gloo, after a check. Gloo reads beyond the end of the value if the two lengths
    in it are wrong; they precede the host's name and the address.

    Raises ConnectionError if the value is unlike what this side has published. If this side's value has another form
    than expected, nothing is compared.
    """
    mine = [_lengths(each) for each in published]
    if mine and mine[0] is not None and _lengths(value) != mine[0]:
        raise ConnectionError(f"the peer has published {len(value)} bytes that are no address of Gloo")
    return value


def _lengths(published: bytes) -> tuple[int, int] | None:
    """Return the length of the address, and of what follows the host's name; None if the value has another form."""
    name_length = int.from_bytes(published[:8], sys.byteorder)
    rest = published[8 + name_length :] if name_length < LONGEST_NAME else b""
    address_length = int.from_bytes(rest[:8], sys.byteorder)
    return (address_length, len(rest)) if 0 < address_length <= len(rest) - 8 else None


def listening_everywhere() -> set[str]:
    """Return the inodes of the sockets on which this process listens on all interfaces."""
    return {inode for inode, found in _listening() if ipaddress.ip_address(found.getsockname()[0]).is_unspecified}


def listen_only_at(addresses: Iterable[str], inodes: Collection[str]) -> None:
    """Drop whatever arrives at these listening sockets unless it was sent to one of these addresses, IPv4 or IPv6.

    Raises:
        PermissionError: the kernel does not let this process filter any of them: see `_filter`.
    """
    program = [instruction for each in addresses for instruction in _keep_if_sent_to(each)]
    program.append((BPF_RETURN, 0, 0, NOTHING))
    for inode, found in _listening():
        if inode in inodes:
            _filter(found, program)


def _keep_if_sent_to(address: str) -> Iterator[_Instruction]:
    """Yield instructions that keep a packet sent to this address. A packet sent elsewhere goes on to the instructions
    behind these."""
    wanted = ipaddress.ip_address(address)
    words = struct.unpack(f">{len(wanted.packed) // 4}I", wanted.packed)
    left = 1 + 2 * len(words)
    yield BPF_LOAD_BYTE, 0, 0, NETWORK_HEADER
    yield BPF_SHIFT_RIGHT, 0, 0, 4
    yield BPF_JUMP_IF_EQUAL, 0, left, wanted.version
    for place, word in enumerate(words):
        left -= 2
        yield BPF_LOAD_WORD, 0, 0, NETWORK_HEADER + (16 if wanted.version == 4 else 24) + 4 * place
        yield BPF_JUMP_IF_EQUAL, 0, left, word
    yield BPF_RETURN, 0, 0, WHOLE


def _listening() -> Iterator[tuple[str, socket.socket]]:
    for inode, found in _own_sockets():
        is_of_ip = found.family in (socket.AF_INET, socket.AF_INET6)
        if is_of_ip and found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield inode, found


def _filter(listening: socket.socket, program: Sequence[_Instruction]) -> None:
    """Attach a program to a socket, and to the connections that it accepts.

    Raises:
        PermissionError: Linux requires CAP_NET_ADMIN for TCP since 2026, in fixes of older releases (6.18.44) too.
    """
    code = ctypes.create_string_buffer(b"".join(struct.pack("@HBBI", *each) for each in program))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


def _as_in_c(listening: socket.socket) -> bytes:
    """Return the part of a socket's address that follows the family in sockaddr_in and sockaddr_in6."""
    host, port, *_ = listening.getsockname()
    between = bytes(4) if listening.family == socket.AF_INET6 else b""  # flow information
    return struct.pack("!H", port) + between + socket.inet_pton(listening.family, host.partition("%")[0])

"""Addresses, `host:port` or `[::1]:port`: the only place that formats, parses and checks them."""

import asyncio
import errno
import ipaddress
import logging
import re
import socket

from hbserve_rpc.errors import InvalidAddress

logger = logging.getLogger(__name__)

MAX_PORT = 65535
LABEL = r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)"
LONGEST_NAME = 253


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of the address of a peer that is to be reached there.

    Raises:
        InvalidAddress: the text is not an address, or nobody can be reached there. Has the text and what is expected.
    """
    match = re.fullmatch(r"(?:\[(?P<bracketed>[^\[\]]+)\]|(?P<plain>[^\[\]]+)):(?P<port>[0-9]{1,5})", text)
    if match is None or "://" in text or not 1 <= int(match["port"]) <= MAX_PORT:
        raise InvalidAddress(f"{text!r}: expected HOST:PORT, or [HOST]:PORT for IPv6, with a port from 1 to {MAX_PORT}")
    host = match["plain"] if match["bracketed"] is None else match["bracketed"]
    if (":" in host) != (match["bracketed"] is not None):
        raise InvalidAddress(f"{text!r}: brackets are for an IPv6 host, which needs them: [::1]:{match['port']}")
    try:
        check_host(host)
    except InvalidAddress as error:
        raise InvalidAddress(f"{text!r}: its host is {error}") from None
    if is_wildcard(host):
        here = format_address("::1" if ":" in host else "127.0.0.1", int(match["port"]))
        raise InvalidAddress(
            f"{text!r}: {host} is an address to listen on, not to connect to; on the same machine use {here}"
        )
    return host, int(match["port"])


def check_host(host: str) -> None:
    """Check that a server could listen at this host: an IP address without brackets, or a name. Asks no name server.

    Raises:
        InvalidAddress: it could not. The message begins with the value and says what is expected.
    """
    if problem := _problem(host):
        raise InvalidAddress(f"{host!r}: {problem}")


def check_peer_host(host: str) -> None:
    """Check that others can be told to connect to this host: as `check_host` does, and it must mean the same to all.

    Raises:
        InvalidAddress: they cannot. The message begins with the value and says what is expected.
    """
    check_host(host)
    if is_wildcard(host):
        raise InvalidAddress(
            f"{host!r}: means every address of a machine, so peers cannot connect to it; expected one that they can "
            "use, for example 10.0.0.5, or 127.0.0.1 if all are on one machine"
        )
    if "%" in host:
        raise InvalidAddress(
            f"{host!r}: the zone {host.partition('%')[2]!r} means something else on each machine; expected an address "
            "that is not link-local"
        )


def is_wildcard(host: str) -> bool:
    """Whether a server that binds this host listens on every address of its machine."""
    found = _ip(host)
    return found is not None and found.is_unspecified


def is_loopback(host: str) -> bool:
    """Whether only processes of the same machine can reach a server that listens there. Names are not looked up."""
    found = _ip(host)
    return found.is_loopback if found is not None else canonical_host(host) == "localhost"


def canonical_host(host: str) -> str:
    """Return the same text for the same address, however it was written. Names are not looked up."""
    found = _ip(host)
    return str(found) if found is not None else host.lower().removesuffix(".")


def is_here(host: str) -> bool:
    """Whether a host is this machine, under any of its addresses or names. May ask a name server."""
    try:
        found = {place[0] for *_, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:  # a name that nobody knows
        return False
    return any(is_own_address(str(address)) for address in found)


def is_own_address(address: str) -> bool:
    """Whether a server could listen at this address. Only a plain refusal by the system means no. Any other error comes
    up again when a server does listen."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as trying:
        try:
            trying.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


async def look_up(host: str) -> str:
    """Return a numeric address for a name, IPv4 if it has one. A numeric address is returned unchanged, at once.

    Raises:
        OSError: the name is not known.
    """
    if _ip(host) is not None:
        return host
    found = await asyncio.get_running_loop().getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    return str(found[0][4][0])


async def nobody_listens(address: str, timeout_s: float) -> bool:
    """Whether the host itself says that nothing listens there. False if something listens, or if its network does not
    answer, perhaps only for a moment."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(*parse_address(address))
    except ConnectionRefusedError:
        return True
    except (OSError, TimeoutError) as error:
        logger.debug("%s cannot be looked at: %s", address, error)
        return False
    writer.close()
    return False


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _problem(host: str) -> str:
    """Return what is wrong with the host, or "" if nothing is."""
    if not isinstance(host, str) or not host:
        return "expected an IP address or a name"
    if host[0] == "[" and host[-1] == "]":
        return f"expected it without brackets, {host[1:-1]!r}"
    found = _ip(host)
    if found is not None:
        return _problem_of_ip(found)
    if re.search(r":[0-9]+$", host) and host.count(":") == 1:
        return "expected only the host; its port is given separately"
    if ":" in host or "/" in host:
        return "expected an IP address or a name; it is neither"
    if re.search(r"(^|\.)([0-9]+|0[xX][0-9a-fA-F]*)\.?$", host):
        return "expected an IPv4 address of four numbers from 0 to 255, without leading zeros"
    if not re.fullmatch(rf"{LABEL}(\.{LABEL})*\.?", host) or len(host) > LONGEST_NAME:
        return "expected an IP address or a name; a name has ASCII letters, digits, hyphens and dots"
    return ""


def _problem_of_ip(found: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if found.is_multicast or str(found) == "255.255.255.255":
        return "is a multicast or broadcast address; expected that of one machine"
    zone = getattr(found, "scope_id", None)
    if zone is not None and not re.fullmatch(r"[A-Za-z0-9_.@-]+", zone):
        return "expected the name of a network interface after '%'"
    needs_zone = found.version == 6 and found.is_link_local
    if needs_zone and zone is None:
        return f"is link-local, which needs its zone; expected one, as in '{found}%eth0'"
    if zone is not None and not needs_zone:
        return "a zone is for link-local addresses; expected it without '%'"
    return ""

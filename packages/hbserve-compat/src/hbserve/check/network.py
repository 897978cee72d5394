"""Addresses of a deployment, seen from this host: its own can be bound, and those of others are reached."""

import asyncio
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from hbserve.check.finding import Finding
from hbserve_rpc.address import format_address, is_here, is_wildcard, look_up
from hbserve_scheduler import DeploymentConfig

REACH_TIMEOUT_S = 3.0
FIREWALL = "a firewall, or a host that is off"


@dataclass(frozen=True)
class Place:
    """An address of a configuration file, and which of its keys says so."""

    subject: str
    key: str
    host: str
    port: int
    """0: the system chooses."""


def places(config: DeploymentConfig) -> Iterator[Place]:
    """Every address that the file has; the server's if the scheduler is here, beside which `hbserve serve` starts it.
    Of a Unix socket there is nothing to ask."""
    if config.server.enabled and config.server.uds is None and _may_be_here(config.scheduler.host):
        yield Place("server", "server", config.server.host, config.server.port)
    yield Place("scheduler", "scheduler", config.scheduler.host, config.scheduler.port)
    if config.scheduler.health_port is not None:
        yield Place("scheduler health", "scheduler", config.scheduler.host, config.scheduler.health_port)
    kv, health_port = config.kv_transfer, config.engine_settings().health_port
    for number, each in enumerate(config.gpu_instances):
        if each.discover is not None:
            continue  # whoever is found there says where it is
        key = f"gpu_instances[{number}]"
        yield Place(each.instance_id, key, each.host, each.port)
        if each.instance_type != "hybrid" and kv.port:
            yield Place(f"{each.instance_id} KV", "kv_transfer", kv.ip or each.host, kv.port + each.kv_rank)
        if health_port:
            yield Place(f"{each.instance_id} health", "engine", each.host, health_port + each.kv_rank)


async def check_network(config: DeploymentConfig) -> list[Finding]:
    """One finding for each address, in the file's order; all are asked at once."""
    return list(await asyncio.gather(*(_check(place) for place in places(config))))


def _may_be_here(host: str) -> bool:
    return is_wildcard(host) or is_here(host)


async def _check(place: Place) -> Finding:
    if await asyncio.to_thread(_may_be_here, place.host):
        return _bind(place)
    try:
        address = await look_up(place.host)
    except OSError as error:
        return Finding(
            "FAIL", place.subject, f"{place.key}.host={place.host!r}: no name server knows it: {error.strerror}"
        )
    if place.port == 0:
        text = f"{place.key}.port=0 on another host: nobody here could know which one the system chooses; give one"
        return Finding("FAIL", place.subject, text)
    return await _reach(place, address)


def _bind(place: Place) -> Finding:
    """Whether it is free. What a server sets, so that it can be started again at once, is set here too."""
    where = format_address(place.host, place.port)
    version = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        found = socket.getaddrinfo(place.host, place.port, version, socket.SOCK_STREAM)[0]
        with socket.socket(found[0]) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind(found[4])
            trying.listen()  # binding alone does not collide with a listener that also allows reuse
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = (
                f"{where} of this host is in use: by this deployment, if it runs; else choose another {place.key}.port"
            )
            return Finding("FAIL", place.subject, text)
        return Finding("FAIL", place.subject, f"{where} cannot be listened at: {error.strerror}")
    return Finding("ok", place.subject, f"{where} is of this host, and free")


async def _reach(place: Place, address: str) -> Finding:
    """A host that says that nobody listens is reached: nothing was started yet."""
    where = format_address(place.host, place.port)
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            _, writer = await asyncio.open_connection(address, place.port)
    except ConnectionRefusedError:
        return Finding("ok", place.subject, f"{where} is reached from {own_address(address)}; nobody listens there yet")
    except TimeoutError:
        return Finding("FAIL", place.subject, f"{where}: no answer in {REACH_TIMEOUT_S:g} s: {FIREWALL}")
    except OSError as error:
        return Finding("FAIL", place.subject, f"{where}: {error.strerror or error}")
    writer.close()
    return Finding("ok", place.subject, f"{where} is reached from {own_address(address)}; somebody listens there")


def own_address(peer: str) -> str:
    """The address of this host from which it would talk to a peer: no packet is sent for that."""
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((peer, 9))
        return str(asking.getsockname()[0])

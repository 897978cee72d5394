"""The addresses of a deployment, seen from this host: its own must be free, and those of other hosts must be
reachable."""

import asyncio
import errno
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from hbserve.check.finding import Finding
from hbserve_rpc import AddressInUse
from hbserve_rpc.address import format_address, is_here, is_wildcard, look_up, parse_address
from hbserve_scheduler import ConfigError, DeploymentConfig, InstanceSection
from hbserve_scheduler.discovery import TIMEOUT_S as DISCOVERY_TIMEOUT_S
from hbserve_scheduler.discovery import DnsName

REACH_TIMEOUT_S = 3.0
FIREWALL = "a firewall, or a host that is off"
OF_SERVE = {"server.port": "server.port or --port", "scheduler.port": "scheduler.port or --scheduler-port"}
"""Names of keys of the file that options of `hbserve serve` set too, for users without a file."""
OF_INSTANCE = {"gpu_instances[0].host": "--host", "gpu_instances[0].port": "--port"}
"""Names of the keys of `hbserve instance`'s only instance, which need not be in the file."""


@dataclass(frozen=True)
class Place:
    """An address of a configuration file, and the keys that it comes from."""

    subject: str
    host_key: str
    host: str
    port_key: str
    port: int
    """0: the system chooses one."""

    @property
    def where(self) -> str:
        return format_address(self.host, self.port)


def places(config: DeploymentConfig) -> Iterator[Place]:
    """Every address of the file. That of the server is included if the scheduler is on this host, because `hbserve
    serve` starts both together. Unix sockets are left out."""
    if config.server.enabled and config.server.uds is None and _may_be_here(config.scheduler.host):
        yield Place("server", "server.host", config.server.host, "server.port", config.server.port)
    scheduler = "scheduler.host", config.scheduler.host
    yield Place("scheduler", *scheduler, "scheduler.port", config.scheduler.port)
    if config.scheduler.health_port is not None:
        yield Place("scheduler health", *scheduler, "scheduler.health_port", config.scheduler.health_port)
    kv, health_port = config.kv_transfer, config.engine_settings().health_port
    for number, each in enumerate(config.gpu_instances):
        if each.discover is not None:
            continue  # its addresses are those that the name has, see `_check_name`
        own = f"gpu_instances[{number}].host", each.host
        yield Place(each.instance_id, *own, f"gpu_instances[{number}].port", each.port)
        if each.instance_type != "hybrid" and kv.port:
            of_kv = own if kv.ip is None else ("kv_transfer.ip", kv.ip)
            yield Place(f"{each.instance_id} KV", *of_kv, "kv_transfer.port", kv.port + each.kv_rank)
        if health_port:
            yield Place(f"{each.instance_id} health", *own, "engine.health_port", health_port + each.kv_rank)


def require_places(config: DeploymentConfig, *, but: Collection[str]) -> None:
    """Check that all processes of a deployment can listen at the file's addresses on this host, except those in `but`,
    which are running already or are not started. May ask a name server.

    Raises:
        ConfigError: this machine does not have an address of the file, or does not reach it.
        AddressInUse: another process listens at one of its ports.
    """
    _require(config, but, OF_SERVE)


def require_places_of(config: DeploymentConfig, instance: InstanceSection) -> None:
    """Check the same for one instance."""
    alone = msgspec.structs.replace(config, gpu_instances=[instance])
    _require(alone, ["server", "scheduler", "scheduler health"], OF_INSTANCE)


def _require(config: DeploymentConfig, but: Collection[str], names: Mapping[str, str]) -> None:
    of_all = [each for each in places(config) if each.subject not in but]
    if config.kv_transfer.ip is not None:
        of_all.append(Place("KV", "kv_transfer.ip", config.kv_transfer.ip, "kv_transfer.port", 0))
    for place in of_all:
        error = _why_not_served(place)
        if error is not None and error.errno == errno.EADDRINUSE:
            cure = f"give another {names.get(place.port_key, place.port_key)}, or 0 to let the system choose"
            raise AddressInUse(f"{place.subject}: {place.where} is in use: {cure}")
        if error is not None:
            key = names.get(place.host_key, place.host_key)
            raise ConfigError(f"{key}={place.host!r}: {place.where} {error.strerror}")


async def check_network(config: DeploymentConfig) -> list[Finding]:
    """One finding for each address, in the file's order, and then those of names by which instances are found. All are
    checked at the same time."""
    discovered = [(number, each.discover) for number, each in enumerate(config.gpu_instances) if each.discover]
    of_names = asyncio.gather(*(_check_name(f"gpu_instances[{number}]", name) for number, name in discovered))
    found = await asyncio.gather(*(_check(place) for place in places(config)))
    return [*found, *(each for several in await of_names for each in several)]


def _may_be_here(host: str) -> bool:
    return is_wildcard(host) or is_here(host)


async def _check(place: Place) -> Finding:
    if await asyncio.to_thread(_may_be_here, place.host):
        return _bind(place)
    try:
        address = await look_up(place.host)
    except OSError as error:
        return Finding(
            "FAIL", place.subject, f"{place.host_key}={place.host!r}: no name server knows it: {error.strerror}"
        )
    if place.port == 0:
        text = f"{place.port_key}=0 on another host: nobody here could know which one the system chooses; give one"
        return Finding("FAIL", place.subject, text)
    return await _reach(place, address)


async def _check_name(entry: str, discover: str) -> list[Finding]:
    """Look up a name by which instances are found, and check each of its addresses. A name without any is only noted:
    one of Kubernetes has none before its first pod, and the scheduler goes on asking."""
    name, key = DnsName.of(discover), f"{entry}.discover"
    try:
        async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
            found = await name.addresses()
    except (OSError, TimeoutError) as error:
        why = error.strerror or "no name server answers"
        text = f"{key}={discover!r}: no name server knows it: {why}; the scheduler goes on asking"
        return [Finding("note", discover, text)]
    hosts = [parse_address(address)[0] for address in sorted(found)]
    return list(await asyncio.gather(*(_reach(Place(discover, key, host, key, name.port), host) for host in hosts)))


def _bind(place: Place) -> Finding:
    error = _why_not_served(place)
    if error is None:
        return Finding("ok", place.subject, f"{place.where} belongs to this host and is free")
    if error.errno == errno.EADDRINUSE:
        text = f"{place.where} of this host is in use: by this deployment, if it is running; otherwise choose another"
        return Finding("FAIL", place.subject, f"{text} {place.port_key}")
    return Finding("FAIL", place.subject, f"{place.where} {error.strerror}")


def _why_not_served(place: Place) -> OSError | None:
    """Return why no process could serve there, in words that follow the address; None if one can. Sets SO_REUSEADDR,
    as servers do so that they can be restarted at once."""
    version = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        found = socket.getaddrinfo(place.host, place.port, version, socket.SOCK_STREAM)[0]
        with socket.socket(found[0]) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind(found[4])
            trying.listen()  # binding alone does not collide with a listener that also allows reuse
            return None if is_wildcard(place.host) else _why_not_reached(trying)
    except OSError as error:
        return OSError(error.errno, f"cannot be bound: {error.strerror}")


def _why_not_reached(listening: socket.socket) -> OSError | None:
    """Return why this host does not reach its own listening socket; None if it does. Any own address goes by `lo`."""
    with socket.socket(listening.family) as asking:
        asking.settimeout(REACH_TIMEOUT_S)
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # so that no TIME_WAIT is left
        try:
            asking.connect(listening.getsockname())
        except OSError as error:
            cure = "is its interface `lo` up (`ip link set lo up`)?"
            return OSError(error.errno, f"is not reached from this host itself: {error.strerror or error}; {cure}")
    return None


async def _reach(place: Place, address: str) -> Finding:
    """Check that another host can be reached. A host that refuses the connection is reachable: its process has not been
    started yet."""
    where = place.where
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
    """Return the address that this host would use to talk to a peer, found without sending a packet."""
    with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((peer, 9))
        return str(asking.getsockname()[0])

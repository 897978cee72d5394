"""The transport over Mooncake's TransferEngine: the sender writes straight into the receiver's blocks.

Mooncake's Python API makes this necessary (read and measured on 0.3.13):

- Only registered memory may be a source or target; over TCP an unregistered source works by accident. Both regions are
registered whole, in each engine, by the call that releases the GIL: each extent once, whatever allocation it lies in.
- An engine holds a mutex while it opens a peer, for 60 s if that is frozen. So a peer is probed first, without the
mutex, and links that share an engine switch to another one: see engines.py.
- A synchronous write returns -1 when it has timed out, or as soon as one of its pieces has failed; the others go on and
land. So that is `DrainUnknown`, and only the end of the engine stops the write.
- `protocol` does not choose the transport, and a wrong one silently falls back to TCP. MC_FORCE_TCP is set for "tcp".
- An engine listens on every interface. Socket filters drop what is sent neither to this side's address nor to loopback.
- Mooncake connects either to IPv4 or to IPv6 addresses, depending on MC_USE_IPV6 when it was imported.
- In P2P mode the port in the host name is ignored: the session is `host:get_rpc_port()`.
- `initialize` always prints `Local segment descriptor not found`, and returns 0 nevertheless. The message has the level
of an error, so a log level that hides it hides errors.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory.memory import REGIONS, Memory, Region
from hbserve_kv.memory.pool_layout import extents_of
from hbserve_kv.memory.shared_memory import shared_buffer
from hbserve_kv.transports.base import DrainUnknown, Link, Part, Transport
from hbserve_kv.transports.mooncake.engines import MOST_LEFT, MOST_RECEIVING_ON_TCP, Engine, MooncakeEngines, end
from hbserve_kv.transports.mooncake.setup import (
    CONFIG_VARIABLE,
    choose_ip_version,
    import_engine,
    load_config,
    require_cuda_wheel,
    why_no_rdma,
)
from hbserve_kv.transports.own_sockets import hang_up, listen_only_at, listening_everywhere
from hbserve_rpc import format_address, parse_address
from hbserve_rpc.address import look_up

logger = logging.getLogger(__name__)

HANG_UP_INTERVAL_S = 0.05
SHORTEST_TIMEOUT_S = 5
"""Shortest timeout that Mooncake accepts."""


class Offer(msgspec.Struct, frozen=True):
    """What the two sides compare before they connect."""

    carrier: str
    """The verified transport of this side: TCP or RDMA."""
    ip_version: int


class Description(msgspec.Struct, frozen=True):
    """What a sender must know about a receiver."""

    session: str
    """`host:port` by which Mooncake finds the receiver's engine."""
    addresses: dict[Region, list[int]]
    """Addresses of the extents of each region."""
    num_arena_blocks: int


class MooncakeTransport(Transport):
    name = "mooncake"
    one_sided = True
    connects_to_itself = True

    def __init__(self, host: str, timeout_s: float) -> None:
        # Mooncake reads this when it is imported.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        self._config = load_config()
        self._host = self._config.local_hostname or host
        self._ip_version = choose_ip_version(self._host)
        self._engine_class = import_engine()
        self._timeout_s = max(timeout_s, SHORTEST_TIMEOUT_S)
        self._engines = MooncakeEngines(self._make_engine, most_left=MOST_LEFT)
        """Engines with which this side writes."""
        self._receiving = MooncakeEngines(self._make_engine)
        """Engines through which senders write."""
        self._admitted: WeakKeyDictionary[Link, Engine] = WeakKeyDictionary()
        """Engines through which the sender of each link writes, and may still write after the link was lost."""
        self._connected: set[str] = set()
        self._unsure: dict[str, Engine] = {}
        """Engines that may still be executing a write that failed, by the key of its link."""
        self._is_open_said = False
        """Whether the log already says that engines listen on every interface."""

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        self._ip = await look_up(self._host)
        if memory.is_on_gpu:
            require_cuda_wheel()
        # Mooncake reads these when an engine is made; there are no arguments for them.
        os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(int(self._timeout_s)))
        if self._config.protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        elif self._config.protocol == "rdma" and (reason := why_no_rdma()):
            # Mooncake itself would use TCP without saying so.
            raise BackendUnavailable(f'{CONFIG_VARIABLE}: protocol "rdma", but {reason}')
        self._probe_engine = self._make_engine(())
        try:
            self._detail = self._verified_transport(self._probe_engine)
            if self._carrier == "TCP":
                self._receiving.most, self._receiving.keeps_unused = MOST_RECEIVING_ON_TCP, False
            self._receiving.prepare()
        except BaseException:
            await self.close()
            raise
        logger.info("mooncake: %s on %s", self._detail, self._host)

    def _make_engine(self, regions: Sequence[Region] = REGIONS) -> Engine:
        native = self._engine_class()
        settings, of_others = self._config, listening_everywhere()
        if rc := native.initialize(self._host, settings.metadata_server, settings.protocol, settings.device_name):
            raise BackendUnavailable(f"Mooncake does not start on {self._host!r} with {settings}: code {rc}")
        loopback = "::1" if self._ip_version == 6 else "127.0.0.1"  # the address by which the engine wakes itself
        self._listen_only_at([self._ip, loopback], listening_everywhere() - of_others)
        scratch = shared_buffer(4096)
        places = [*extents_of(scratch), *(each for region in regions for each in self._memory.extents[region])]
        sizes = [each.num_bytes for each in places]
        made = Engine(native, scratch, places[0].address, loopback)
        if rc := native.batch_register_memory([each.address for each in places], sizes):
            del native, made.native  # ends it now, and not when the error is forgotten
            raise BackendUnavailable(f"Mooncake cannot register memory of {sizes} bytes: code {rc}")
        return made

    def _listen_only_at(self, addresses: list[str], inodes: set[str]) -> None:
        try:
            listen_only_at(addresses, inodes)
        except PermissionError as error:
            if not self._is_open_said:
                logger.warning(
                    "mooncake listens on every interface of this host, and anybody who reaches it may write: only a "
                    "process with CAP_NET_ADMIN may have the kernel drop what is not sent to %s (%s); see SECURITY.md",
                    self._host,
                    error,
                )
            self._is_open_said = True

    def _verified_transport(self, engine: Engine) -> str:
        """Return what this engine really uses, judged by what it found, not by what was asked for.

        Raises:
            BackendUnavailable: RDMA was asked for, and the engine has no network card for it.
        """
        if os.environ.get("MC_FORCE_TCP") == "1":
            if self._config.protocol != "tcp":
                raise BackendUnavailable(f"protocol {self._config.protocol!r} contradicts MC_FORCE_TCP=1; unset one")
            return "TCP"
        topology: dict[str, list[list[str]]] = json.loads(engine.native.get_local_topology() or "{}")
        cards = {card for place in topology.values() for choices in place for card in choices}
        if not cards:
            if self._config.protocol == "rdma":
                raise BackendUnavailable('protocol "rdma", but Mooncake found no network card for it on this machine')
            return f"TCP ({self._config.protocol!r} was asked for)"
        return f"RDMA over {', '.join(sorted(cards))}"

    @property
    def _carrier(self) -> str:
        return self._detail.partition(" ")[0]

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(Offer(self._carrier, self._ip_version))

    async def admit(self, link: Link) -> bytes:
        engine = self._admitted[link] = await self._receiving.join(link, "")
        return msgspec.msgpack.encode(
            Description(
                format_address(self._host, engine.native.get_rpc_port()),
                dict(self._memory.addresses),
                self._memory.num_arena_blocks,
            )
        )

    async def revoke(self, link: Link) -> set[str]:
        """End the engine through which the sender writes, with its connections and the keys of its memory. See
        `Transport.revoke`."""
        if link not in self._admitted:
            return set()
        engine = self._admitted[link]
        others = self._receiving.links_of(engine)
        self._receiving.retire(engine, "a sender that was lost may still write")
        await engine.ended.wait()
        return {link.key, *others}

    def unreachable(self, description: bytes) -> str:
        theirs, mine = msgspec.msgpack.decode(description, type=Offer), Offer(self._carrier, self._ip_version)
        both = [f"{each.carrier} by IPv{each.ip_version}" for each in (theirs, mine)]
        return "" if theirs == mine else f"Mooncake uses {both[0]} there and {both[1]} here"

    async def connect(self, link: Link) -> None:
        link.detail = self._detail
        await self._join(link)
        self._connected.add(link.key)

    async def _join(self, link: Link) -> Engine:
        """Give the link an engine that knows its peer. A write then needs no answer from a peer that may have
        frozen."""
        await self._ask(link, self._probe)
        engine = await self._engines.join(link, _decode(link).session)
        try:
            async with self._engines.first_contact(engine):
                await self._ask(link, self._read_something, engine)
        except BaseException:
            self._engines.leave(link)
            raise
        return engine

    async def _ask(self, link: Link, blocking: Callable[..., None], *arguments: Any) -> None:
        """Run a call that waits for the peer's answer. If the peer has frozen or its host has vanished, it takes a
        minute, unless the caller is cancelled."""
        asking = asyncio.ensure_future(link.run(blocking, *arguments, link))
        try:
            await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.cancel()  # takes effect when the call has returned
            peer = parse_address(_decode(link).session)
            while not asking.done():
                hang_up(*peer)
                await asyncio.wait([asking], timeout=HANG_UP_INTERVAL_S)
            raise

    def _probe(self, link: Link) -> None:
        session = _decode(link).session
        if rc := self._probe_engine.native.send_probe(session):
            raise ConnectionError(f"Mooncake cannot reach {session}: code {rc}")

    def _read_something(self, engine: Engine, link: Link) -> None:
        """Read from the peer, so that the engine knows its memory, and the data path is known to work."""
        peer = _decode(link)
        if rc := engine.native.transfer_sync_read(peer.session, engine.scratch_address, peer.addresses["pool"][0], 8):
            engine.failed.add(peer.session)
            raise ConnectionError(f"Mooncake cannot read from {peer.session}: code {rc}")

    async def push(self, link: Link, part: Part) -> None:
        engine = await self._engine_of(link)
        async with self._engines.call(engine):
            try:
                await link.run(self._write, engine, link, part)
            finally:  # a cancelled caller must retire the engine too
                if self._unsure.get(link.key) is engine:
                    self._engines.retire(engine, "a write of it failed")

    async def _engine_of(self, link: Link) -> Engine:
        """Return the link's engine once it knows the peer and is not meeting another one right now."""
        while link.key in self._connected:
            engine = self._engines.of(link)
            if engine is None or engine.retired:
                engine = await self._join(link)
            await engine.is_open.wait()
            if not engine.retired:
                return engine
        raise ConnectionError("the link is closed")

    def _write(self, engine: Engine, link: Link, part: Part) -> None:
        peer = _decode(link)
        part.require_targets_below(link.peer.num_units if part.target_region == "pool" else peer.num_arena_blocks)
        extents = peer.addresses[part.target_region]
        plan = link.plan(self._memory, part, extents)
        source, target = self._memory.addresses[part.region][0], extents[0]
        addresses, targets, lengths = [], [], []
        for mine, theirs, size in plan.moves(part.block_ids, part.target_block_ids):
            addresses.append(source + mine)
            targets.append(target + theirs)
            lengths.append(size)
        rc = engine.native.batch_transfer_sync_write(peer.session, addresses, targets, lengths)
        if rc:
            self._unsure[link.key] = engine
            raise DrainUnknown(f"Mooncake's write to {peer.session} failed with code {rc}; its bytes may still land")

    async def disconnect(self, link: Link) -> None:
        """Forget the link, once a failed write has ended with its engine. An engine that ends stops reading its memory:
        as measured, only what the kernel had already taken still lands."""
        self._connected.discard(link.key)
        await link.idle()
        self._engines.leave(link)
        self._receiving.leave(link)
        if engine := self._unsure.pop(link.key, None):
            await engine.ended.wait()

    async def close(self) -> None:
        await asyncio.gather(self._engines.close(), self._receiving.close(), end(self._probe_engine))


def _decode(link: Link) -> Description:
    return msgspec.msgpack.decode(link.peer_description, type=Description)

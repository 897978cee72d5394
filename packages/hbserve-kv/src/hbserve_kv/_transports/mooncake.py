"""Mooncake's TransferEngine: the sender writes straight into the receiver's blocks.

What its Python API makes necessary (read and measured on 0.3.13):
- Only registered memory may be a source or target; over TCP an unregistered source works by accident. Both regions are
  registered whole, in each engine, by the call that releases the GIL.
- One engine holds one mutex while it opens a peer, for 60 s if that is frozen. So a peer is probed first, without the
  mutex, and links that share an engine turn to another one: `mooncake_engines`.
- A synchronous write that times out returns -1 while its bytes can still land: that is `DrainUnknown`. Only the end of
  its engine stops it.
- `protocol` does not choose the transport, and a wrong one falls back to TCP in silence. MC_FORCE_TCP is set for "tcp".
- In P2P mode the port in the host name is ignored: the session is `host:get_rpc_port()`.
"""

import asyncio
import importlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch  # Mooncake's CUDA wheels find libcudart through torch, which must come first

from hbserve_kv._transports.mooncake_engines import Engine, MooncakeEngines, end
from hbserve_kv._transports.mooncake_rdma import why_no_rdma
from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory import REGIONS, Memory, pieces
from hbserve_kv.transport import DrainUnknown, Link, Part, Transport

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "MOONCAKE_CONFIG_PATH"
SHORTEST_TIMEOUT_S = 5
"""Mooncake takes no shorter one."""


class MooncakeConfig(msgspec.Struct, frozen=True):
    """What is read of the JSON file that MOONCAKE_CONFIG_PATH names; keys of Mooncake Store are known and not used."""

    local_hostname: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device_name: str = ""


class Description(msgspec.Struct, frozen=True):
    """What a sender must know of a receiver."""

    session: str
    base: dict[str, int]
    """Address of the first block of each region."""
    num_blocks: dict[str, int]
    carrier: str
    """TCP or RDMA, as it was verified."""


def load_config() -> MooncakeConfig:
    """The file's settings, or the defaults without a file.

    Raises:
        BackendUnavailable: the file is not there, is not JSON, or a value has a wrong type.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return MooncakeConfig()
    try:
        text = Path(path).expanduser().read_text()
        config = msgspec.json.decode(text, type=MooncakeConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise BackendUnavailable(f"{CONFIG_VARIABLE}={path}: {error}") from error
    unused = sorted(json.loads(text).keys() - set(MooncakeConfig.__struct_fields__))
    if unused:
        logger.warning("%s=%s: not used by HBServe: %s", CONFIG_VARIABLE, path, ", ".join(unused))
    return config


def import_engine() -> Any:
    """The class TransferEngine, or an error that says what to install."""
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            "kv_transfer.backend='mooncake' needs Mooncake: pip install 'hbserve-kv[mooncake-cpu]' without a GPU, "
            "'hbserve-kv[mooncake]' with CUDA 12, 'hbserve-kv[mooncake-cuda13]' with CUDA 13"
        ) from error
    except ImportError as error:
        raise BackendUnavailable(
            f"Mooncake is installed but cannot be loaded ({error}): apt-get install libibverbs1 libnuma1 libcurl4, "
            "and install the variant of the wheel that fits this machine's CUDA"
        ) from error
    return TransferEngine


def require_cuda_wheel() -> None:
    """Raises BackendUnavailable if the installed wheel cannot read GPU memory: it would fail in the first transfer."""
    engine: Any = importlib.import_module("mooncake.engine")
    if not getattr(engine, "SUPPORT_CUDA", True):
        raise BackendUnavailable(
            "the installed Mooncake is the one without CUDA, and the pool is on a GPU: pip uninstall "
            "mooncake-transfer-engine-non-cuda, and pip install 'hbserve-kv[mooncake]' (CUDA 12) or "
            "'hbserve-kv[mooncake-cuda13]' (CUDA 13)"
        )


class MooncakeTransport(Transport):
    name = "mooncake"
    one_sided = True

    def __init__(self, host: str, timeout_s: float) -> None:
        # Read by Mooncake when it is imported.
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        self._engine_class = import_engine()
        self._config = load_config()
        self._host = self._config.local_hostname or host
        self._timeout_s = max(timeout_s, SHORTEST_TIMEOUT_S)
        self._engines = MooncakeEngines(self._make_engine)
        self._connected: set[str] = set()
        self._unsure: dict[str, Engine] = {}
        """By link, the engine that may go on with a write of it."""

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        if memory.device.type == "cuda":
            require_cuda_wheel()
        # Read by Mooncake when an engine is made; there is no argument for them.
        os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(int(self._timeout_s)))
        if self._config.protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        elif self._config.protocol == "rdma" and (reason := why_no_rdma()):
            # Mooncake itself would use TCP, and say nothing.
            raise BackendUnavailable(f'{CONFIG_VARIABLE}: protocol "rdma", but {reason}')
        self._receiving = self._make_engine()
        self._detail = self._verified_transport(self._receiving.native)
        logger.info("mooncake: %s on %s", self._detail, self._host)

    def _make_engine(self) -> Engine:
        native = self._engine_class()
        settings = self._config
        if rc := native.initialize(self._host, settings.metadata_server, settings.protocol, settings.device_name):
            raise BackendUnavailable(f"Mooncake does not start on {self._host!r} with {settings}: code {rc}")
        scratch = torch.empty(4096, dtype=torch.uint8)
        places = [rows for rows in (*map(self._memory.rows, REGIONS), scratch) if rows.numel()]
        sizes = [rows.nbytes for rows in places]
        if rc := native.batch_register_memory([rows.data_ptr() for rows in places], sizes):
            raise BackendUnavailable(f"Mooncake cannot register memory of {sizes} bytes: code {rc}")
        return Engine(native, scratch)

    def _verified_transport(self, engine: Any) -> str:
        """What this engine really uses, by what it found and not by what was asked for.

        Raises:
            BackendUnavailable: RDMA was asked for, and the engine has no network card for it.
        """
        if os.environ.get("MC_FORCE_TCP") == "1":
            if self._config.protocol != "tcp":
                raise BackendUnavailable(f"protocol {self._config.protocol!r} contradicts MC_FORCE_TCP=1; unset one")
            return "TCP"
        topology: dict[str, list[list[str]]] = json.loads(engine.get_local_topology() or "{}")
        cards = {card for place in topology.values() for choices in place for card in choices}
        if not cards:
            if self._config.protocol == "rdma":
                raise BackendUnavailable('protocol "rdma", but Mooncake found no network card for it on this machine')
            return f"TCP ({self._config.protocol!r} was asked for)"
        return f"RDMA over {', '.join(sorted(cards))}"

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(
            Description(
                f"{self._host}:{self._receiving.native.get_rpc_port()}",
                {region: self._memory.rows(region).data_ptr() for region in REGIONS},
                {region: self._memory.rows(region).shape[0] for region in REGIONS},
                self._detail.partition(" ")[0],
            )
        )

    def unreachable(self, description: bytes) -> str:
        theirs = msgspec.msgpack.decode(description, type=Description).carrier
        mine = self._detail.partition(" ")[0]
        return "" if theirs == mine else f"Mooncake uses {theirs} there and {mine} here"

    async def connect(self, link: Link) -> None:
        link.detail = self._detail
        await self._join(link)
        self._connected.add(link.key)

    async def _join(self, link: Link) -> Engine:
        """Give the link an engine that knows its peer: a write then needs nothing of a peer that may have frozen."""
        await link.run(self._probe, link)
        engine = await self._engines.join(link, _decode(link).session)
        try:
            async with self._engines.meeting(engine):
                await link.run(self._read_something, engine, link)
        except BaseException:
            self._engines.leave(link)
            raise
        return engine

    def _probe(self, link: Link) -> None:
        """With the engine that never ends, because this may take a minute."""
        session = _decode(link).session
        if rc := self._receiving.native.send_probe(session):
            raise ConnectionError(f"Mooncake cannot reach {session}: code {rc}")

    def _read_something(self, engine: Engine, link: Link) -> None:
        """So the engine knows the peer's memory, and the path of the data is known to work."""
        peer = _decode(link)
        if rc := engine.native.transfer_sync_read(peer.session, engine.scratch.data_ptr(), peer.base["pool"], 8):
            engine.failed.add(peer.session)
            raise ConnectionError(f"Mooncake cannot read from {peer.session}: code {rc}")

    async def push(self, link: Link, part: Part) -> None:
        engine = await self._engine_of(link)
        async with self._engines.call(engine):
            try:
                await link.run(self._write, engine, link, part)
            finally:  # whoever is cancelled must condemn it too
                if self._unsure.get(link.key) is engine:
                    self._engines.condemn(engine, "a write of it timed out")

    async def _engine_of(self, link: Link) -> Engine:
        """One that knows the peer, and does not get to know another one at this moment."""
        while link.key in self._connected:
            engine = self._engines.of(link)
            if engine is None or engine.condemned:
                engine = await self._join(link)
            await engine.is_open.wait()
            if not engine.condemned:
                return engine
        raise ConnectionError("the link is closed")

    def _write(self, engine: Engine, link: Link, part: Part) -> None:
        if part.ready is not None:
            part.ready.synchronize()
        peer = _decode(link)
        assert max(part.target_block_ids) < peer.num_blocks[part.target_region]
        source, target = self._memory.rows(part.region).data_ptr(), peer.base[part.target_region]
        moves = pieces(
            self._memory, link.heads, link.peer_heads, link.peer_num_heads, part.block_ids, part.target_block_ids
        )
        addresses, targets, lengths = (
            list(column)
            for column in zip(*((source + mine, target + theirs, size) for mine, theirs, size in moves), strict=True)
        )
        began_s = time.monotonic()
        rc = engine.native.batch_transfer_sync_write(peer.session, addresses, targets, lengths)
        if rc == 0:
            return
        engine.failed.add(peer.session)
        problem = f"Mooncake's write to {peer.session} failed with code {rc}"
        if time.monotonic() - began_s >= SHORTEST_TIMEOUT_S:  # it timed out, rather than being refused
            self._unsure[link.key] = engine
            raise DrainUnknown(f"{problem}; its bytes may still land")
        raise ConnectionError(problem)

    async def disconnect(self, link: Link) -> None:
        """An engine that ends stops reading its memory: measured, only what the kernel had taken still lands."""
        self._connected.discard(link.key)
        await link.idle()
        self._engines.leave(link)
        if engine := self._unsure.pop(link.key, None):
            await engine.ended.wait()

    async def close(self) -> None:
        await asyncio.gather(self._engines.close(), end(self._receiving))


def _decode(link: Link) -> Description:
    return msgspec.msgpack.decode(link.peer_description, type=Description)

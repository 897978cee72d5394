"""Mooncake's TransferEngine: the sender writes straight into the receiver's blocks.

What its Python API makes necessary (read and measured on 0.3.13):
- Only registered memory may be a source or target; over TCP an unregistered source works by accident. Both regions are
  registered whole, in each engine.
- One engine holds one mutex while it opens a peer, for 60 s if that is frozen. So each link has an engine of its own,
  and a peer is probed first, without the mutex.
- A synchronous write that times out returns -1 while its bytes can still land: that is `DrainUnknown`.
- `protocol` does not choose the transport, and a wrong one falls back to TCP in silence. MC_FORCE_TCP is set for "tcp".
- In P2P mode the port in the host name is ignored: the session is `host:get_rpc_port()`.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch  # noqa: F401  Mooncake's CUDA wheels find libcudart through torch, which must come first

from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.memory import Memory, Region, runs
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


class _Description(msgspec.Struct, frozen=True):
    session: str
    base: dict[str, int]
    """Address of the first block of each region."""
    num_blocks: dict[str, int]


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


class MooncakeTransport(Transport):
    name = "mooncake"
    one_sided = True

    def __init__(self, host: str, timeout_s: float) -> None:
        self._engine_class = import_engine()
        self._config = load_config()
        self._host = self._config.local_hostname or host
        self._timeout_s = max(timeout_s, SHORTEST_TIMEOUT_S)
        self._engines: dict[str, Any] = {}

    async def start(self, memory: Memory) -> None:
        self._memory = memory
        # Read by Mooncake when an engine is made; there is no argument for either.
        os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(int(self._timeout_s)))
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        if self._config.protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        self._receiving = self._make_engine()

    def _make_engine(self) -> Any:
        engine = self._engine_class()
        settings = self._config
        if rc := engine.initialize(self._host, settings.metadata_server, settings.protocol, settings.device_name):
            raise BackendUnavailable(f"Mooncake does not start on {self._host!r} with {settings}: code {rc}")
        for region in ("pool", "arena"):
            rows = self._memory.rows(region)
            if rows.numel() and (rc := engine.register_memory(rows.data_ptr(), rows.nbytes)):
                raise BackendUnavailable(f"Mooncake cannot register the {region} of {rows.nbytes} bytes: code {rc}")
        return engine

    def describe(self) -> bytes:
        regions: tuple[Region, ...] = ("pool", "arena")
        return msgspec.msgpack.encode(
            _Description(
                f"{self._host}:{self._receiving.get_rpc_port()}",
                {region: self._memory.rows(region).data_ptr() for region in regions},
                {region: self._memory.rows(region).shape[0] for region in regions},
            )
        )

    async def connect(self, link: Link) -> None:
        self._engines[link.key] = await link.run(self._open, link)

    def _open(self, link: Link) -> Any:
        engine = self._make_engine()
        peer = msgspec.msgpack.decode(link.peer_description, type=_Description)
        if rc := engine.send_probe(peer.session):
            raise ConnectionError(f"Mooncake cannot reach {peer.session}: code {rc}")
        return engine

    async def push(self, link: Link, part: Part) -> None:
        engine = self._engines.get(link.key)
        if engine is None:
            raise ConnectionError("the link is closed")
        if part.ready is not None:
            await link.run(part.ready.synchronize)
        await link.run(self._write, engine, link, part)

    def _write(self, engine: Any, link: Link, part: Part) -> None:
        peer = msgspec.msgpack.decode(link.peer_description, type=_Description)
        size, source = self._memory.block_bytes, self._memory.rows(part.region).data_ptr()
        assert max(part.target_block_ids) < peer.num_blocks[part.target_region]
        pieces = [
            (source + mine * size, peer.base[part.target_region] + theirs * size, count * size)
            for mine, theirs, count in runs(part.block_ids, part.target_block_ids)
        ]
        addresses, targets, lengths = (list(column) for column in zip(*pieces, strict=True))
        began_s = time.monotonic()
        rc = engine.batch_transfer_sync_write(peer.session, addresses, targets, lengths)
        if rc == 0:
            return
        problem = f"Mooncake's write to {peer.session} failed with code {rc}"
        if time.monotonic() - began_s >= SHORTEST_TIMEOUT_S:  # it timed out, rather than being refused
            raise DrainUnknown(f"{problem}; its bytes may still land")
        raise ConnectionError(problem)

    async def disconnect(self, link: Link) -> None:
        self._engines.pop(link.key, None)

    async def close(self) -> None:
        self._engines.clear()
        del self._receiving

"""From the name of a backend to its transport. Optional libraries are imported here, when they are asked for."""

import importlib
from importlib.metadata import entry_points

from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import KVTransferBackend, KVTransferConfig
from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.transport import Transport

ENTRY_POINT_GROUP = "hbserve_kv.backends"


def make_transport(config: KVTransferConfig, rank: int) -> Transport:
    """The transport of `config.backend`.

    Raises:
        BackendUnavailable: no such backend, or it cannot be imported; the message lists what there is.
    """
    if config.backend == KVTransferBackend.NCCL:
        from hbserve_kv._transports.nccl import NcclTransport

        return NcclTransport(config.host, config.timeout_s)
    if config.backend == KVTransferBackend.MOONCAKE:
        from hbserve_kv._transports.mooncake import MooncakeTransport

        return MooncakeTransport(config.host, config.timeout_s)
    from hbserve_kv._transports.custom import CustomTransport

    return CustomTransport(find_custom(config.backend)(rank, config.options), config.backend)


def find_custom(name: str) -> type[KVTransferBase]:
    """The class that an entry point or `module:Class` names."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    if name in found.names:
        loaded = found[name].load()
    elif ":" in name:
        module, _, attribute = name.partition(":")
        try:
            loaded = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise BackendUnavailable(f"kv_transfer.backend={name!r}: {error}") from error
    else:
        there = sorted([*(backend.value for backend in KVTransferBackend), *found.names])
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: there are {there}, or 'module:Class' of your own")
    if not (isinstance(loaded, type) and issubclass(loaded, KVTransferBase)):
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: expected a subclass of KVTransferBase, got {loaded!r}")
    return loaded

"""A registry that maps the name of a backend to its transports. It imports optional libraries when they are needed."""

import importlib
import importlib.util
import logging
import os
import sys
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from typing import Any

from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import KVTransferBackend, KVTransferConfig
from hbserve_kv.errors import BackendUnavailable
from hbserve_kv.transports.base import Transport
from hbserve_rpc.named_class import add_current_folder, find_class

ENTRY_POINT_GROUP = "hbserve_kv.backends"

logger = logging.getLogger(__name__)


def make_transports(config: KVTransferConfig, rank: int) -> list[Transport]:
    """Make the transports of `config.backend`, best first: for "auto" those that this machine has, else one.

    Raises:
        BackendUnavailable: there is no such backend, and the message lists what there is; or it cannot be imported.
    """
    if config.backend == KVTransferBackend.AUTO:
        return _automatic(config)
    if config.backend in set(KVTransferBackend):
        return [_built_in(KVTransferBackend(config.backend), config)]
    found = find_custom(config.backend)
    if issubclass(found, Transport):
        return [found()]
    require_torch(config.backend)
    from hbserve_kv.transports.custom import CustomTransport

    return [CustomTransport(found(rank, config.options), config.backend)]


def require_torch(backend: str) -> None:
    """Raise BackendUnavailable if torch is not installed."""
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise BackendUnavailable(
            f"kv_transfer.backend={backend!r} needs torch: pip install 'hbserve-kv[torch]' ({error})"
        ) from error


def _require_distributed(import_torch: bool) -> None:
    """Raise BackendUnavailable if torch, or what `nccl` needs of it, is missing. If torch is not imported and should
    not be, this only checks that it is there: a pair that nothing else connects will show whether `nccl` works."""
    if not import_torch and "torch" not in sys.modules and importlib.util.find_spec("torch"):
        return
    require_torch(KVTransferBackend.NCCL.value)
    import torch.distributed as dist

    if not dist.is_available() or not hasattr(dist, "ProcessGroupGloo"):
        raise BackendUnavailable("kv_transfer.backend='nccl' needs a torch that was built with torch.distributed")


def _built_in(backend: KVTransferBackend, config: KVTransferConfig) -> Transport:
    if backend is KVTransferBackend.NCCL:
        _require_distributed(import_torch=config.backend == backend)
        from hbserve_kv.transports.nccl import NcclTransport

        return NcclTransport(config.host, config.timeout_s)
    if backend is KVTransferBackend.MOONCAKE:
        from hbserve_kv.transports.mooncake.transport import MooncakeTransport

        return MooncakeTransport(config.host, config.timeout_s)
    from hbserve_kv.transports.ipc import IpcTransport

    return IpcTransport()


def _automatic(config: KVTransferConfig) -> list[Transport]:
    from hbserve_kv.transports.mooncake.setup import why_no_rdma

    transports = []
    for backend in (KVTransferBackend.IPC, KVTransferBackend.MOONCAKE, KVTransferBackend.NCCL):
        reason = why_no_rdma() if backend is KVTransferBackend.MOONCAKE else ""
        try:
            if not reason:
                transports.append(_built_in(backend, config))
        except BackendUnavailable as error:
            reason = str(error)
        if reason:
            logger.info("kv_transfer.backend=auto: not %s: %s", backend.value, reason)
    if not transports:
        raise BackendUnavailable("kv_transfer.backend='auto': no backend works on this machine; see the log for why")
    return transports


def require_backend(name: str) -> None:
    """Refuse a name for which nothing is installed, for this process or one that it starts, without importing torch or
    a backend.

    Raises:
        BackendUnavailable: there is no such backend, and the message lists what there is; or Mooncake is not installed.
    """
    # Processes that this one starts use PYTHONPATH, which may have been set since this one began.
    paths = [*sys.path, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if name in set(KVTransferBackend):
        if name == KVTransferBackend.MOONCAKE and PathFinder.find_spec("mooncake", paths) is None:
            from hbserve_kv.transports.mooncake.setup import NOT_INSTALLED

            raise BackendUnavailable(NOT_INSTALLED)
        return
    of_all = (point for each in distributions(path=paths) for point in each.entry_points)
    custom = {point.name for point in of_all if point.group == ENTRY_POINT_GROUP}
    if name in custom:
        return
    if ":" not in name:
        there = sorted({*(backend.value for backend in KVTransferBackend), *custom})
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: there are {there}, or 'module:Class' of your own")
    module = name.partition(":")[0]
    add_current_folder()
    try:
        is_there = PathFinder.find_spec(module, paths) or importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:  # its package cannot be imported; or "" or ".x", which are no names
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: {error}") from error
    if not is_there:
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: No module named {module!r}")


def find_custom(name: str) -> type[Any]:
    """Return the class, a KVTransferBase or Transport, that `find_class` finds under a name.

    Raises:
        BackendUnavailable: there is none, it cannot be imported, or it is another class.
    """
    require_backend(name)
    try:
        found = find_class(ENTRY_POINT_GROUP, name)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, KVTransferBase | Transport)):
        raise BackendUnavailable(f"kv_transfer.backend={name!r}: expected a subclass of KVTransferBase, got {found!r}")
    return found

"""PD disaggregation: the facade, and the parts that it is made of, each of which a package of its own owns.

Only GpuInstance and KVTransferManager import torch, at their first use. A process that starts instances, or sends them
requests, does not need it.
"""

from typing import TYPE_CHECKING, Any

from hbserve.pd_disagg.config import PdDisaggConfig as PdDisaggConfig
from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM as DisaggregatedLLM
from hbserve.pd_disagg.llm import LLM as LLM
from hbserve_kv import KVTransferBackend as KVTransferBackend
from hbserve_rpc import RpcClient as RpcClient
from hbserve_rpc import RpcServer as RpcServer
from hbserve_scheduler import CpuScheduler as CpuScheduler

if TYPE_CHECKING:
    from hbserve_core import GpuInstance as GpuInstance
    from hbserve_kv import KVTransferManager as KVTransferManager

__all__ = [
    "LLM",
    "CpuScheduler",
    "DisaggregatedLLM",
    "GpuInstance",
    "KVTransferBackend",
    "KVTransferManager",
    "PdDisaggConfig",
    "RpcClient",
    "RpcServer",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs torch at its first use (PEP 562)."""
    if name == "GpuInstance":
        from hbserve_core import GpuInstance

        return GpuInstance
    if name == "KVTransferManager":
        from hbserve_kv import KVTransferManager

        return KVTransferManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

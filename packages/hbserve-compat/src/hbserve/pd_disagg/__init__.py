"""Prefill and decode apart: the facade, and the parts that it is made of, each owned by a package of its own."""

from hbserve.llm import LLM as LLM
from hbserve.pd_disagg.config import PdDisaggConfig as PdDisaggConfig
from hbserve.pd_disagg.disaggregated_llm import DisaggregatedLLM as DisaggregatedLLM
from hbserve_core import GpuInstance as GpuInstance
from hbserve_kv import KVTransferBackend as KVTransferBackend
from hbserve_kv import KVTransferManager as KVTransferManager
from hbserve_rpc import RpcClient as RpcClient
from hbserve_rpc import RpcServer as RpcServer
from hbserve_scheduler import CpuScheduler as CpuScheduler

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

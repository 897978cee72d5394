"""Everything that one instance needs to know to run."""

from typing import Literal

import msgspec

from hbserve_core.errors import InvalidInstanceConfig
from hbserve_kv.config import KVTransferConfig
from hbserve_rpc import InvalidAddress, check_peer_host

Role = Literal["prefill", "decode", "hybrid"]


LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Configuration of one engine, and of the instance process around it.

    Limits of the batch, threads, host, port and log level are checked here; what depends on the model or the device
    when the model is loaded.

    Raises:
        InvalidInstanceConfig: (a ValueError) names the field, the value and what is allowed.
    """

    instance_id: str = "hybrid-0"
    role: Role = "hybrid"
    model_path: str
    """A Hugging Face model folder."""
    load_format: Literal["safetensors", "dummy"] = "safetensors"
    """"dummy" needs only config.json and invents the weights: the same numbers on each instance, whatever its device
    and number of ranks."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """"auto" takes the checkpoint's."""
    device: str = "auto"
    """"auto" (CUDA if there is one), "cpu", or "cuda:N"."""
    gpu_id: int | None = None
    """With device "auto": which CUDA device; None shares them out by kv_rank."""
    num_local_instances: int = 1
    """Instances of the same deployment that share this host's devices."""
    num_on_gpu: int | None = None
    """How many of them share this one's GPU; None: as sharing out by kv_rank has it."""
    tensor_parallel_size: int = 1
    """Ranks that the model is split among: one process each, on neighbouring GPUs of this host from `gpu_id` or
    `device` on, or on the CPU. The model's heads and MLP must be divisible by it."""
    num_threads: int = 0
    """Threads of torch's CPU operators, of all ranks together; 0 leaves torch's choice."""

    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int | None = None
    """KV blocks in the pool; None sizes the pool from free memory."""
    gpu_memory_utilization: float = 0.9
    """Fraction of a GPU's memory that all instances on it take together."""
    max_model_len: int | None = None
    """Most tokens of a sequence; None takes the model's own limit."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step."""
    chunked_prefill_enabled: bool = True
    chunk_size: int = 512
    """Most prompt tokens of one request in one step."""
    max_chunk_prefill_tokens: int = 4096
    """Most prompt tokens of all requests together in one step."""
    prefix_caching: bool = True
    cuda_graph_enabled: bool = True
    cuda_graph_max_seq_len: int = 2048

    host: str = "127.0.0.1"
    """Where its RPC server listens and is dialled: an IP address without brackets, or a name; no wildcard."""
    port: int = 0
    """Port of the instance's RPC server; 0 lets the OS choose."""
    kv_rank: int = 0
    kv_transfer: KVTransferConfig = msgspec.field(default_factory=KVTransferConfig)
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        at_least_one = (
            "tensor_parallel_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "chunk_size",
            "max_chunk_prefill_tokens",
        )
        for name, low in [*((name, 1) for name in at_least_one), ("num_threads", 0), ("kv_rank", 0)]:
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise InvalidInstanceConfig(f"{name}={value!r}: expected an integer >= {low}")
        try:
            check_peer_host(self.host)
        except InvalidAddress as error:
            raise InvalidInstanceConfig(f"host={error}") from None
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise InvalidInstanceConfig(f"port={self.port!r}: expected 0 (the system chooses) to 65535")
        if self.log_level not in LOG_LEVELS:
            raise InvalidInstanceConfig(f"log_level={self.log_level!r}: expected one of {', '.join(LOG_LEVELS)}")

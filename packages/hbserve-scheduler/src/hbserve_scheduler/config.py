"""What a deployment is configured with. One struct for each section of the YAML file, with the same names."""

from typing import Any, Literal

import msgspec

from hbserve_rpc.messages import Role

Policy = Literal["round_robin", "least_loaded"]


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    path: str | None = None
    """A Hugging Face model folder; None is the demo model."""
    tensor_parallel_size: int = 1
    """Ranks of each instance that says nothing else."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    load_format: Literal["safetensors", "dummy"] = "safetensors"


class KVTransferSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    backend: str = "nccl"
    """nccl, mooncake, ipc, auto, the name of an entry point, or `module:Class`."""
    buffer_size: int | str = 1 << 30
    """Bytes of each instance's lookup buffer, or a text like "512MiB"."""
    ip: str | None = None
    """Address that KV listeners bind and advertise; None is each instance's own host."""
    port: int = 0
    """Instance with kv_rank r listens at port + r; 0 lets the OS choose, as it does for the further ranks of one."""
    timeout_s: float = 30.0
    checksum: bool = False
    """Verify a checksum of each block that arrives: KV that was corrupted on its way is computed again."""
    options: dict[str, Any] = {}


class ChunkedPrefillSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: bool = True
    chunk_size: int = 512
    max_chunk_prefill_tokens: int = 4096


class CudaGraphSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    enabled: bool = True
    max_seq_len: int = 2048


class InstanceSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    instance_id: str
    instance_type: Role
    gpu_id: int | None = None
    """CUDA device; None shares the devices out by rank."""
    host: str = "127.0.0.1"
    """Where it serves, and where the scheduler and its peers dial it: an IP address of its machine, or a name."""
    port: int = 0
    kv_rank: int = 0
    tensor_parallel_size: int | None = None
    """Ranks of this instance, on GPUs from `gpu_id` on; None is `model.tensor_parallel_size`."""


class EngineSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    device: str = "auto"
    num_threads: int = 0
    """Threads per instance on the CPU; 0 shares the cores among the instances of a host."""
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    """Where it serves clients; 0.0.0.0 and :: are every address of its machine."""
    port: int = 5550
    prefill_policy: Policy = "least_loaded"
    decode_policy: Policy = "least_loaded"
    """Of hybrid instances too."""
    max_queue_size: int = 4096
    """Requests beyond this are refused as overload."""
    max_attempts: int = 3
    request_timeout_s: float | None = None
    """A request ends with an error after so long; None is never."""
    instance_wait_s: float = 30.0
    """How long requests wait while no instance of a role is there."""
    heartbeat_interval_s: float = 1.0
    heartbeat_timeout_s: float = 10.0
    max_pending_reservations: int = 8
    """Requests that may wait for room on one decode instance; others wait here, where their order can still change."""
    max_inflight_prefills: int = 32
    """Prompts that may be with one prefill instance."""
    max_inflight_requests: int = 512
    """Requests that may be with one hybrid instance."""


class DeploymentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: ModelSection = ModelSection()
    kv_transfer: KVTransferSection = KVTransferSection()
    chunked_prefill: ChunkedPrefillSection = ChunkedPrefillSection()
    cuda_graph: CudaGraphSection = CudaGraphSection()
    gpu_instances: list[InstanceSection] = []
    engine: EngineSection = EngineSection()
    scheduler: SchedulerConfig = SchedulerConfig()

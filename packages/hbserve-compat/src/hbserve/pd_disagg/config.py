"""PdDisaggConfig: a deployment in flat fields, for code that starts one."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hbserve_kv.config import KVTransferBackend
from hbserve_rpc.messages import Role
from hbserve_scheduler import ConfigError, DeploymentConfig, InstanceSection, convert

ROLES: tuple[Role, ...] = ("prefill", "decode")


def default_instances() -> list[InstanceSection]:
    """One prefill and one decode instance on this host, on ports that the OS chooses."""
    return [
        InstanceSection(instance_id=f"{role}-0", instance_type=role, kv_rank=rank) for rank, role in enumerate(ROLES)
    ]


@dataclass(slots=True)
class PdDisaggConfig:
    """Fields may be set until `DisaggregatedLLM.start()`, which checks them again. A misspelt one is an AttributeError.

    Raises:
        ConfigError: (a ValueError) a field that cannot be; names it, its value, and what is allowed.
    """

    model_path: str | Path | None = None
    """A Hugging Face model folder; None is the demo model."""
    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    """Most sequences in one step of an instance."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step of an instance."""
    kv_transfer_backend: KVTransferBackend | str = KVTransferBackend.NCCL
    """nccl, mooncake, ipc, auto, the name of an entry point, or `module:Class` of a KVTransferBase of your own."""
    kv_buffer_size: int | str = 1 << 30
    """Bytes of each instance's lookup buffer."""
    kv_ip: str | None = None
    """Address that KV listeners bind and advertise; None is each instance's own host."""
    kv_port: int = 0
    """Instance with rank r listens at kv_port + r; 0 lets the OS choose."""
    chunked_prefill_enabled: bool = True
    chunk_size: int = 512
    """Most prompt tokens of one request in one step."""
    max_chunk_prefill_tokens: int = 4096
    """Most prompt tokens of all requests together in one step."""
    cuda_graph_enabled: bool = True
    cuda_graph_max_seq_len: int = 2048
    gpu_instances: Sequence[InstanceSection | Mapping[str, Any]] = field(default_factory=default_instances)
    """Entries with the keys of the YAML section of the same name."""
    dtype: str = "auto"
    load_format: str = "safetensors"
    max_model_len: int | None = None
    device: str = "auto"
    num_threads: int = 0
    """Threads of each instance on the CPU; 0 shares the cores."""
    block_size: int = 16
    num_blocks: int | None = None
    """KV blocks of each instance; None sizes the pool from free memory."""
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    kv_timeout_s: float = 30.0
    kv_checksum: bool = False
    """Verify a checksum of each block that arrives: KV that was corrupted on its way is computed again."""
    kv_options: dict[str, Any] = field(default_factory=dict)
    """Handed to a custom KV backend."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Keys of the YAML section `scheduler`."""

    def __post_init__(self) -> None:
        self.to_deployment()

    def to_deployment(self) -> DeploymentConfig:
        """The same as a checked DeploymentConfig. Raises ConfigError."""
        content: dict[str, Any] = {"scheduler": self.scheduler}
        for name, path in PATHS.items():
            section, _, key = path.partition(".")
            content.setdefault(section, {})[key] = getattr(self, name)
        content["model"]["path"] = None if self.model_path is None else str(self.model_path)
        content["kv_transfer"]["backend"] = str(self.kv_transfer_backend)
        several = self.gpu_instances
        content["gpu_instances"] = (
            [msgspec.to_builtins(each) if isinstance(each, InstanceSection) else each for each in several]
            if isinstance(several, Sequence) and not isinstance(several, (str, bytes))
            else several
        )
        try:
            return convert(content)
        except ConfigError as error:
            raise ConfigError(_in_field_names(str(error))) from None

    @classmethod
    def from_deployment(cls, config: DeploymentConfig) -> "PdDisaggConfig":
        """The flat fields of a configuration file; see `hbserve_scheduler.load_config`."""
        values = {}
        for name, path in PATHS.items():
            section, _, key = path.partition(".")
            values[name] = getattr(getattr(config, section), key)
        return cls(**values, gpu_instances=config.gpu_instances, scheduler=msgspec.to_builtins(config.scheduler))


PATHS = {
    "model_path": "model.path",
    "tensor_parallel_size": "model.tensor_parallel_size",
    "dtype": "model.dtype",
    "load_format": "model.load_format",
    "max_model_len": "model.max_model_len",
    "kv_transfer_backend": "kv_transfer.backend",
    "kv_buffer_size": "kv_transfer.buffer_size",
    "kv_ip": "kv_transfer.ip",
    "kv_port": "kv_transfer.port",
    "kv_timeout_s": "kv_transfer.timeout_s",
    "kv_checksum": "kv_transfer.checksum",
    "kv_options": "kv_transfer.options",
    "chunked_prefill_enabled": "chunked_prefill.enabled",
    "chunk_size": "chunked_prefill.chunk_size",
    "max_chunk_prefill_tokens": "chunked_prefill.max_chunk_prefill_tokens",
    "cuda_graph_enabled": "cuda_graph.enabled",
    "cuda_graph_max_seq_len": "cuda_graph.max_seq_len",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "device": "engine.device",
    "num_threads": "engine.num_threads",
    "block_size": "engine.block_size",
    "num_blocks": "engine.num_blocks",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "prefix_caching": "engine.prefix_caching",
}
"""Field of PdDisaggConfig: path in the YAML file."""

assert set(PATHS) | {"gpu_instances", "scheduler"} == {each.name for each in dataclasses.fields(PdDisaggConfig)}


def _in_field_names(message: str) -> str:
    """A problem with `chunked_prefill.chunk_size` is one with `chunk_size` here."""
    names = {path: name for name, path in PATHS.items()}
    return re.sub(r"^[\w.]+", lambda found: names.get(found[0], found[0]), message)

"""Paged KV pool: one block-major tensor, in which one block is one contiguous piece of memory with all layers."""

import errno
import logging
from dataclasses import dataclass
from math import prod

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import InvalidInstanceConfig, NotEnoughMemory
from hbserve_core.model.host_memory import available_memory, total_memory
from hbserve_core.model.model_config import ModelConfig
from hbserve_kv import shared_empty

logger = logging.getLogger(__name__)

# Several instances may share a host without knowing of each other, so each takes a modest part by default.
_CPU_SHARE = 8
_CPU_MOST_BYTES = 4 << 30
# Memory that a process takes on a GPU before its first tensor, with some room for libraries' workspaces.
_CUDA_CONTEXT_BYTES = 1 << 30
_CUDA_WITH_FP8 = (8, 9)
"""Lowest compute capability that has 8-bit floats."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Shape of one block: (num_layers, 2, block_size, num_kv_heads, head_dim); index 1 is key or value."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def has_8_bit_floats(device: torch.device) -> bool:
    """Return whether a CUDA device has 8-bit floats in hardware."""
    return torch.cuda.get_device_capability(device) >= _CUDA_WITH_FP8


def kv_dtype(config: InstanceConfig, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of keys and values in the pool; `dtype` is the model's.

    Raises:
        InvalidInstanceConfig: the device does not have that dtype.
    """
    if config.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cuda" and not has_8_bit_floats(device):
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        raise InvalidInstanceConfig(
            f"kv_cache_dtype='fp8': {name} has compute capability {major}.{minor}, and 8-bit floats need "
            f"{'.'.join(map(str, _CUDA_WITH_FP8))}; leave it at 'auto'"
        )
    return torch.float8_e4m3fn


def block_shape(config: InstanceConfig, model: ModelConfig, dtype: torch.dtype) -> BlockShape:
    return BlockShape(model.num_layers, config.block_size, model.num_kv_heads, model.head_dim, dtype)


def allocate_pool(num_blocks: int, block: BlockShape, device: torch.device) -> torch.Tensor:
    """Allocate a pool (num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim), contiguous, not initialised.

    On the CPU it is memory that other processes can map, for transfers within the host. The operating system gives
    memory to a block when it is first written. A pool larger than the host's memory is refused, because it could never
    be filled.

    Raises:
        NotEnoughMemory: the pool does not fit.
    """
    try:
        if device.type == "cpu" and num_blocks * block.block_bytes > total_memory():
            raise MemoryError(f"this host has {total_memory() / 2**30:.1f} GiB")
        make = shared_empty if device.type == "cpu" else torch.empty
        return make((num_blocks, *block.shape), dtype=block.dtype, device=device)
    except (MemoryError, RuntimeError, OSError, torch.OutOfMemoryError) as error:
        of_host = f" ({error})" if isinstance(error, MemoryError) else ""
        if isinstance(error, OSError):
            of_host = f" ({error.strerror}{', raise `ulimit -f`' if error.errno == errno.EFBIG else ''})"
        raise NotEnoughMemory(
            f"num_blocks={num_blocks}: a KV pool of {num_blocks * block.block_bytes / 2**30:.1f} GiB does not fit on "
            f"{device}{of_host}; choose fewer blocks"
        ) from error


def choose_num_blocks(
    config: InstanceConfig, block: BlockShape, max_model_len: int, device: torch.device, reserved_bytes: int = 0
) -> int:
    """Return the configured number of blocks if there is one; otherwise as many as free memory holds, but no more than
    the engine can ever use.

    `reserved_bytes` of the device's memory are left free for the forward pass.

    Raises:
        NotEnoughMemory: not even one block fits.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    on_gpu = device.type == "cuda"
    budget = _cuda_budget(config, device) - reserved_bytes if on_gpu else _cpu_budget() // config.tensor_parallel_size
    useful = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = min(budget // block.block_bytes, useful)
    if num_blocks < 1:
        raise NotEnoughMemory(
            f"no room for the KV pool on {device}: {max(budget, 0) / 2**20:.0f} MiB are left and one block takes "
            f"{block.block_bytes / 2**20:.1f} MiB; free memory, raise gpu_memory_utilization, or set num_blocks"
        )
    if num_blocks * config.block_size < max_model_len:
        logger.warning(
            "the KV pool holds %d tokens, fewer than max_model_len=%d", num_blocks * config.block_size, max_model_len
        )
    return num_blocks


def _cuda_budget(config: InstanceConfig, device: torch.device) -> int:
    share = config.gpu_memory_utilization
    free, total = torch.cuda.mem_get_info(device)
    buffer_bytes = 0 if config.role == "hybrid" else config.kv_transfer.buffer_size
    num_local_ranks = config.num_local_instances * config.tensor_parallel_size
    num_on_gpu = config.num_on_gpu or -(-num_local_ranks // torch.cuda.device_count())
    if num_on_gpu == 1:
        return int(total * share) - (total - free) - buffer_bytes
    # The others start at the same time, so the memory that is free now says nothing: each takes its share of the total.
    own_bytes = torch.cuda.memory_reserved(device) + _CUDA_CONTEXT_BYTES
    return int(total * share / num_on_gpu) - own_bytes - buffer_bytes


def _cpu_budget() -> int:
    return min(available_memory() // _CPU_SHARE, _CPU_MOST_BYTES)

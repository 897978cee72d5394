"""What an instance says of itself when asked: InstanceInfo and InstanceStats."""

import os
from typing import TYPE_CHECKING, Any

from hbserve_rpc.messages import InstanceInfo, InstanceStats

if TYPE_CHECKING:
    from hbserve_core.instance.gpu_instance import GpuInstance


def describe(instance: "GpuInstance") -> InstanceInfo:
    config, engine, runner = instance.config, instance.engine, instance.runner
    known: dict[str, Any] = {}
    if engine is not None and runner is not None:
        known = {
            "max_model_len": runner.model_config.max_model_len,
            "max_prompt_len": engine.limits.max_prompt_len,
            "vocab_size": runner.model_config.vocab_size,
            "num_blocks": engine.blocks.num_blocks,
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
        }
    return InstanceInfo(
        config.instance_id, config.role, instance.epoch, instance.status, model=config.model_path,
        block_size=config.block_size, kv_backend=config.kv_transfer.backend if config.role != "hybrid" else "",
        pid=os.getpid(), error=instance.error, **known,
    )  # fmt: skip


async def statistics(instance: "GpuInstance") -> InstanceStats:
    transfers: dict[str, Any] = {}
    if instance.transfers is not None:
        kv = await instance.transfers.stats()
        transfers = {
            "active_transfers": kv.active_transfers,
            "buffered_bytes": kv.buffered_bytes,
            "kv_bytes_sent": kv.bytes_sent,
            "kv_bytes_received": kv.bytes_received,
            "kv_transfer_time_s": kv.busy_time_s,
            "failed_transfers": kv.num_failed,
            "dropped_messages": kv.dropped_messages,
        }
    config, engine = instance.config, instance.engine_stats
    return InstanceStats(
        config.instance_id, config.role, instance.status, instance.epoch,
        active_requests=instance.num_active, waiting_requests=engine.num_waiting,
        running_requests=engine.num_running, num_blocks=engine.num_blocks, free_blocks=engine.num_free_blocks,
        quarantined_blocks=engine.num_quarantined_blocks, total_requests=instance.num_requests,
        generated_tokens=engine.num_generated_tokens, prefill_tokens=engine.num_prefill_tokens,
        cached_tokens=engine.num_cached_tokens, preemptions=engine.num_preemptions, **transfers,
    )  # fmt: skip

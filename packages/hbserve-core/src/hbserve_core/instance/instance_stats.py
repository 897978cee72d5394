"""InstanceInfo and InstanceStats: what an instance is, and how it goes, from its engine and its transfers."""

import os
from typing import Any

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.engine.step import EngineStats, Runner
from hbserve_kv import TransferStats
from hbserve_rpc.messages import InstanceInfo, InstanceStats


def instance_stats(engine: EngineStats, transfers: TransferStats | None, **of_instance: Any) -> InstanceStats:
    """of_instance: the fields that neither knows of."""
    moved: dict[str, Any] = {}
    if transfers is not None:
        moved = {
            "active_transfers": transfers.active_transfers,
            "buffered_bytes": transfers.buffered_bytes,
            "kv_bytes_sent": transfers.bytes_sent,
            "kv_bytes_received": transfers.bytes_received,
            "kv_transfer_time_s": transfers.busy_time_s,
            "failed_transfers": transfers.num_failed,
            "dropped_messages": transfers.dropped_messages,
        }
    return InstanceStats(
        waiting_requests=engine.num_waiting,
        running_requests=engine.num_running,
        num_blocks=engine.num_blocks,
        free_blocks=engine.num_free_blocks,
        cached_blocks=engine.num_cached_blocks,
        reserved_blocks=engine.num_reserved_blocks,
        quarantined_blocks=engine.num_quarantined_blocks,
        generated_tokens=engine.num_generated_tokens,
        prefill_tokens=engine.num_prefill_tokens,
        cached_tokens=engine.num_cached_tokens,
        preemptions=engine.num_preemptions,
        iteration_tokens=engine.iteration_tokens,
        **moved,
        **of_instance,
    )


def instance_info(
    config: InstanceConfig, engine: Engine | None, runner: Runner | None, **of_instance: Any
) -> InstanceInfo:
    """of_instance: the fields that neither knows of, nor the configuration."""
    known: dict[str, Any] = {}
    if engine is not None and runner is not None:
        known = {
            "max_model_len": runner.model_config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_prompt_len": engine.limits.max_prompt_len,
            "vocab_size": runner.model_config.vocab_size,
            "num_blocks": engine.blocks.num_blocks,
            "device": str(runner.device),
            "dtype": str(runner.dtype).removeprefix("torch."),
        }
    return InstanceInfo(
        config.instance_id,
        config.role,
        model=config.model_path,
        block_size=config.block_size,
        kv_backend=config.kv_transfer.backend if config.role != "hybrid" else "",
        pid=os.getpid(),
        **known,
        **of_instance,
    )

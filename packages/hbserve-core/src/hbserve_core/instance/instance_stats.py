"""An InstanceStats, from the figures of an instance's engine and of its transfers."""

from typing import Any

from hbserve_core.engine.outputs import EngineStats
from hbserve_kv import TransferStats
from hbserve_rpc.messages import InstanceStats


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

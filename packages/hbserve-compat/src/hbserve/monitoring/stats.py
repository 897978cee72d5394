"""`hbserve stats`: the figures of a running deployment, in a terminal."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import msgspec

from hbserve.remote import remote_scheduler
from hbserve_rpc.counts import Histogram, RpcFaults
from hbserve_rpc.messages import InstanceStats, SchedulerStats

LATENCIES = {
    "queue": "request_queue_time_seconds",
    "TTFT": "time_to_first_token_seconds",
    "hand-off": "kv_handoff_exposed_seconds",
    "between tokens": "inter_token_latency_seconds",
    "whole request": "e2e_request_latency_seconds",
}
COLUMNS = ("instance", "role", "status", "running", "waiting", "blocks", "free", "sent", "received", "failed")


@dataclass(frozen=True)
class StatsArgs:
    """The command's arguments."""

    connect: str
    keys: Path | None
    json: bool


async def show_stats(args: StatsArgs) -> None:
    """Print the figures. Raises ConfigError, NotReady, and the scheduler's own errors."""
    async with remote_scheduler(args.connect, args.keys) as (scheduler, _):
        stats = await scheduler.fetch_stats()
    lines = [msgspec.json.format(msgspec.json.encode(stats)).decode()] if args.json else lines_of(stats)
    sys.stdout.writelines(f"{line}\n" for line in lines)


def lines_of(stats: SchedulerStats) -> Iterator[str]:
    yield (
        f"requests: {stats.waiting_requests} waiting, {stats.running_requests} running; "
        f"{stats.completed_requests} completed, {stats.failed_requests} failed, {stats.aborted_requests} aborted, "
        f"{stats.rejected_requests} rejected; {stats.retries} retries"
    )
    yield f"tokens: {stats.prompt_tokens} in prompts, {stats.output_tokens} delivered"
    for title, name in LATENCIES.items():
        histogram = stats.histograms.get(name)
        if histogram is not None and any(histogram.counts):
            parts = ", ".join(f"p{part:g} {_at_most(histogram, part / 100)}" for part in (50, 90, 99))
            yield f"{title}: {parts}"
    for failed, count in stats.failed_attempts.items():
        yield f"attempts failed by {failed}: {count}"
    for name, faults in {
        "the scheduler": stats.rpc,
        **{each.instance_id: each.rpc for each in stats.instances},
    }.items():
        if faults != RpcFaults():
            yield (
                f"at {name}, whose log says why: {faults.dropped_frames} messages dropped, "
                f"{faults.failed_notifications} notifications failed"
            )
    yield ""
    rows = [COLUMNS, *map(_row, stats.instances)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip()


def _row(stats: InstanceStats) -> tuple[str, ...]:
    figures = (stats.running_requests, stats.waiting_requests, stats.num_blocks, stats.free_blocks)
    moved = (f"{num_bytes / 2**20:.1f} MiB" for num_bytes in (stats.kv_bytes_sent, stats.kv_bytes_received))
    return (stats.instance_id, stats.role, stats.status, *map(str, figures), *moved, str(stats.failed_transfers))


def _at_most(histogram: Histogram, part: float) -> str:
    """Return, as text, the smallest bound of the histogram that this share of the values does not exceed."""
    wanted = part * sum(histogram.counts)
    for bound, count in zip(histogram.bounds, accumulate(histogram.counts), strict=False):
        if count >= wanted:
            return f"<= {1e3 * bound:g} ms"
    return f"> {histogram.bounds[-1]:g} s"

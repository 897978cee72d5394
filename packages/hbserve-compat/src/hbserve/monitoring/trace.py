"""Timelines of requests, made from their records: JSON for Perfetto (ui.perfetto.dev) and chrome://tracing.

    scheduler   queue ─┐
    prefill          └─▶ prefill: chunk, chunk, chunk
                          KV: parts behind the chunks ─┐
    decode          reserve, wait for KV               └─▶ decode
Each process of the deployment is a process of the timeline; requests that overlap have lanes of their own.
The format is Google's "Trace Event Format"; its times are in microseconds.
"""

import gzip
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from hbserve.output_file import require_writable, writing
from hbserve.remote import remote_scheduler
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_scheduler import ConfigError

SCHEDULER = "scheduler"
CLOCK = (
    "all times are of the scheduler's clock; what happened within an instance is told by its age in a message, "
    "and may have been earlier by as long as that message was under way"
)

Event = dict[str, Any]


def render_trace(records: Sequence[RequestRecord]) -> bytes:
    """Make the timeline of these requests as gzipped JSON. Without requests it has the scheduler's name alone."""
    origin_s = min((each.submitted_at for each in records), default=0.0)
    timeline = _Timeline()
    for record in sorted(records, key=lambda each: each.submitted_at):
        _Drawing(timeline, record, record.submitted_at - origin_s).draw()
    trace = {
        "traceEvents": [*timeline.names(), *timeline.events, *timeline.counters()],
        "displayTimeUnit": "ms",
        "metadata": {"unix_time_of_0_s": origin_s, "clock": CLOCK},
    }
    return gzip.compress(msgspec.json.encode(trace), mtime=0)


@dataclass(frozen=True)
class TraceArgs:
    """The command's arguments."""

    connect: str
    keys: Path | None
    request_id: str
    last_s: float
    path: Path


async def write_trace(args: TraceArgs) -> None:
    """Write a timeline to a file. Raises ConfigError, NotReady, OSError, and the scheduler's own errors."""
    require_writable("--output", args.path)  # before the request, which may have to wait for an answer
    async with remote_scheduler(args.connect, args.keys) as (scheduler, _):
        records = await scheduler.fetch_records(args.last_s, args.request_id)
    if args.request_id and not records:
        raise ConfigError(f"--request={args.request_id!r}: the scheduler has no record of it")
    with writing(args.path):
        args.path.write_bytes(render_trace(records))
    sys.stderr.write(f"{len(records)} requests in {args.path}; ui.perfetto.dev opens it\n")


class _Timeline:
    """Events of a timeline, and until when each lane of each process is taken."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._pids: dict[str, int] = {SCHEDULER: 1}
        self._free_at_s: dict[str, list[float]] = {}
        self._running: dict[str, list[tuple[float, int]]] = {}
        self._num_flows = 0

    def lane(self, process: str, begin_s: float, end_s: float) -> int:
        """Take the first lane of a process that is free at `begin_s`, until `end_s`. Returns its number."""
        self._pids.setdefault(process, len(self._pids) + 1)
        lanes = self._free_at_s.setdefault(process, [])
        free = (i for i, free_at_s in enumerate(lanes) if free_at_s <= begin_s)
        lane = next(free, len(lanes))
        lanes[lane : lane + 1] = [end_s]
        return lane

    def slice(self, process: str, lane: int, name: str, begin_s: float, end_s: float, **details: Any) -> None:
        """Draw a slice on a lane. The slices of one lane must follow each other, or lie within each other."""
        place = {"pid": self._pids[process], "tid": lane}
        times = {"ts": _us(begin_s), "dur": _us(end_s) - _us(begin_s)}
        self.events.append({"ph": "X", "name": name, "cat": "request"} | place | times | {"args": details})

    def count(self, process: str, begin_s: float, end_s: float) -> None:
        """Count one more request of a process from `begin_s` to `end_s`."""
        self._running.setdefault(process, []).extend([(begin_s, 1), (end_s, -1)])

    def arrow(self, name: str, *ends: tuple[str, int, float]) -> None:
        """Draw an arrow from one slice to another. Each end is a process, a lane, and a time within the slice."""
        self._num_flows += 1
        for (process, lane, at_s), phase in zip(ends, ("s", "f"), strict=True):
            place = {"pid": self._pids[process], "tid": lane, "ts": _us(at_s)}
            event = {"ph": phase, "name": name, "cat": "request", "id": self._num_flows} | place
            self.events.append(event | ({"bp": "e"} if phase == "f" else {}))

    def names(self) -> Iterator[Event]:
        for process, pid in self._pids.items():
            yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": process}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}

    def counters(self) -> Iterator[Event]:
        for process, changes in self._running.items():
            number = 0
            for at_s, change in sorted(changes):
                number += change
                yield {
                    "ph": "C",
                    "name": "requests",
                    "pid": self._pids[process],
                    "ts": _us(at_s),
                    "args": {"requests": number},
                }


class _Drawing:
    """One request on a timeline. The record's times count from its submission, which is at `offset_s` there."""

    def __init__(self, timeline: _Timeline, record: RequestRecord, offset_s: float) -> None:
        self._timeline = timeline
        self._record = record
        self._offset_s = offset_s

    def draw(self) -> None:
        record = self._record
        details = {
            "prompt tokens": record.num_prompt_tokens,
            "output tokens": record.num_output_tokens,
            "cached tokens": record.num_cached_tokens,
            **({"traceparent": record.traceparent} if record.traceparent else {}),
            "end": record.finish_reason or f"failed: {record.error}",
        }
        began_s = self._at(0)
        placed_s = self._at(record.queue_s)
        lane = self._timeline.lane(SCHEDULER, began_s, placed_s)
        self._timeline.slice(SCHEDULER, lane, f"queue {record.request_id}", began_s, placed_s, **details)
        for number, attempt in enumerate(record.attempts, 1):
            self._draw_attempt(attempt, number, (SCHEDULER, lane, placed_s))

    def _at(self, own_s: float) -> float:
        return self._offset_s + own_s

    def _draw_attempt(self, attempt: AttemptRecord, number: int, queue: tuple[str, int, float]) -> None:
        begin_s = self._at(attempt.began_s)
        end_s = self._at(self._record.e2e_s if attempt.ended_s is None else attempt.ended_s)
        first_s = end_s if attempt.first_token_s is None else self._at(attempt.first_token_s)
        details = {"request": self._record.request_id, "attempt": number}
        if attempt.error:
            details["error"] = attempt.error
        if attempt.decode_instance == attempt.prefill_instance:
            lane = self._prefill(attempt, begin_s, first_s, end_s, details)
            self._timeline.slice(attempt.prefill_instance, lane, "decode", first_s, end_s, **details)
        else:
            lane = self._prefill(attempt, begin_s, first_s, first_s, details)
        self._timeline.arrow("placed", queue, (attempt.prefill_instance, lane, begin_s))
        if attempt.decode_instance not in ("", attempt.prefill_instance):
            kv = self._kv(attempt, (attempt.prefill_instance, lane, first_s))
            self._decode(attempt, begin_s, first_s, end_s, details, kv)

    def _prefill(
        self, attempt: AttemptRecord, begin_s: float, first_s: float, end_s: float, details: dict[str, Any]
    ) -> int:
        """Draw the prefill and its chunks. Returns its lane, which is taken until `end_s`."""
        process = attempt.prefill_instance
        lane = self._timeline.lane(process, begin_s, end_s)
        self._timeline.count(process, begin_s, end_s)
        self._timeline.slice(process, lane, f"prefill {self._record.request_id}", begin_s, first_s, **details)
        done = [(begin_s, 0), *((_within(self._at(at_s), begin_s, first_s), count) for at_s, count in attempt.computed)]
        for (before_s, before), (at_s, count) in pairwise(done):
            self._timeline.slice(process, lane, f"chunk of {count - before}", min(before_s, at_s), at_s, tokens=count)
        return lane

    def _kv(self, attempt: AttemptRecord, prefill: tuple[str, int, float]) -> tuple[str, int, float]:
        """Draw the transfer, if something moved. Returns where the decode instance has its KV from: the slice of the
        transfer, or that of the prefill."""
        if not attempt.pushed or attempt.kv_moved_s is None:
            return prefill
        process = f"{attempt.prefill_instance} KV"
        end_s = self._at(attempt.kv_moved_s)
        begin_s = _within(self._at(attempt.pushed[0][0]), self._at(attempt.began_s), end_s)
        lane = self._timeline.lane(process, begin_s, end_s)
        sizes = {"bytes": self._record.kv_bytes, "to": attempt.decode_instance}
        self._timeline.slice(process, lane, f"KV {self._record.request_id}", begin_s, end_s, **sizes)
        for (at_s, before), (until_s, count) in pairwise([(attempt.pushed[0][0], 0), *attempt.pushed]):
            end_of_part_s = _within(self._at(until_s), begin_s, end_s)
            part = f"{count - before} blocks"
            self._timeline.slice(process, lane, part, _within(self._at(at_s), begin_s, end_of_part_s), end_of_part_s)
        return process, lane, begin_s

    def _decode(
        self,
        attempt: AttemptRecord,
        begin_s: float,
        first_s: float,
        end_s: float,
        details: dict[str, Any],
        kv: tuple[str, int, float],
    ) -> None:
        process = attempt.decode_instance
        granted_s = end_s if attempt.granted_s is None else _within(self._at(attempt.granted_s), begin_s, end_s)
        ready_s = end_s
        if attempt.first_token_s is not None:
            moved_s = first_s if attempt.kv_moved_s is None else max(first_s, self._at(attempt.kv_moved_s))
            ready_s = _within(moved_s, granted_s, end_s)
        lane = self._timeline.lane(process, begin_s, end_s)
        self._timeline.count(process, begin_s, end_s)
        self._timeline.slice(process, lane, "reserve", begin_s, granted_s, **details)
        if granted_s < end_s:
            self._timeline.slice(process, lane, "wait for KV", granted_s, ready_s, **details)
        if ready_s < end_s:
            self._timeline.slice(process, lane, f"decode {self._record.request_id}", ready_s, end_s, **details)
            self._timeline.arrow("KV", kv, (process, lane, max(ready_s, kv[2])))


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _us(time_s: float) -> int:
    return round(1e6 * time_s)

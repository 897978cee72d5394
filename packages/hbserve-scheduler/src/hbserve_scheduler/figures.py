"""Figures of one scheduler over all its requests: counters, and histograms of how long each phase took."""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Sequence
from itertools import takewhile
from typing import Any, get_args

from hbserve_rpc.counts import Histogram, HttpCounts, LinkCounts
from hbserve_rpc.loop_lag import LoopLag
from hbserve_rpc.messages import LatencySummary
from hbserve_rpc.records import Delay, RequestRecord

logger = logging.getLogger(__name__)

MOST_RECORDS = 4096
"""Number of ended requests that are remembered."""
RECENT_REQUESTS = 1024
"""Number of latencies that a LatencySummary covers."""
FEW_LINKS = 64
"""Number of links below which none is checked for instances that have left. Later it is twice the number of links left
after the last check, if that is more."""
SHORT_S = "0.001 0.0025 0.005 0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
FIRST_S = "0.001 0.0025 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
LONG_S = "0.005 0.05 0.1 0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
TOKENS = "1 2 5 10 20 50 100 200 500 1000 2000 5000 10000 20000 50000 100000 200000 500000"
BYTES = " ".join(str(2**power) for power in range(12, 40, 2))
"""Bounds of the histograms: vLLM's (v1/metrics/buckets.py), and some smaller ones, where our times per token are."""
BOUNDS = {
    "time_to_first_token_seconds": FIRST_S,
    "inter_token_latency_seconds": SHORT_S,
    "request_time_per_output_token_seconds": SHORT_S,
    "e2e_request_latency_seconds": LONG_S,
    "request_queue_time_seconds": LONG_S,
    "request_prefill_time_seconds": LONG_S,
    "request_decode_time_seconds": LONG_S,
    "request_inference_time_seconds": LONG_S,
    "request_prompt_tokens": TOKENS,
    "request_generation_tokens": TOKENS,
    "request_attempts": "1 2 3 5 10",
    "reservation_wait_seconds": FIRST_S,
    "kv_handoff_exposed_seconds": FIRST_S,
    "kv_transfer_seconds": FIRST_S,
    "kv_transfer_request_bytes": BYTES,
    "kv_transfer_overlap_ratio": "0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 0.95 1",
}


class Figures:
    """Figures of one scheduler, which are updated as requests proceed. `CpuScheduler.stats` reads them."""

    def __init__(self, members: Container[str] | None = None) -> None:
        """Begin with zeros. members: ids of the present instances; links of others are forgotten. None: no link is."""
        self._members = members
        self.num_submitted = self.num_rejected = self.num_retries = self.num_refusals = self.num_local_prefills = 0
        self.prompt_tokens = 0
        """Number of prompt tokens of requests that have a first token."""
        self.output_tokens = 0
        self.ended = Counter[str]()
        """Number of ended requests, by finish reason, or "error"."""
        self.failed_attempts = Counter[str]()
        self.histograms = {name: Histogram.over([*map(float, bounds.split())]) for name, bounds in BOUNDS.items()}
        self.between_tokens = self.histograms["inter_token_latency_seconds"]
        self.delay_s: dict[str, float] = dict.fromkeys(get_args(Delay), 0.0)
        self.delayed = Counter[str]()
        """Number of requests, by the main cause of their delay."""
        self.loop_lag = LoopLag()
        self.histograms["event_loop_lag_seconds"] = self.loop_lag.histogram
        self.links: dict[str, LinkCounts] = {}
        self._most_links = FEW_LINKS
        self.http: dict[str, HttpCounts] = {}
        """Counts of HTTP requests, kept by whoever serves this scheduler over HTTP."""
        self.records: deque[RequestRecord] = deque(maxlen=MOST_RECORDS)
        """Records of requests that have ended, the latest last."""
        self._ended_s: deque[float] = deque(maxlen=MOST_RECORDS)
        """Monotonic time at which each of these ended. Records have the time of day, which may be set by an hour."""
        self.on_record: Callable[[RequestRecord], None] | None = None
        """Callback that gets the record of each request that has ended."""
        self._handoffs: deque[float] = deque(maxlen=RECENT_REQUESTS)

    def add(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        self.records.append(record)
        self._ended_s.append(time.monotonic())
        if self.on_record is not None:
            self.on_record(record)
        self.ended[record.finish_reason or "error"] += 1
        if record.finish_reason is None:
            logger.warning("%s", record.describe())
        elif logger.isEnabledFor(logging.INFO):
            logger.info("%s", record.describe())
        delays = record.delays
        for cause, waited_s in delays.items():
            self.delay_s[cause] += waited_s
        if (main := record.main_of(delays)) is not None:
            self.delayed[main] += 1
        if (handoff_s := record.handoff_s) is not None:
            self._handoffs.append(handoff_s)
        if record.finish_reason not in (None, "abort"):
            for name, value in _values(record).items():
                self.histograms[name].observe(value)

    def lately(self, last_s: float) -> list[RequestRecord]:
        """Return records of requests that ended in the last `last_s` seconds, the latest last."""
        since_s = time.monotonic() - last_s
        latest_first = zip(reversed(self._ended_s), reversed(self.records), strict=True)
        return [record for _, record in takewhile(lambda each: each[0] >= since_s, latest_first)][::-1]

    def link(self, prefill: str, decode: str) -> LinkCounts:
        """Return the counts of the link between two instances, which include all their lives until one has left."""
        key = f"{prefill} > {decode}"
        if key not in self.links:
            if len(self.links) >= self._most_links:
                self._forget_links()
                self._most_links = max(FEW_LINKS, 2 * len(self.links))
            self.links[key] = LinkCounts(prefill, decode)
        return self.links[key]

    def _forget_links(self) -> None:
        """Forget links of instances that have left. They would become ever more if instances come under new names."""
        if (there := self._members) is not None:
            found = self.links.items()
            self.links = {key: each for key, each in found if each.active or each.is_between(there)}

    def snapshot(self) -> dict[str, Any]:
        """Return fields of SchedulerStats, as copies that do not change afterwards."""
        self._forget_links()
        completed, failed = self.ended["stop"] + self.ended["length"], self.ended["error"]
        return {
            "total_requests": self.num_submitted,
            "completed_requests": completed,
            "failed_requests": failed,
            "aborted_requests": self.ended["abort"],
            "rejected_requests": self.num_rejected,
            "retries": self.num_retries,
            "refusals": self.num_refusals,
            "local_prefills": self.num_local_prefills,
            "success_rate": completed / (completed + failed) if completed + failed else 1.0,
            "handoff": _summary(self._handoffs),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "ended_requests": dict(self.ended),
            "failed_attempts": dict(self.failed_attempts),
            "delay_s": dict(self.delay_s),
            "delayed_requests": dict(self.delayed),
            "histograms": {name: each.copy() for name, each in self.histograms.items()},
            "links": {key: each.copy() for key, each in self.links.items()},
            "http": {key: each.copy() for key, each in self.http.items()},
        }


def _values(record: RequestRecord) -> dict[str, float]:
    """Return the values that a completed request adds to the histograms: only times that its client has noticed.
    Aborted requests are in none, because they would measure how patient clients are."""
    queue_s = record.queue_s
    values = {
        "e2e_request_latency_seconds": record.e2e_s,
        "request_queue_time_seconds": queue_s,
        "request_inference_time_seconds": record.e2e_s - queue_s,
        "request_prompt_tokens": record.num_prompt_tokens,
        "request_generation_tokens": record.num_output_tokens,
        "request_attempts": len(record.attempts),
    }
    if record.first_token_s is not None:
        values["time_to_first_token_seconds"] = record.first_token_s
        values["request_prefill_time_seconds"] = record.first_token_s - queue_s
        values["request_decode_time_seconds"] = record.e2e_s - record.first_token_s
        if (tpot_s := record.tpot_s) is not None:
            values["request_time_per_output_token_seconds"] = tpot_s
    if record.is_disaggregated:
        last = record.attempts[-1]
        if last.granted_s is not None:
            values["reservation_wait_seconds"] = last.granted_s - last.began_s
        if (handoff_s := record.handoff_s) is not None:
            values["kv_handoff_exposed_seconds"] = handoff_s
        if record.kv_bytes:
            values["kv_transfer_seconds"] = record.kv_transfer_time_s
            values["kv_transfer_request_bytes"] = record.kv_bytes
        if last.kv_overlap is not None:
            values["kv_transfer_overlap_ratio"] = last.kv_overlap
    return values


def _summary(latencies: Collection[float]) -> LatencySummary:
    """Summarise latencies. Each percentile is a latency that occurred: the smallest one that at least this share of all
    does not exceed."""
    if not latencies:
        return LatencySummary()
    ordered = sorted(latencies)
    p50_s, p99_s = (ordered[math.ceil(part * len(ordered)) - 1] for part in (0.5, 0.99))
    return LatencySummary(len(ordered), p50_s, p99_s)


def longest_pause(times_s: Sequence[float], since_s: float) -> tuple[float, float] | None:
    """Return start and end of the longest interval between neighbours, relative to `since_s`; None for fewer than two
    times."""
    if len(times_s) < 2:
        return None
    end = max(range(1, len(times_s)), key=lambda i: times_s[i] - times_s[i - 1])
    return times_s[end - 1] - since_s, times_s[end] - since_s

"""Metrics of the vLLM connector, in the form in which vLLM logs them and exports them to Prometheus."""

import statistics
from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0]
BYTES = [float(1 << power) for power in range(12, 36, 2)]
HISTOGRAMS = {
    "transfer_duration": (
        "vllm:hbserve_xfer_time_seconds",
        "Time during which blocks of one transfer to this rank were moving.",
        SECONDS,
    ),
    "bytes_transferred": ("vllm:hbserve_bytes_transferred", "Bytes of one transfer to this rank.", BYTES),
}
COUNTERS = {
    "num_failed_transfers": (
        "vllm:hbserve_num_failed_transfers",
        "Transfers to a rank that failed; their requests are computed here, or fail, as kv_load_failure_policy says.",
    ),
    "num_not_delivered": (
        "vllm:hbserve_num_not_delivered",
        "Prompts whose KV a rank offered and nobody fetched: their lease ended, or either side gave them up.",
    ),
}


class HBServeStats(KVConnectorStats):  # type: ignore[misc]  # vllm is not here where types are checked
    """Observations since they were last taken."""

    data: dict[str, list[float]]
    """Observed numbers by name of the metric."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: "HBServeStats") -> "HBServeStats":
        for name, numbers in other.data.items():
            self.data.setdefault(name, []).extend(numbers)
        return self

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """Return figures for the log. Transfers overlap in time, so nothing is divided by the sum of their times."""
        times_s, sizes = self.data.get("transfer_duration", []), self.data.get("bytes_transferred", [])
        return {
            "Num successful transfers": len(times_s),
            "Avg xfer time (ms)": round(1e3 * statistics.fmean(times_s), 3) if times_s else 0,
            "Max xfer time (ms)": round(1e3 * max(times_s), 3) if times_s else 0,
            "Avg MB per transfer": round(statistics.fmean(sizes) / 2**20, 3) if sizes else 0,
            "Num failed transfers": int(sum(self.data.get("num_failed_transfers", []))),
            "Num not delivered": int(sum(self.data.get("num_not_delivered", []))),
        }


class HBServePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """Histograms and counters of these figures for Prometheus, with vLLM's own labels."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._observers: dict[str, Mapping[int, Any]] = {}
        for name, (published, text, buckets) in HISTOGRAMS.items():
            histogram = self._histogram_cls(name=published, documentation=text, buckets=buckets, labelnames=labelnames)
            self._observers[name] = self._per_engine(histogram)
        for name, (published, text) in COUNTERS.items():
            self._observers[name] = self._per_engine(
                self._counter_cls(name=published, documentation=text, labelnames=labelnames)
            )

    def _per_engine(self, metric: Any) -> dict[int, Any]:
        return {engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()}

    def observe(self, transfer_stats_data: Mapping[str, list[float]], engine_idx: int = 0) -> None:
        for name, numbers in transfer_stats_data.items():
            if name in self._observers:
                metric = self._observers[name][engine_idx]
                for number in numbers:
                    (metric.inc if name in COUNTERS else metric.observe)(number)

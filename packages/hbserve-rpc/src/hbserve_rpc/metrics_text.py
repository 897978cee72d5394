"""Metrics in Prometheus's text format 0.0.4, made of families that are filled at each scrape."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Literal

from hbserve_rpc.counts import Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Family:
    """Samples of one metric. `name` is given without the suffix `_total` that a counter's samples have."""

    def __init__(
        self,
        name: str,
        kind: Literal["gauge", "counter", "histogram", "summary"],
        documentation: str,
        labels: Sequence[str] = (),
    ) -> None:
        self.name = f"{name}_total" if kind == "counter" else name
        self._labels = labels
        help_text = documentation.replace("\\", r"\\").replace("\n", r"\n")
        self._lines = [f"# HELP {self.name} {help_text}", f"# TYPE {self.name} {kind}"]

    def add(self, value: float, *labels: str) -> None:
        """Add a sample with these values of the labels."""
        self._add("", value, labels)

    def add_each(self, values: Mapping[str, float]) -> None:
        """Add samples of a family with one label: values by that label's value."""
        for label, value in values.items():
            self.add(value, label)

    def add_histogram(self, histogram: Histogram, *labels: str, bounds: Sequence[float] | None = None) -> None:
        """Add the samples of a histogram. bounds: the only ones of its bounds to show; None shows all."""
        up_to = zip(histogram.bounds, accumulate(histogram.counts), strict=False)
        num_values = sum(histogram.counts)
        for bound, count in up_to:
            if bounds is None or bound in bounds:
                self._add("_bucket", count, labels, repr(float(bound)))
        self._add("_bucket", num_values, labels, "+Inf")
        self.add_summary(num_values, histogram.total, *labels)

    def add_summary(self, count: int, total: float, *labels: str) -> None:
        self._add("_count", count, labels)
        self._add("_sum", total, labels)

    def _add(self, suffix: str, value: float, labels: Sequence[str], up_to: str | None = None) -> None:
        pairs = list(zip(self._labels, labels, strict=True))
        if up_to is not None:
            pairs.append(("le", up_to))
        shown = ",".join(f'{name}="{_quoted(value)}"' for name, value in pairs)
        self._lines.append(f"{self.name}{suffix}{{{shown}}} {value!r}" if shown else f"{self.name}{suffix} {value!r}")

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def text_of(families: Iterable[Family]) -> bytes:
    # A lone surrogate, which a name from elsewhere may have, cannot be encoded.
    return "".join(map(str, families)).encode("utf-8", "replace")


def _quoted(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

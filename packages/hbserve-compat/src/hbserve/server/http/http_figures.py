"""Figures of HTTP requests by path and status: how many there were, how long they took, and their bytes.

At /metrics they are `http_*`, with the labels that prometheus-fastapi-instrumentator gives them in vLLM.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from starlette.routing import Route

from hbserve_rpc.counts import Histogram, HttpCounts
from hbserve_rpc.metrics_text import Family

BOUNDS = [0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60]
COARSE_BOUNDS = [0.1, 0.5, 1.0]
"""Bounds of each path's histogram, which are some of BOUNDS."""
NO_PATH = "none"
"""Label for requests to unknown paths: what clients make up must not become labels."""
NOT_COUNTED = {"/metrics", "/health", "/ping", "/version", "/debug/view"}
"""Paths that programs poll. Counting them would hide the requests of users; vLLM does not count them either."""


class HttpFigures:
    """Counts of the requests that have ended."""

    def __init__(self) -> None:
        self.counts: dict[str, HttpCounts] = {}
        self._paths: dict[Callable[..., Any], str] = {}

    def know(self, routes: Iterable[Route]) -> None:
        """Set the routes by which requests are counted."""
        self._paths = {route.endpoint: route.path for route in routes}

    def add(
        self, method: str, endpoint: Callable[..., Any] | None, status: int, took_s: float, received: int, sent: int
    ) -> None:
        """Count a request that has ended. `endpoint` is the handler that answered it; `received` and `sent` are the
        bytes of both bodies."""
        path = NO_PATH if endpoint is None else self._paths.get(endpoint, NO_PATH)
        if path in NOT_COUNTED:
            return
        group = f"{status // 100}xx"
        key = f"{method} {path} {group}"
        found = self.counts.get(key)
        if found is None:
            found = self.counts[key] = HttpCounts(method, path, group, Histogram.over(BOUNDS))
        found.seconds.observe(took_s)
        found.request_bytes += received
        found.response_bytes += sent


def http_metrics(counts: Iterable[HttpCounts]) -> Iterator[Family]:
    """Yield the metrics of these counts for /metrics."""
    found = list(counts)
    requests = Family(
        "http_requests",
        "counter",
        "HTTP requests, by method, class of status, and path.",
        ["method", "status", "handler"],
    )
    for each in found:
        requests.add(sum(each.seconds.counts), each.method, each.status, each.path)
    yield requests
    sizes = {"request": "request_bytes", "response": "response_bytes"}
    for what, field in sizes.items():
        family = Family(f"http_{what}_size_bytes", "summary", f"Bytes of the bodies of {what}s.", ["handler"])
        for path in sorted({each.path for each in found}):
            same = [each for each in found if each.path == path]
            count = sum(sum(each.seconds.counts) for each in same)
            family.add_summary(count, sum(getattr(each, field) for each in same), path)
        yield family
    of_all = Family(
        "http_request_duration_highr_seconds", "histogram", "Time until the end of the answer, of all requests."
    )
    of_all.add_histogram(_total(found))
    yield of_all
    by_path = Family(
        "http_request_duration_seconds",
        "histogram",
        "Time until the end of the answer, by path and method.",
        ["method", "handler"],
    )
    for method, path in sorted({(each.method, each.path) for each in found}):
        same = [each for each in found if (each.method, each.path) == (method, path)]
        by_path.add_histogram(_total(same), method, path, bounds=COARSE_BOUNDS)
    yield by_path


def _total(counts: list[HttpCounts]) -> Histogram:
    whole = Histogram.over(BOUNDS)
    for each in counts:
        whole += each.seconds
    return whole

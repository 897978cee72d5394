"""Check of what Perfetto needs in a trace."""

import gzip
import json
from collections import defaultdict
from typing import Any


def read_trace(content: bytes) -> dict[str, Any]:
    return json.loads(gzip.decompress(content))


def check_trace(trace: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Check that slices of a lane are nested or apart, arrows go forward in time between slices, and counters end at 0.

    Returns the slices by process.
    """
    events = trace["traceEvents"]
    names = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    lanes = defaultdict(list)
    for each in events:
        if each["ph"] == "X":
            assert each["dur"] >= 0
            lanes[each["pid"], each["tid"]].append(each)
    for slices in lanes.values():
        open_until: list[float] = []
        for each in sorted(slices, key=lambda each: (each["ts"], -each["dur"])):
            while open_until and open_until[-1] <= each["ts"]:
                open_until.pop()
            assert not open_until or each["ts"] + each["dur"] <= open_until[-1], each
            open_until.append(each["ts"] + each["dur"])
    flows: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for each in events:
        if each["ph"] in ("s", "f"):
            assert flows[each["id"]].setdefault(each["ph"], each) is each
            at = [it for it in lanes[each["pid"], each["tid"]] if it["ts"] <= each["ts"] <= it["ts"] + it["dur"]]
            assert at, "an arrow has a slice at each end"
    for ends in flows.values():
        assert ends["s"]["ts"] <= ends["f"]["ts"]
    last = {each["pid"]: each["args"]["requests"] for each in events if each["ph"] == "C"}
    assert set(last.values()) <= {0}
    by_process: defaultdict[Any, list[Any]] = defaultdict(list)
    for (pid, _), slices in lanes.items():
        by_process[names[pid]] += slices
    return by_process

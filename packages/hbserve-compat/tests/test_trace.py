"""Timelines of requests: whatever the records are, the file has what Perfetto needs."""

from typing import Any

from hbserve_traces import check_trace, read_trace
from hypothesis import given
from hypothesis import strategies as st

from hbserve.monitoring.trace import render_trace
from hbserve_rpc.messages import FinishReason
from hbserve_rpc.records import AttemptRecord, RequestRecord

TIME = st.floats(0, 2)
REASONS: list[FinishReason | None] = ["stop", "length", "abort", None]


def load(records: list[RequestRecord]) -> dict[str, Any]:
    return read_trace(render_trace(records))


def requests_of(number: int) -> list[RequestRecord]:
    """Make records of requests over prefill and decode, one each millisecond; each third one was tried twice."""
    made = []
    for i in range(number):
        first = AttemptRecord(0.001, "p0", "d0", ended_s=0.002, error="d0: lost")
        last = AttemptRecord(
            0.003, f"p{i % 2}", "d1", granted_s=0.004, first_token_s=0.02, kv_moved_s=0.022, ended_s=0.05,
            computed=[(0.01, 512), (0.019, 1024)], pushed=[(0.011, 32), (0.02, 64)],
        )  # fmt: skip
        attempts = [first, last] if i % 3 == 0 else [last]
        record = RequestRecord(f"r{i}", 1e9 + i / 1e3, 1024, 9, 0, 2**20, 0.01, attempts, 0.05, "length", 0.02, 0.023)
        made.append(record)
    return made


def test_a_request_is_seen_where_it_was_in_order_and_by_its_names():
    slices = check_trace(load(requests_of(1)))
    assert {process: [each["name"] for each in found] for process, found in slices.items()} == {
        "scheduler": ["queue r0"],
        "p0": ["prefill r0", "prefill r0", "chunk of 512", "chunk of 512"],
        "d0": ["reserve"],
        "p0 KV": ["KV r0", "32 blocks", "32 blocks"],
        "d1": ["reserve", "wait for KV", "decode r0"],
    }
    assert slices["p0"][0]["args"]["error"] == "d0: lost"
    decode = slices["d1"][-1]
    assert (decode["ts"], decode["dur"]) == (22000, 28000)


def test_a_thousand_requests_with_retries_are_a_small_file():
    trace = render_trace(requests_of(1000))
    assert len(trace) < 150 * 1024
    check_trace(read_trace(trace))


@st.composite
def record(draw: st.DrawFn) -> RequestRecord:
    """Draw a record of a request, with anything that instances may report, and with any end."""
    attempts, at_s = [], draw(TIME)
    for _ in range(draw(st.integers(0, 3))):
        began_s, at_s = at_s, at_s + draw(TIME)
        moments = st.none() | st.floats(began_s, at_s)
        milestones = st.lists(st.tuples(st.floats(-1, 6), st.integers(0, 99)), max_size=3).map(sorted)
        prefill, decode = draw(st.sampled_from([("p0", "d0"), ("p0", ""), ("h0", "h0"), ("p1", "d0")]))
        moved_s = draw(moments)
        pushed = draw(milestones) if moved_s is not None else []
        attempt = AttemptRecord(
            began_s, prefill, decode, granted_s=draw(moments), first_token_s=draw(moments), kv_moved_s=moved_s,
            computed=draw(milestones), pushed=pushed, ended_s=draw(st.none() | st.just(at_s)),
            error=draw(st.sampled_from(["", "lost"])),
        )  # fmt: skip
        attempts.append(attempt)
        at_s += draw(TIME)
    reason = draw(st.sampled_from(REASONS))
    return RequestRecord("r", 1e9 + draw(TIME), 4, 2, 0, 4096, 0.1, attempts, at_s, reason)


@given(st.lists(record(), max_size=6))
def test_whatever_was_recorded_is_drawn_so_that_it_can_be_opened(records):
    check_trace(load(records))

"""The live view: rates of a window, waterfalls of requests, their texts in a terminal, and `hbserve top`."""

import gzip
import json
import sys
import time

import msgspec
import pytest
from textual.widgets import Static

from hbserve.monitoring import top
from hbserve.monitoring.live_text import instance_table, link_matrix, sparkline, text_of, waterfall
from hbserve.monitoring.live_view import APART_S, WINDOW_S, LiveView, Segment, View, request_view, segments
from hbserve.monitoring.top import TopArgs, show_top
from hbserve.monitoring.top_app import TopApp
from hbserve.monitoring.trace import render_trace
from hbserve_rpc import PeerLost
from hbserve_rpc.messages import InstanceStats, SchedulerStats
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_scheduler import ConfigError, CpuScheduler, SchedulerConfig, SchedulerServer
from hbserve_scheduler.figures import Figures


def record(request_id="r", *attempts, e2e_s=4.0, first_s=2.0, second_s=3.0, **others) -> RequestRecord:
    given = {"finish_reason": "length", "first_token_s": first_s, "second_token_s": second_s} | others
    return RequestRecord(request_id, 100.0, 16, 5, 0, 4096, 0.5, list(attempts), e2e_s, **given)


PAIR = AttemptRecord(
    0.5, "p0", "d0", granted_s=1.0, first_token_s=2.0, computed=[(1.5, 8), (2.0, 16)], kv_moved_s=3.2, decoding_s=3.0
)
SLOW = {
    "queue": (record("q", AttemptRecord(3.0, "p0", "d0", 3.1, 3.2, 3.3), first_s=3.2, second_s=3.4), "queue", 3.0),
    "reservation": (record("w", AttemptRecord(0.1, "p0", "d0", 2.6, 2.9, 3.0), first_s=2.9), "reserve", 2.5),
    "transfer": (record("t", AttemptRecord(0.1, "p0", "d0", 0.2, 0.5, 3.0, computed=[(0.5, 16)])), "kv", 2.5),
    "preemption": (
        record("p", AttemptRecord(0.1, "p0", "d0", 0.2, 0.3, 0.4), first_s=0.3, num_preemptions=1, stalled=(1.0, 3.0)),
        "preempted",
        2.0,
    ),
    "retry": (
        record("f", AttemptRecord(0.1, "p0", "d0", ended_s=2.5, error="x"), AttemptRecord(2.5, "p1", "d0", 2.6, 2.7)),
        "failed",
        2.4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", SLOW)
def test_a_slow_requests_waterfall_shows_what_held_it_up(cause):
    slow, name, took_s = SLOW[cause]
    view = request_view(slow)
    assert slow.main_delay == cause
    longest = max(view.segments, key=lambda each: each.end_s - each.begin_s)
    assert (longest.name, longest.end_s - longest.begin_s) == (name, pytest.approx(took_s))
    assert view.held_up == slow.held_up
    assert view.held_up in text_of(a_view(slow))


def test_a_waterfall_is_without_gaps_and_what_is_computed_beside_a_wait_is_no_wait():
    parts = list(segments(record("r", PAIR)))
    assert parts == [
        Segment("queue", 0, 0.5), Segment("reserve", 0.5, 1.0), Segment("prefill", 1.0, 2.0), Segment("kv", 2.0, 3.0),
        Segment("decode", 3.0, 4.0),
    ]  # fmt: skip
    early = AttemptRecord(0.5, "p0", "d0", granted_s=1.75, computed=[(1.5, 8), (2.0, 16)], kv_moved_s=2.0)
    names = [each.name for each in segments(record("r", early))]
    assert names == ["queue", "prefill", "reserve", "prefill", "decode"]
    hybrid = AttemptRecord(0.5, "h0", "h0", first_token_s=2.0)
    assert [each.name for each in segments(record("r", hybrid))] == ["queue", "prefill", "decode"]
    never = record("r", e2e_s=1.0, first_s=None, second_s=None, finish_reason=None, error="no room")
    assert list(segments(never)) == [Segment("queue", 0, 1.0)]


def a_view(*records: RequestRecord, seconds: float = 2.0) -> View:
    """Return the view of the second of two looks, between which the records came."""
    figures, live = Figures(), LiveView()
    instances = [
        InstanceStats("p0", "prefill", "ready", "1", prefill_tokens=10),
        InstanceStats("d\x1b0", "decode", "lost"),
    ]
    figures.link("p0", "d0").is_up = True
    live.look(10.0, 100.0, SchedulerStats(**figures.snapshot(), instances=instances), [])
    for each in records:
        figures.add(each)
        figures.output_tokens += each.num_output_tokens
    link = figures.link("p0", "d0")
    link.active, link.num_bytes, link.time_s = 2, 3_000_000_000, 2.0
    link.end("completed")
    grown = msgspec.structs.replace(instances[0], prefill_tokens=30, num_blocks=8, free_blocks=5, cached_blocks=1)
    stats = SchedulerStats(**figures.snapshot(), instances=[grown, instances[1]], waiting_requests=3)
    return live.look(10.0 + seconds, 102.0, stats, records)


def test_rates_and_percentiles_are_of_what_was_added_between_two_looks():
    view = a_view(record("a", PAIR), record("b", PAIR))
    assert (view.requests_per_s, view.tokens_per_s, view.waiting) == (1.0, 5.0, 3)
    assert view.instances[0].tokens_per_s == 10.0
    assert (view.links[0].gb_per_s, view.links[0].active, view.links[0].outcomes) == (1.5, 1, {"completed": 1})
    assert 1.0 < (view.latencies["ttft"].p50_s or 0.0) <= 2.5
    assert view.latencies["itl"].p95_s is None
    assert [each.request_id for each in view.requests] == ["b", "a"]
    assert msgspec.json.decode(msgspec.json.encode(view), type=View) == view


def test_a_window_has_an_end_requests_come_once_and_another_life_counts_anew():
    figures, live = Figures(), LiveView()
    one = record("a", PAIR)

    def look(now_s: float, epoch: str = "1", computed: int = 0) -> View:
        instance = InstanceStats("p0", "prefill", "ready", epoch, prefill_tokens=computed)
        return live.look(now_s, now_s, SchedulerStats(**figures.snapshot(), instances=[instance]), [one])

    look(0.0, computed=1000)
    figures.add(one)
    assert look(1.0, computed=1010).requests_per_s == 1.0
    assert look(2.0, "2", computed=4).instances[0].tokens_per_s == 2.0
    assert look(20.0).latencies["ttft"].p50_s is None, "it was long ago"
    assert len(look(21.0).requests) == 1


def test_however_often_people_look_few_looks_are_remembered():
    live = LiveView()
    views = [live.look(number / 100, 0.0, SchedulerStats(output_tokens=number), []) for number in range(3000)]
    assert all(view.tokens_per_s == pytest.approx(100.0) for view in views[1:])
    assert len(live._looks) <= WINDOW_S / APART_S + 2


def test_texts_say_what_is_and_obey_nobody():
    view = a_view(record("bad\x1b[2J", PAIR, finish_reason=None, error="p0: no"), *(each for each, *_ in SLOW.values()))
    text = text_of(view)
    assert "\x1b" not in text
    assert "failed: p0: no" in text
    assert link_matrix(view).splitlines()[1].split() == ["p0", "up", "1.5", "GB/s", "1", "moving"]
    assert instance_table(view).splitlines()[1].split()[-7:] == ["10", "4", "free,", "1", "cached,", "3", "active"]
    assert sparkline([0, None, 1, 2], 6) == "  ▁ ▅█"
    marks = {name: len(part) for name, part in waterfall(request_view(record("r", PAIR)), 4.0, 8)}
    assert marks == {"queue": 1, "reserve": 1, "prefill": 2, "kv": 2, "decode": 2}
    assert "no links" in link_matrix(msgspec.structs.replace(view, links=[]))


class ShownSource:
    """The source of a TopApp: views that a test makes, or an error."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self.looks = 0
        self.records = [record("[bold]one", PAIR)]
        self.error: Exception | None = None
        self.drained: list[str] = []

    async def look(self) -> View:
        self.looks += 1
        if self.error is not None:
            raise self.error
        return a_view(*self.records)

    async def drain(self, instance_id: str) -> None:
        if instance_id in self.drained:
            raise PeerLost("gone")
        self.drained.append(instance_id)

    async def trace(self) -> bytes:
        return render_trace(self.records)


async def test_the_application_shows_a_deployment_pauses_says_that_nobody_answers_and_saves_traces(tmp_path):
    source = ShownSource()
    app = TopApp(source, interval_s=3600, folder=tmp_path)
    async with app.run_test(size=(140, 50)) as pilot:

        def shown(name: str) -> str:
            return str(app.query_one(f"#{name}", Static).render())

        await pilot.pause()
        assert "0 running, 3 waiting; 1 completed" in shown("overview")
        assert "TTFT p95" in shown("sparks")
        assert "up 1.5 GB/s" in shown("links")
        assert "[bold]one" in shown("requests"), "names of clients are no markup"
        assert "p0 > d0: length" in shown("requests")
        await pilot.press("p")
        await app.look()
        assert source.looks == 1, "it is paused"
        await pilot.press("p")
        source.error = PeerLost("gone")
        await app.look()
        assert app.query_one("#problem", Static).display
        assert "127.0.0.1:1 does not answer: gone" in shown("problem")
        assert "1 completed" in shown("overview"), "what was said last stays"
        source.error = None
        await app.look()
        assert not app.query_one("#problem", Static).display
        await pilot.press("t")
        await pilot.pause()
        (path,) = tmp_path.glob("trace-*.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any("[bold]one" in str(event.get("name")) for event in events)
        await pilot.press("q")
    assert app.return_code == 0


async def test_waterfalls_are_shorter_where_the_terminal_would_cut_off_what_held_a_request_up():
    source = ShownSource()
    source.records = [msgspec.structs.replace(SLOW["reservation"][0], request_id="r" * 30)]
    longest = {}
    for width in (160, 110):
        app = TopApp(source, interval_s=3600)
        async with app.run_test(size=(width, 50)) as pilot:
            await pilot.pause()
            lines = str(app.query_one("#requests", Static).render()).splitlines()
            cause = source.records[0].held_up
            assert cause
            assert lines[0].endswith(cause)
            assert len(lines[0]) + 2 <= width
            longest[width] = lines[0].count("-") + lines[0].count("━")
    assert longest[160] > longest[110]


async def test_the_application_drains_the_instance_that_is_chosen_or_none(tmp_path):
    source = ShownSource()
    app = TopApp(source, interval_s=3600, folder=tmp_path)
    async with app.run_test(size=(140, 50)) as pilot:
        await pilot.pause()
        await pilot.press("d", "escape")
        await pilot.pause()
        assert source.drained == []
        await pilot.press("d", "down", "enter")
        await pilot.pause()
        assert source.drained == ["d\x1b0"]
        await pilot.press("d", "down", "enter")
        await pilot.pause()
        assert any("is not drained: gone" in each.message for each in app._notifications)
        assert app.is_running


async def test_one_look_is_printed_for_people_and_for_programs(capsys, monkeypatch):
    monkeypatch.setattr(top, "INTERVAL_S", 0.01)
    server = SchedulerServer(CpuScheduler(SchedulerConfig(port=0)))
    await server.start()
    try:
        now = msgspec.structs.replace(record("one", PAIR), submitted_at=time.time())
        server.scheduler.figures.add(now)
        await show_top(TopArgs(server.address, None, once=True, json=False))
        assert "p0 > d0: length" in capsys.readouterr().out
        await show_top(TopArgs(server.address, None, once=True, json=True))
        view = msgspec.json.decode(capsys.readouterr().out, type=View)
        assert (view.completed, view.requests[0].request_id) == (1, "one")
        with pytest.raises(ConfigError, match=r"^hbserve top needs a terminal.*; --once prints one view$"):
            await show_top(TopArgs(server.address, None, once=False, json=False))
        monkeypatch.setitem(sys.modules, "textual.app", None)
        monkeypatch.delitem(sys.modules, "hbserve.monitoring.top_app")
        with pytest.raises(ConfigError, match=r"pip install 'hbserve-compat\[top\]'"):
            await show_top(TopArgs(server.address, None, once=False, json=False))
        with pytest.raises(ConfigError, match="--json needs --once"):
            await show_top(TopArgs(server.address, None, once=False, json=True))
    finally:
        await server.stop()

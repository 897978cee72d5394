"""What is kept, counted and logged of a request that has ended."""

import asyncio
import logging
import time

import pytest

from hbserve_rpc import KVTransferFailed, RemoteError
from hbserve_rpc.messages import TokenEvent
from hbserve_rpc.records import AttemptRecord, RequestRecord
from hbserve_rpc.trace_context import in_trace
from hbserve_scheduler import CpuScheduler, RequestFailed
from hbserve_scheduler.figures import FEW_LINKS, MOST_RECORDS, Figures
from hbserve_scheduler.metrics import HISTOGRAMS, deployment_metrics
from hbserve_scheduler.request import ScheduledRequest
from hbserve_scheduler.server import SchedulerServer


def counts(scheduler) -> dict[str, int]:
    """How many values each histogram has."""
    return {name: sum(each.counts) for name, each in scheduler.stats().histograms.items()}


async def test_a_request_over_prefill_and_decode_leaves_its_times_in_order(make_scheduler, pair, ask, collect):
    # Known elsewhere: vLLM #29474, #33289.
    scheduler = await make_scheduler(*pair)
    _, end = await collect(scheduler.submit(ask("r1", max_tokens=4)))
    (record,) = scheduler.figures.records
    (attempt,) = record.attempts
    assert record.finished("length") == end
    assert (record.request_id, record.finish_reason, record.num_output_tokens) == ("r1", "length", 4)
    assert (attempt.prefill_instance, attempt.decode_instance, attempt.error) == ("p0", "d0", "")
    assert 0 <= record.queue_s == attempt.began_s <= attempt.granted_s
    assert attempt.began_s <= attempt.first_token_s <= attempt.kv_moved_s <= attempt.ended_s <= record.e2e_s
    assert record.first_token_s <= record.second_token_s <= record.e2e_s
    stats = scheduler.stats()
    assert (stats.prompt_tokens, stats.output_tokens) == (len(ask().prompt_token_ids), 4)
    assert stats.ended_requests == {"length": 1}
    found = counts(scheduler)
    assert found.pop("inter_token_latency_seconds") == 3
    del found["event_loop_lag_seconds"]
    assert set(found.values()) == {1}, "every other one has one value"


async def test_the_trace_of_a_request_goes_with_each_of_its_attempts_and_into_what_is_told_of_it(
    make_scheduler, pair, ask, collect, caplog
):
    caplog.set_level(logging.INFO, "hbserve_scheduler.figures")
    scheduler = await make_scheduler(*pair)
    pair[0].fail["first"] = [RemoteError("out of luck")]
    trace = f"00-{'0af7651916cd43dd' * 2}-b7ad6b7169203331-01"
    with in_trace(trace):
        traced = scheduler.submit(ask("traced"))
    other = scheduler.submit(ask("other"))
    await asyncio.gather(collect(traced), collect(other))
    for each in pair:
        found = list(zip([request.request_id for request in each.requests], each.traces, strict=True))
        assert {trace for request_id, trace in found if request_id.startswith("traced")} == {trace}
        assert {trace for request_id, trace in found if request_id.startswith("other")} == {""}
    assert len(pair[0].requests) == 3
    assert {each.request_id: each.traceparent for each in scheduler.figures.records} == {"traced": trace, "other": ""}
    lines = {line.split()[1]: line for line in caplog.messages}
    assert lines["traced:"].endswith(f"; trace {trace.split('-')[1]}")
    assert "trace" not in lines["other:"].removeprefix("request other:")


async def test_a_hybrid_instance_and_a_single_token_have_no_handoff(make_scheduler, make_instance, ask, collect):
    scheduler = await make_scheduler(await make_instance("hybrid", "h0"))
    await collect(scheduler.submit(ask(max_tokens=3)))
    await collect(scheduler.submit(ask(max_tokens=1)))
    found = counts(scheduler)
    assert found["kv_handoff_exposed_seconds"] == found["reservation_wait_seconds"] == found["kv_transfer_seconds"] == 0
    assert (found["time_to_first_token_seconds"], found["request_time_per_output_token_seconds"]) == (2, 1)
    assert "h0 >" not in scheduler.figures.records[0].describe()


async def test_what_is_told_of_a_request_is_its_figures_by_phase_and_its_retries(
    make_scheduler, make_instance, ask, collect, caplog
):
    caplog.set_level(logging.INFO, "hbserve_scheduler.figures")
    instances = [await make_instance(role, f"{role[0]}{i}") for role in ("prefill", "decode") for i in range(2)]
    for prefill, kind in zip(instances, (RemoteError, KVTransferFailed), strict=False):
        prefill.fail["first"] = [kind("out of luck")]
    scheduler = await make_scheduler(*instances)
    await collect(scheduler.submit(ask("r1")))
    (line,) = [each.getMessage() for each in caplog.records if each.name == "hbserve_scheduler.figures"]
    assert line.startswith("request r1: 4 + 4 tokens")
    for phase in ("queue ", "reserve ", "prefill ", "KV 0.0 MiB in ", "hand-off ", "decode "):
        assert phase in line
    assert "length after attempt 1: p" in line
    assert line.count("out of luck") == 2
    assert scheduler.stats().failed_attempts == {"RemoteError": 1, "KVTransferFailed": 1}
    assert counts(scheduler)["request_attempts"] == 1


async def test_a_failure_and_an_abort_are_counted_but_are_no_latencies(
    make_scheduler, pair, ask, collect, caplog, until
):
    pair[0].fail["first"] = [RemoteError("out of luck")]
    scheduler = await make_scheduler(*pair, max_attempts=1)
    with pytest.raises(RequestFailed):
        await collect(scheduler.submit(ask("bad")))
    failed = scheduler.figures.records[-1]
    assert (failed.finish_reason, failed.attempts[-1].error) == (None, "p0: out of luck")
    assert "request bad" in caplog.text
    assert "failed: attempt 1: p0: out of luck" in caplog.text
    pair[1].hold = {"tokens"}
    events = scheduler.submit(ask("left"))
    await anext(events)
    await events.aclose()
    assert scheduler.figures.records[-1].finish_reason == "abort"
    assert scheduler.stats().ended_requests == {"error": 1, "abort": 1}
    assert set((counts(scheduler) | {"event_loop_lag_seconds": 0}).values()) == {0}
    pair[1].release()


async def test_messages_of_tokens_are_counted_by_the_time_between_them(ask, monkeypatch):
    figures = Figures()
    entry = ScheduledRequest(ask(max_tokens=5), figures, submitted_s=0)
    for now_s, index, tokens in [(1, 0, [5]), (1.004, 1, [6]), (1.03, 2, [7, 8, 9]), (1.031, 4, [9])]:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "time", lambda now_s=now_s: now_s)
            entry.deliver(TokenEvent(index, tokens))
    entry.count()
    found = {
        bound: n for bound, n in zip(figures.between_tokens.bounds, figures.between_tokens.counts, strict=False) if n
    }
    assert found == {0.005: 1, 0.05: 1}, "tokens that were there already are none"
    assert figures.output_tokens == 5


async def test_tokens_are_in_the_figures_while_their_request_still_runs(make_scheduler, pair, ask, collect):
    scheduler = await make_scheduler(*pair)
    pair[1].hold = {"done"}
    events = scheduler.submit(ask(max_tokens=4))
    while (await anext(events)).finish_reason is None:  # what comes faster than it is read comes together
        pass
    before = scheduler.stats()
    assert (before.output_tokens, sum(before.histograms["inter_token_latency_seconds"].counts)) == (4, 3)
    pair[1].release()
    await collect(events)
    after = scheduler.stats()
    assert (after.output_tokens, sum(after.histograms["inter_token_latency_seconds"].counts)) == (4, 3)


@pytest.mark.parametrize("jump_s", [3600, -3600])
async def test_what_ended_lately_is_found_though_the_time_of_day_was_set(
    jump_s, make_scheduler, pair, ask, collect, monkeypatch
):
    scheduler = await make_scheduler(*pair)
    await collect(scheduler.submit(ask("before")))
    time_of_day = time.time
    monkeypatch.setattr(time, "time", lambda: time_of_day() + jump_s)
    await collect(scheduler.submit(ask("after")))
    for found in scheduler.records(600), await SchedulerServer(scheduler).fetch_records(600):
        assert [each.request_id for each in found] == ["before", "after"]
    assert scheduler.records(0) == [], "nor is it found for as long as the clock went back"


def test_snapshots_do_not_change_and_records_are_bounded():
    figures = Figures()
    before = figures.snapshot()
    record = RequestRecord("r", 0, 4, 2, 0, 0, 0, [AttemptRecord(0.1, "h0", "h0")], 1, "stop", 0.2, 0.3)
    for _ in range(MOST_RECORDS + 1):
        figures.add(record)
    assert len(figures.records) == MOST_RECORDS
    assert not any(sum(each.counts) for each in before["histograms"].values())
    assert sum(figures.snapshot()["histograms"]["e2e_request_latency_seconds"].counts) == MOST_RECORDS + 1
    assert all(each.bounds == sorted(set(each.bounds)) for each in figures.histograms.values())


def test_every_histogram_is_described_also_one_of_another_version():
    stats = CpuScheduler().stats()
    assert set(HISTOGRAMS) == set(stats.histograms)
    stats.histograms["of_tomorrow"] = stats.histograms["request_attempts"]
    assert any(each.name == "hbserve:of_tomorrow" for each in deployment_metrics(stats))


def test_links_of_instances_that_have_left_are_forgotten_once_nothing_moves_over_them():
    there: set[str] = set()
    figures = Figures(there)
    for number in range(3 * FEW_LINKS):  # nobody asks for the figures meanwhile
        pair = f"p{number}", f"d{number}"
        there.clear()
        there.update(pair)
        moving = figures.link(*pair)
        moving.active += 1
        moving.end("completed")
        assert len(figures.links) <= FEW_LINKS
    moving.active += 1
    assert list(figures.snapshot()["links"].values()) == [moving], "others are not shown any more"
    there.clear()
    assert list(figures.snapshot()["links"].values()) == [moving]
    moving.end("failed")
    assert figures.snapshot()["links"] == figures.links == {}


def test_as_many_links_are_kept_as_there_are():
    figures = Figures({f"{role}{number}" for role in "pd" for number in range(FEW_LINKS)})
    for number in range(FEW_LINKS):
        figures.link(f"p{number}", "d0").active += 1
        figures.link(f"p{number}", f"d{number}").num_bytes += 1
    assert len(figures.snapshot()["links"]) == 2 * FEW_LINKS - 1
    assert sum(each.num_bytes for each in figures.links.values()) == FEW_LINKS


async def test_transfers_are_counted_by_the_pair_and_by_how_they_ended(make_scheduler, pair, ask, collect, until):
    # Known elsewhere: SGLang #16832, #7944.
    prefill, decode = pair
    scheduler = await make_scheduler(*pair, max_attempts=1)

    def link():
        (found,) = scheduler.stats().links.values()
        return found

    assert (link().prefill, link().decode, link().is_up, link().outcomes) == ("p0", "d0", True, {})
    prefill.hold = {"done"}
    events = scheduler.submit(ask())
    await anext(events)
    await until(lambda: link().active == 1)
    prefill.release()
    await collect(events)
    assert (link().active, link().outcomes, link().num_bytes, link().time_s) == (0, {"completed": 1}, 1000, 0.5)
    prefill.fail["done"] = [RemoteError("the cable")]
    decode.hold = {"tokens"}
    with pytest.raises(RequestFailed):
        await collect(scheduler.submit(ask()))
    assert (link().active, link().outcomes) == (0, {"completed": 1, "failed": 1})
    decode.release()
    prefill.hold = {"done"}
    left = scheduler.submit(ask())
    await anext(left)
    await until(lambda: link().active == 1)
    await left.aclose()
    await until(lambda: link().active == 0)
    assert link().outcomes == {"completed": 1, "failed": 1, "aborted": 1}
    prefill.release()
    await decode.server.stop()
    await until(lambda: link().is_up is None)
    await decode.restart()


def test_the_overlap_of_a_transfer_is_the_part_of_its_time_in_which_its_prompt_was_computed():
    attempt = AttemptRecord(0.0, "p", "d", computed=[(1.0, 8), (2.0, 16)], pushed=[(1.0, 4), (2.0, 8)], kv_moved_s=3.0)
    assert attempt.kv_overlap == 0.5
    assert AttemptRecord(0.0, "p", "d", computed=[(1.0, 8)], pushed=[(1.0, 4)], kv_moved_s=3.0).kv_overlap == 0
    assert AttemptRecord(0.0, "p", "d", computed=[(4.0, 8)], pushed=[(1.0, 4)], kv_moved_s=3.0).kv_overlap == 1
    assert AttemptRecord(0.0, "p", "d", kv_moved_s=3.0).kv_overlap is None
    record = RequestRecord("r", 0, 16, 2, 0, 99, 1.0, [attempt], 4.0, "length", 2.0, 3.5)
    figures = Figures()
    figures.add(record)
    assert figures.histograms["kv_transfer_overlap_ratio"].total == 0.5


async def test_at_debug_a_request_says_where_it_is_phase_by_phase(make_scheduler, pair, ask, collect, caplog):
    caplog.set_level(logging.DEBUG, "hbserve_scheduler.attempt")
    scheduler = await make_scheduler(*pair)
    await collect(scheduler.submit(ask("r1")))
    said = [each.getMessage() for each in caplog.records if each.name == "hbserve_scheduler.attempt"]
    assert all(line.startswith("request r1, attempt 1, ") for line in said)
    phases = [line.partition(" ms: ")[2] for line in said]
    assert phases[0] == "placed on p0 and d0"
    assert {
        "room on d0, 1 tokens cached",
        "first token",
        "decodes",
        "1000 bytes of KV moved in 1 parts, 500.0 ms",
    } < set(phases)
    assert len(phases) == 5

"""What each verb does to a request that is in another phase than usual. The runner computes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import SimulatedDevice
from hbserve_rpc import SamplingParams

BLOCK = 4


def make_engine(overlaps=True):
    model: Any = SimpleNamespace(vocab_size=50, max_model_len=60, reach=0, eos_token_ids=(0,))
    device = SimulatedDevice(model, 20, lambda work: 0.0)
    device.overlaps = overlaps
    return Engine(InstanceConfig(model_path="", block_size=BLOCK), device)


@pytest.fixture
def engine():
    """At the end no id is in use, and all blocks are free."""
    engine = make_engine()
    yield engine
    run(engine)
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_reserved, stats.num_quarantined_blocks) == (0, 0, 0, 0)
    assert stats.num_free_blocks == stats.num_blocks


def run(engine):
    """The outputs until nothing is left to do."""
    outputs = []
    for _ in range(100):
        if engine.has_work():
            outputs += engine.step()
            engine.check_integrity()
    assert not engine.has_work()
    return outputs


def grant_behind_a_step(engine):
    """Request "r" has its blocks, but is told so only after the step in flight, which writes to one of them."""
    engine.reserve("parked", [1] * 56, SamplingParams(0, 3))
    assert len(engine.poll_reservations()) == 1
    engine.add("before", [1] * 12, SamplingParams(0, 3))
    engine.add("goes on", [1] * 4, SamplingParams(0, 3))
    engine.step()
    engine.release("before")
    engine.reserve("r", [1] * 9, SamplingParams(0, 3))
    assert engine.poll_reservations() == []
    engine.release("parked")
    engine.check_integrity()


def test_a_reservation_that_comes_while_a_step_is_computed_is_told_at_once(engine):
    engine.add("before", [1, 2, 3], SamplingParams(0, 9))
    engine.add("ends", [1] * 20, SamplingParams(0, 9))
    engine.step()
    engine.release("ends")
    engine.reserve("r", [1] * 50, SamplingParams(0, 3))
    (granted,) = engine.poll_reservations()
    assert (granted.request_id, len(granted.block_ids)) == ("r", 13), "20 blocks, of which a step in flight writes to 6"
    engine.release("r")


def test_a_reservation_that_was_granted_is_told_after_the_step_in_flight(engine):
    grant_behind_a_step(engine)
    assert not engine.stalled
    engine.step()
    (granted,) = engine.poll_reservations()
    assert (granted.request_id, len(granted.block_ids)) == ("r", 3)
    engine.release("r")


def test_an_engine_with_a_grant_to_tell_has_work(engine):
    grant_behind_a_step(engine)
    engine.release("goes on")
    engine.step()
    assert engine.has_work(), "the step is not in flight any more; the grant is still to be told"
    engine.step()
    assert not engine.stalled
    assert len(engine.poll_reservations()) == 1
    assert not engine.has_work()
    engine.release("r")


@pytest.mark.parametrize("verb", ["release", "quarantine"])
def test_a_request_that_ends_before_its_grant_is_told_gets_none(engine, verb):
    grant_behind_a_step(engine)
    if verb == "release":
        engine.release("r")
    else:
        engine.quarantine("r", 3)
    engine.step()
    assert engine.poll_reservations() == []
    engine.check_integrity()
    engine.release("r")


def test_a_quarantined_request_is_held_already_and_cannot_be_activated(engine):
    engine.reserve("r", [1] * 9, SamplingParams(0, 3))
    engine.poll_reservations()
    engine.quarantine("r", 2)
    assert engine.stats().num_free_blocks == 20 - 2, "the block that no transfer touches is free"
    engine.hold("r")
    engine.activate("r", 5)
    engine.check_integrity()
    assert not engine.has_work()
    assert engine.stats().num_quarantined_blocks == 2
    engine.release("r")


def test_only_a_held_request_can_be_quarantined(engine):
    engine.add("r", [1] * 9, SamplingParams(0, 3))
    with pytest.raises(AssertionError, match="r: WAITING cannot become QUARANTINED"):
        engine.quarantine("r", 1)
    engine.check_integrity()
    engine.release("r")


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("is_trusted", [True, False])
def test_others_find_what_was_handed_over_only_where_it_is_trusted(engine, num_choices, is_trusted):
    engine.reserve("r", [1] * 9, SamplingParams(0, 6, n=num_choices))
    engine.poll_reservations()
    engine.activate("r", *[5] * num_choices, is_trusted=is_trusted)
    run(engine)
    engine.add("goes on", [1] * 9 + [5] * 5, SamplingParams(0, 1))
    outputs = run(engine)
    assert outputs[-1].num_cached_tokens == (12 if is_trusted else 0)


def test_what_is_not_held_is_not_activated(engine):
    engine.activate("never heard of", 5)
    engine.add("r", [1] * 9, SamplingParams(0, 3))
    engine.activate("r", 5)
    engine.check_integrity()
    engine.step()
    engine.activate("r", 5)
    engine.check_integrity()
    outputs = run(engine)
    assert [output.token_id for output in outputs] == [5, 5, 5]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_request_generates_exactly_max_tokens_and_its_id_is_free_then(engine, num_steps):
    engine.add("r", [1] * 9, SamplingParams(0, num_steps + 1))
    outputs = run(engine)
    assert [output.finish_reason for output in outputs] == [None] * num_steps + ["length"]
    engine.add("r", [1] * 9, SamplingParams(0, 1))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_last_token_of_a_quarantined_request_does_not_end_its_quarantine(engine, role):
    """The step that brings it was in flight when a transfer of the request failed."""
    if role == "prefill":
        engine.add("r", [1] * 9, SamplingParams(0, 1), prefill_only=True)
    else:
        engine.reserve("r", [1] * 9, SamplingParams(0, 2))
        engine.poll_reservations()
        engine.activate("r", 5)
    engine.step()
    engine.hold("r")
    engine.quarantine("r", 3)
    assert run(engine) == []
    assert engine.stats().num_quarantined_blocks == 3
    engine.release("r")


def test_a_choice_that_has_ended_is_not_ended_again(engine):
    """Whoever ends one may not know yet that it has ended, or that the request has."""
    engine.add("r", [1] * 9, SamplingParams(0, 9, n=2))
    engine.step()
    engine.step()
    engine.release_choice("r", 0)
    engine.release_choice("r", 0)
    engine.check_integrity()
    assert {output.choice for output in run(engine)} == {1}
    engine.release_choice("r", 1)


def preempt_itself(engine, is_trusted=True):
    """Request "r" gives up its blocks for want of another; the token that fills the last of them is in flight. Returns
    the outputs so far."""
    engine.reserve("parked", [1] * 56, SamplingParams(0, 3))
    engine.reserve("r", [1] * 19, SamplingParams(0, 9))
    assert len(engine.poll_reservations()) == 2
    engine.activate("r", 5, is_trusted=is_trusted)
    outputs = []
    while engine.stats().num_preemptions == 0:
        outputs += engine.step()
        engine.check_integrity()
    assert engine.stats().num_running == 0
    return outputs


def test_a_preempted_request_keeps_the_token_that_was_in_flight(engine):
    outputs = preempt_itself(engine)
    engine.release("parked")
    outputs += run(engine)
    assert [output.index for output in outputs if output.token_id == 5] == list(range(1, 9))


def test_a_preempted_request_is_found_by_others_once_it_was_computed_here(engine):
    preempt_itself(engine, is_trusted=False)
    engine.release("parked")
    run(engine)
    engine.add("goes on", [1] * 19 + [5] * 5, SamplingParams(0, 1))
    assert run(engine)[-1].num_cached_tokens == 20


def test_an_engine_that_has_only_preempted_is_not_stalled():
    """The blocks may be enough for a request that waits, and has a better priority."""
    engine = make_engine(overlaps=False)
    engine.reserve("parked", [1] * 56, SamplingParams(0, 3))
    engine.poll_reservations()
    engine.add("r", [1] * 20, SamplingParams(0, 9))
    engine.step()
    engine.step()
    assert engine.stats().num_free_blocks == 0
    engine.add("first", [1], SamplingParams(0, 1, priority=-1))
    while engine.stats().num_preemptions == 0:
        assert engine.wait_s() == 0.0
        outputs = engine.step()
    assert outputs == []
    assert engine.wait_s() == 0.0
    assert [output.request_id for output in engine.step()] == ["first"]
    engine.release("parked")
    run(engine)


def test_an_attempt_that_goes_on_finds_its_prompt_whose_logprobs_were_told_before(engine):
    engine.add("before", [1] * 9, SamplingParams(0, 1))
    run(engine)
    engine.add("r", [1] * 9, SamplingParams(0, 3, prompt_logprobs=1), [5])
    assert run(engine)[0].num_cached_tokens == 8


def test_a_step_in_flight_computes_nothing_of_a_request_that_the_token_before_it_has_ended(engine):
    engine.add("r", [1] * 9, SamplingParams(0, 2, stop_token_ids=[5]))
    assert [(output.index, output.finish_reason) for output in run(engine)] == [(0, "stop")]

"""What each verb does to a request that is in another phase than usual. The runner computes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest

from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import SimulatedDevice
from hbserve_rpc import SamplingParams

BLOCK = 4


@pytest.fixture
def engine():
    """At the end no id is in use, and all blocks are free."""
    model: Any = SimpleNamespace(vocab_size=50, max_model_len=60, reach=0, eos_token_ids=(0,))
    device = SimulatedDevice(model, 20, lambda work: 0.0)
    engine = Engine(InstanceConfig(model_path="", block_size=BLOCK), device)
    yield engine
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    stats = engine.stats()
    assert (stats.num_waiting, stats.num_running, stats.num_reserved, stats.num_quarantined_blocks) == (0, 0, 0, 0)
    assert stats.num_free_blocks == stats.num_blocks


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
    while engine.has_work():
        engine.step()
    engine.add("goes on", [1] * 9 + [5] * 5, SamplingParams(0, 1))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert outputs[-1].num_cached_tokens == (12 if is_trusted else 0)


def test_what_is_not_held_is_not_activated(engine):
    engine.activate("never heard of", 5)
    engine.add("r", [1] * 9, SamplingParams(0, 3))
    engine.activate("r", 5)
    engine.check_integrity()
    engine.step()
    engine.activate("r", 5)
    engine.check_integrity()
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [output.token_id for output in outputs] == [5, 5, 5]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_a_request_generates_exactly_max_tokens_and_its_id_is_free_then(engine, num_steps):
    engine.add("r", [1] * 9, SamplingParams(0, num_steps + 1))
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    assert [output.finish_reason for output in outputs] == [None] * num_steps + ["length"]
    engine.add("r", [1] * 9, SamplingParams(0, 1))

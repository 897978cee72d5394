"""The life of one transfer, as a table."""

import pytest

from hbserve_kv.transfer_state import IncomingState, Outcome, State


def begun(one_sided: bool = False) -> IncomingState:
    state = IncomingState(one_sided)
    assert state.begin("e1")
    return state


def test_parts_then_commit_complete_a_transfer():
    state = begun()
    for part in (0, 1):
        assert state.start_part("e1", part)
        state.end_part(part)
    assert state.commit("e1", 2)
    assert state.outcome is Outcome.COMPLETED


def test_a_commit_that_lacks_parts_fails_it():
    state = begun()
    assert not state.commit("e1", 1)
    assert (state.outcome, state.cause) == (Outcome.FAILED_DRAINED, "committed with 1 parts, of which 0 have landed")


LATE = {
    "begun twice": lambda state: state.begin("e1"),
    "a part sent twice": lambda state: state.start_part("e1", 0),
    "a part of another life": lambda state: state.start_part("e2", 1),
    "a commit of another life": lambda state: state.commit("e2", 1),
    "drained by another life": lambda state: state.sender_drained("e2"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_does_not_fit_changes_nothing(case):
    state = begun()
    state.start_part("e1", 0)
    state.end_part(0)
    assert not LATE[case](state)
    assert state.state is State.RECEIVING
    assert state.commit("e1", 1)


@pytest.mark.parametrize("end", ["commit", "fail"])
def test_the_end_is_final_and_the_first_cause_is_kept(end):
    state = begun()
    if end == "commit":
        state.commit("e1", 0)
    else:
        state.fail("first")
    before = (state.state, state.cause)
    state.fail("second")
    state.give_up()
    assert not state.begin("e1")
    assert not state.start_part("e1", 0)
    assert not state.commit("e1", 0)
    assert (state.state, state.cause) == before


def test_a_two_sided_transfer_is_drained_when_its_last_part_has_ended():
    state = begun()
    state.start_part("e1", 0)
    state.fail("cancelled")
    assert state.state is State.DRAINING
    state.end_part(0, "aborted")
    assert (state.outcome, state.cause) == (Outcome.FAILED_DRAINED, "cancelled")


def test_a_one_sided_transfer_is_drained_only_when_its_sender_says_so():
    state = begun(one_sided=True)
    state.fail("cancelled")
    assert state.state is State.DRAINING
    state.give_up()
    assert state.outcome is Outcome.UNKNOWN
    assert state.sender_drained("e1")
    assert state.outcome is Outcome.FAILED_DRAINED


def test_a_transfer_that_never_began_is_drained_at_once():
    state = IncomingState(one_sided=True)
    state.fail("cancelled")
    assert state.outcome is Outcome.FAILED_DRAINED

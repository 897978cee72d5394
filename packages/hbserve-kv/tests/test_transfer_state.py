"""The life of one transfer, as a table."""

import pytest

from hbserve_kv.protocol.transfer_state import (
    Coverage,
    IncomingState,
    Outcome,
    Phase,
    TransferResult,
    joint_result,
)


def begun(one_sided: bool = False) -> IncomingState:
    state = IncomingState()
    assert state.begin("e1", one_sided=one_sided)
    return state


def test_parts_then_commit_complete_a_transfer():
    state = begun()
    for part in (0, 1):
        assert state.start_parts("e1", part)
        state.end_part("e1", part)
    assert state.commit("e1", 2)
    assert state.outcome is Outcome.COMPLETED


def test_a_commit_that_lacks_parts_fails_it():
    state = begun()
    assert not state.commit("e1", 1)
    state.sender_drained("e1")
    assert (state.outcome, state.cause) == (Outcome.FAILED_DRAINED, "committed with 1 parts, of which 0 have landed")


LATE = {
    "begun twice": lambda state: state.begin("e1", one_sided=False),
    "a part sent twice": lambda state: state.start_parts("e1", 0),
    "a part of another life": lambda state: state.start_parts("e2", 1),
    "a commit of another life": lambda state: state.commit("e2", 1),
    "drained by another life": lambda state: state.sender_drained("e2"),
}


@pytest.mark.parametrize("case", LATE)
def test_what_does_not_fit_changes_nothing(case):
    # Known elsewhere: vLLM #43226, #37837, #46240, #55286, #50565, #25067, #18631, llm-d #187.
    state = begun()
    state.start_parts("e1", 0)
    state.end_part("e1", 0)
    assert not LATE[case](state)
    assert state.phase is Phase.MOVING
    assert state.commit("e1", 1)


@pytest.mark.parametrize("end", ["commit", "fail"])
def test_the_end_is_final_and_the_first_cause_is_kept(end):
    state = begun()
    if end == "commit":
        state.commit("e1", 0)
    else:
        state.fail("first")
        state.sender_drained("e1")
    before = (state.phase, state.cause)
    state.fail("second")
    state.give_up()
    assert not state.begin("e1", one_sided=False)
    assert not state.start_parts("e1", 0)
    assert not state.commit("e1", 0)
    assert (state.phase, state.cause) == before


def test_a_failed_transfer_is_drained_when_its_last_part_has_ended_and_its_sender_sends_no_more():
    state = begun()
    state.start_parts("e1", 0)
    state.fail("cancelled")
    assert state.start_parts("e1", 1), "what the sender had begun to send is still taken"
    state.end_part("e1", 1)
    state.sender_drained("e1")
    assert state.phase is Phase.DRAINING
    assert not state.start_parts("e1", 2)
    state.end_part("e1", 0, "aborted")
    assert (state.outcome, state.cause) == (Outcome.FAILED_DRAINED, "cancelled")


def test_a_transfer_that_is_not_drained_in_time_is_unknown_and_may_still_be_drained():
    state = begun(one_sided=True)
    state.fail("cancelled")
    assert state.phase is Phase.DRAINING
    state.give_up()
    assert state.outcome is Outcome.UNKNOWN
    assert state.sender_drained("e1")
    assert state.outcome is Outcome.FAILED_DRAINED


def test_several_senders_complete_a_transfer_together_each_with_its_own_heads():
    state = IncomingState(frozenset(range(4)))
    assert state.begin("e1", [0, 1], one_sided=True)
    assert not state.begin("e2", [1, 2], one_sided=True), "a head comes from one sender"
    assert not state.begin("e2", [3, 4], one_sided=True), "a head that is not wanted"
    assert state.begin("e2", [2, 3], one_sided=True)
    assert state.commit("e1", 0)
    assert not state.commit("e1", 0)
    assert state.phase is Phase.MOVING
    assert state.commit("e2", 0)
    assert state.outcome is Outcome.COMPLETED


def test_several_senders_must_all_be_drained():
    state = IncomingState(frozenset(range(3)))
    for head in range(3):
        state.begin(f"e{head}", [head], one_sided=True)
    state.commit("e0", 0)
    state.fail("e1 was lost")
    state.sender_drained("e1")
    assert state.undrained == ["e2"]
    state.sender_drained("e2")
    assert state.outcome is Outcome.FAILED_DRAINED


def test_a_transfer_that_never_began_is_drained_at_once():
    state = IncomingState()
    state.fail("cancelled")
    assert state.outcome is Outcome.FAILED_DRAINED


def test_a_joint_result_is_as_bad_as_the_worst_of_its_parts():
    good = TransferResult(Outcome.COMPLETED, b"first", 8, 2, 0.5)
    bad = TransferResult(Outcome.COMPLETED, b"second", 16, 3, 0.25, is_partial=True, is_trusted=False)
    assert joint_result([good, good]) == TransferResult(Outcome.COMPLETED, b"first", 16, 4, 0.5)
    for both, payload in (([good, bad], b"first"), ([bad, good], b"second")):
        assert joint_result(both) == TransferResult(
            Outcome.COMPLETED, payload, 24, 5, 0.5, is_partial=True, is_trusted=False
        )


def test_a_block_is_covered_once_it_is_in_each_layer():
    covered = Coverage(3)
    covered.add(range(2, 4))
    assert covered.has_any(range(4))
    assert covered.has_any(range(3, 4), range(1))
    assert not covered.has_any(range(2), range(2))
    covered.add(range(2), range(2))
    assert covered.has_any(range(1, 2), range(1, 3))
    assert covered.has_any(range(1))
    assert len(covered) == 2, "two layers of three are no block"
    assert not covered.has_any(range(2), range(2, 3))
    covered.add(range(2), range(2, 3))
    assert len(covered) == 4

"""Blocks are given out once, shared by prefix, evicted in order of use, and all come back."""

import pytest

from hbserve_core import BlockManager

BLOCK = 4


def digests(blocks: BlockManager, token_ids: list[int]) -> list[bytes]:
    found: list[bytes] = []
    blocks.extend_digests(found, token_ids, len(token_ids))
    return found


def cached(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    """Fill blocks with these tokens as a sequence would, then give them back."""
    names = digests(blocks, token_ids)
    block_ids = blocks.allocate(len(names))
    blocks.cache(block_ids, names)
    blocks.release(block_ids)
    return block_ids


def test_a_prefix_is_found_as_long_as_every_block_before_is_equal():
    blocks = BlockManager(8, BLOCK)
    first = cached(blocks, [*range(8)])
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == first
    assert blocks.find_prefix(digests(blocks, [*range(4), 9, 9, 9, 9])) == first[:1]
    assert blocks.find_prefix(digests(blocks, [9, 1, 2, 3, 4, 5, 6, 7])) == [], "an equal block after another prefix"
    assert blocks.find_prefix(digests(blocks, [0, 1, 2])) == [], "blocks that are not full have no name"
    blocks.check_integrity({})


def test_tokens_that_run_together_when_written_one_after_the_other_are_told_apart():
    blocks = BlockManager(8, BLOCK)
    assert digests(blocks, [1, 23, 4, 5]) != digests(blocks, [12, 3, 4, 5])


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head():
    blocks = BlockManager(5, BLOCK)
    old, new = cached(blocks, [*range(8)]), cached(blocks, [*range(10, 18)])
    taken = blocks.allocate(2)
    assert not set(taken) & {*new, old[0]}, "the one block that holds nothing, then the old tail"
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == old[:1]
    taken += blocks.allocate(1)
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == []
    assert blocks.find_prefix(digests(blocks, [*range(10, 18)])) == new
    blocks.release(taken)
    blocks.check_integrity({})


def test_what_is_cached_is_reported_once_for_each_state_first_what_is_held_and_last_used(monkeypatch):
    def reported(blocks: BlockManager) -> list[bytes]:
        _, found = blocks.cached_digests()
        assert found is not None
        return [found[place : place + 8] for place in range(0, len(found), 8)]

    blocks = BlockManager(12, BLOCK)
    old, new, held = ([*range(start, start + 8)] for start in (0, 10, 20))
    for tokens in (old, held, new):
        ids = cached(blocks, tokens)
        if tokens is held:
            blocks.share(ids)
    names = {tuple(tokens): [each[:8] for each in digests(blocks, tokens)] for tokens in (old, new, held)}
    assert reported(blocks) == [*names[*held], *names[*new], *names[*old]], "and a head before its tail"
    monkeypatch.setattr("hbserve_core.engine.block_manager.MOST_REPORTED", 5)
    assert reported(blocks) == [*names[*held], *names[*new], names[*old][0]]
    version, _ = blocks.cached_digests()
    assert blocks.cached_digests(version) == (version, None)
    blocks.release(blocks.allocate(8))  # evicts some
    assert blocks.cached_digests(version)[0] != version


def test_blocks_that_hold_nothing_are_used_before_cached_ones():
    blocks = BlockManager(4, BLOCK)
    kept = cached(blocks, [*range(8)])
    for _ in range(5):
        scratch = blocks.allocate(2)
        assert not set(scratch) & set(kept)
        blocks.release(scratch)
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == kept


def test_a_shared_block_is_free_when_the_last_holder_releases_it():
    blocks = BlockManager(2, BLOCK)
    found = cached(blocks, [*range(4)])
    assert blocks.num_free_besides(found) == 1
    blocks.share(found)
    blocks.share(found)
    assert blocks.num_free == blocks.num_free_besides(found) == 1
    blocks.release(found)
    assert blocks.num_free == 1
    blocks.release(found)
    blocks.check_integrity({})
    assert blocks.num_free == 2


def test_a_quarantined_block_is_out_of_use_until_the_quarantine_ends():
    blocks = BlockManager(3, BLOCK)
    taken = blocks.allocate(2)
    blocks.quarantine(taken)
    assert (blocks.num_free, blocks.num_quarantined) == (1, 2)
    blocks.check_integrity({})
    blocks.end_quarantine(taken)
    assert (blocks.num_free, blocks.num_quarantined) == (3, 0)


def test_a_block_that_is_only_read_by_a_failed_transfer_stays_good_for_those_who_share_it():
    blocks = BlockManager(3, BLOCK)
    found = cached(blocks, [*range(4)])
    blocks.share(found)
    blocks.share(found)
    blocks.quarantine(found)
    blocks.check_integrity({found[0]: 1})
    blocks.release(found)
    assert blocks.num_free == 2, "the quarantine still holds it"
    assert blocks.find_prefix(digests(blocks, [*range(4)])) == found
    blocks.end_quarantine(found)
    assert blocks.num_free == 3


def step(blocks: BlockManager) -> None:
    """Launch one, after the one before has ended."""
    blocks.last_ended = blocks.last_launched
    blocks.last_launched += 1


def test_others_than_steps_get_the_blocks_that_have_been_free_for_longest_and_no_step_touches():
    blocks = BlockManager(8, BLOCK)
    first, second, third = (blocks.allocate(2) for _ in range(3))
    for used in (first, second, third):
        step(blocks)
        blocks.release(used)
    blocks.check_integrity({})
    never_used = blocks.allocate_idle(2)
    assert not {*never_used} & {*first, *second, *third}
    assert blocks.last_step(never_used) == 0
    taken = blocks.allocate_idle(3)
    assert {*first} < {*taken}
    assert blocks.last_step(taken) == 2
    assert {*blocks.allocate(1)} <= {*third}, "a step may use what a step in flight uses"


def test_others_than_steps_get_cached_blocks_before_those_that_a_step_in_flight_touches():
    blocks = BlockManager(6, BLOCK)
    old, new = cached(blocks, [*range(8)]), cached(blocks, [*range(10, 18)])
    scratch = blocks.allocate(2)
    step(blocks)
    blocks.release(scratch)
    taken = blocks.allocate_idle(3)
    assert {*taken} == {*old, new[1]}, "the least recently used, the tail before the head"
    assert blocks.last_step(taken) <= blocks.last_ended
    rest = blocks.allocate_idle(3)
    assert {*rest} == {new[0], *scratch}
    assert blocks.last_step(rest) == 1, "and nothing else is left"
    blocks.release([*taken, *rest])
    blocks.check_integrity({})
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == []


def test_blocks_that_are_given_out_together_are_neighbours_in_order_where_there_are_some():
    blocks = BlockManager(8, BLOCK)
    assert blocks.allocate(3) == [0, 1, 2]
    assert blocks.allocate_idle(4) == [4, 5, 6, 7]
    blocks.release([0, 1, 2])
    blocks.release([4, 5, 6, 7])
    assert blocks.allocate_idle(4) == [0, 1, 2, 3]


def test_a_cached_block_that_a_step_in_flight_reads_is_not_idle():
    blocks = BlockManager(2, BLOCK)
    found = cached(blocks, [*range(8)])
    step(blocks)
    blocks.share(found[:1])
    blocks.release(found[:1])
    assert blocks.allocate_idle(1) == found[1:]
    assert blocks.last_step(blocks.allocate_idle(1)) == 1


def test_prefix_caching_can_be_switched_off():
    blocks = BlockManager(3, BLOCK, prefix_caching=False)
    cached(blocks, [*range(4)])
    assert blocks.find_prefix(digests(blocks, [*range(4)])) == []


def test_double_release_and_lost_blocks_are_caught():
    blocks = BlockManager(3, BLOCK)
    taken = blocks.allocate(1)
    with pytest.raises(AssertionError, match="0 holders"):
        blocks.check_integrity({})
    blocks.release(taken)
    with pytest.raises(AssertionError, match="released twice"):
        blocks.release(taken)


def test_digests_are_made_as_a_sequence_grows_and_are_those_of_the_whole():
    blocks = BlockManager(8, BLOCK)
    token_ids = [*range(4 * BLOCK + 3)]
    growing: list[bytes] = []
    for count in range(len(token_ids) + 1):
        blocks.extend_digests(growing, token_ids, count)
        assert len(growing) == count // BLOCK
    assert growing == digests(blocks, token_ids)
    assert digests(BlockManager(2, BLOCK), token_ids) == growing, "and the same in every instance"
    assert len(set(digests(blocks, [7] * 4 * BLOCK))) == 4, "equal blocks at different places have different names"


def test_a_prefix_that_was_used_again_outlives_one_that_was_not():
    blocks = BlockManager(4, BLOCK)
    first, second = cached(blocks, [*range(8)]), cached(blocks, [*range(10, 18)])
    blocks.share(first)
    blocks.release(first)
    taken = blocks.allocate(2)
    assert sorted(taken) == sorted(second)
    assert blocks.find_prefix(digests(blocks, [*range(8)])) == first


def test_two_sequences_that_filled_blocks_with_the_same_tokens_share_only_from_then_on():
    blocks = BlockManager(4, BLOCK)
    (name,) = digests(blocks, [*range(BLOCK)])
    one, other = blocks.allocate(1), blocks.allocate(1)
    blocks.cache(one[:1], [name])
    blocks.cache(other[:1], [name])
    assert blocks.find_prefix([name]) == one
    blocks.release(other)
    blocks.check_integrity({one[0]: 1})
    blocks.release(one)
    assert blocks.allocate(1) == other, "the second was never cached, so it goes first"


def test_a_block_that_is_evicted_and_filled_anew_is_found_by_its_new_name_only():
    blocks = BlockManager(1, BLOCK)
    old = digests(blocks, [*range(BLOCK)])
    assert cached(blocks, [*range(BLOCK)]) == cached(blocks, [9] * BLOCK) == [0]
    assert blocks.find_prefix(old) == []
    assert blocks.find_prefix(digests(blocks, [9] * BLOCK)) == [0]


def test_more_blocks_than_there_are_are_an_error_and_nothing_is_taken():
    blocks = BlockManager(3, BLOCK)
    with pytest.raises(AssertionError, match="4 blocks wanted, 3 free"):
        blocks.allocate(4)
    with pytest.raises(AssertionError, match="a quarantined block is free"):
        blocks.quarantine([0])
    assert (blocks.num_free, blocks.num_quarantined) == (3, 0)
    blocks.check_integrity({})


FAULTS = {
    "held and free": lambda blocks: blocks._empty.update({0: None}),
    "neither held nor free": lambda blocks: blocks._empty.pop(2),
    "free twice": lambda blocks: blocks._cached.update({2: None}),
    "free as if it cached something": lambda blocks: blocks._cached.update([blocks._empty.popitem()]),
    "free before others that were free earlier": lambda blocks: blocks._last_steps.__setitem__(3, 1),
    "touched by a step that was not launched": lambda blocks: blocks._last_steps.__setitem__(2, 1),
    "freed under its holder": lambda blocks: blocks._references.__setitem__(0, 0),
    "one reference too many": lambda blocks: blocks._references.__setitem__(0, 2),
    "quarantined and free": lambda blocks: blocks._quarantined.update([2]),
    "found by a name that it has not": lambda blocks: blocks._block_of.update({b"other": 1}),
    "not found by its name": lambda blocks: blocks._block_of.clear(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_integrity_sees(fault):
    blocks = BlockManager(4, BLOCK)
    held = blocks.allocate(1)
    assert held == [0]
    cached(blocks, [*range(BLOCK)])
    blocks.check_integrity({0: 1})
    FAULTS[fault](blocks)
    with pytest.raises(AssertionError):
        blocks.check_integrity({0: 1})


@pytest.mark.parametrize("holders", [{}, {0: 2}, {1: 1}, {0: 1, 1: 1}])
def test_check_integrity_sees_holders_that_do_not_fit(holders):
    blocks = BlockManager(4, BLOCK)
    blocks.allocate(1)
    with pytest.raises(AssertionError, match=r"block \d: \d references, \d holders"):
        blocks.check_integrity(holders)


@pytest.mark.parametrize("take", ["allocate", "allocate_idle"])
def test_blocks_that_are_given_out_together_are_in_the_order_in_which_they_lie(take):
    blocks = BlockManager(8, BLOCK)
    blocks.release([*reversed(blocks.allocate(8))])
    assert getattr(blocks, take)(8) == [*range(8)]

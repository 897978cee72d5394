"""What the next step computes, and who gives way when blocks run out. No model: steps are played by hand."""

from typing import Any

import pytest

from hbserve_core import BlockManager, InstanceConfig, InvalidInstanceConfig
from hbserve_core.engine.batch_scheduler import BatchScheduler
from hbserve_core.engine.sequence import NEXT_PHASES, Phase, Sequence
from hbserve_core.engine.step_times import ChunkSizes, StepTimes
from hbserve_rpc import SamplingParams

BLOCK = 4


class Steps:
    """A scheduler whose steps compute nothing and sample token 7."""

    def __init__(self, num_blocks: int, **settings: Any) -> None:
        given: dict[str, Any] = {"model_path": "", "block_size": BLOCK, "chunk_size": 8}
        config = InstanceConfig(**(given | settings))
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.step_times = StepTimes()
        self.scheduler = BatchScheduler(config, self.blocks, ChunkSizes(config, config.role, self.step_times.predict_s))

    def add(self, name: str, prompt: list[int], *, prefill_only: bool = False, priority: int = 0) -> Sequence:
        params = SamplingParams(0, 1000, priority=priority)
        sequence = Sequence(name, list(prompt), len(prompt), params, prefill_only=prefill_only)
        self.scheduler.move(sequence, Phase.WAITING)
        return sequence

    def reserved(self, name: str, prompt: list[int]) -> Sequence:
        sequence = Sequence(name, list(prompt), len(prompt), SamplingParams(0, 1000))
        self.scheduler.move(sequence, Phase.RESERVING)
        assert self.scheduler.grant() is sequence
        return sequence

    def step(self) -> dict[str, int]:
        """New tokens by name."""
        batch = self.scheduler.schedule()
        for chunk in batch:
            samples = chunk.samples
            end = chunk.first + chunk.num_new_tokens
            if samples:
                self.scheduler.cache(chunk.sequence, end)
            chunk.sequence.num_computed_tokens = end
            if samples:
                chunk.sequence.token_ids.append(7)
                if chunk.sequence.prefill_only:
                    self.scheduler.move(chunk.sequence, Phase.ENDING)
        return {chunk.sequence.request_id: chunk.num_new_tokens for chunk in batch}


def test_decodes_come_first_then_begun_chunks_then_new_prompts_within_one_budget():
    steps = Steps(100, max_num_batched_tokens=12)
    steps.add("a", [1] * 3)
    steps.add("b", [2] * 20)
    assert steps.step() == {"a": 3, "b": 8}
    steps.add("c", [3] * 20)
    assert steps.step() == {"a": 1, "b": 8, "c": 3}
    assert steps.step() == {"a": 1, "b": 4, "c": 7}
    assert steps.step() == {"a": 1, "b": 1, "c": 8}


def test_prompt_tokens_of_one_step_are_limited_apart_from_decodes():
    steps = Steps(100, max_num_batched_tokens=100, max_chunk_prefill_tokens=10)
    steps.add("a", [1] * 9)
    steps.add("b", [2] * 9)
    assert steps.step() == {"a": 8, "b": 2}
    assert steps.step() == {"a": 1, "b": 7}


def test_max_num_seqs_counts_running_and_reserved_sequences():
    steps = Steps(100, max_num_seqs=2)
    steps.reserved("parked", [1] * 5)
    steps.add("a", [2] * 3)
    steps.add("b", [3] * 3)
    assert steps.step() == {"a": 3}
    assert steps.step() == {"a": 1}


def test_of_those_that_wait_the_lowest_priority_comes_first_and_the_oldest_of_these():
    steps = Steps(100, max_num_seqs=1)
    for name, priority in (("a", 3), ("b", 0), ("c", -2), ("d", 0), ("e", -2)):
        steps.add(name, [1] * 3, priority=priority)
    order: list[str] = []
    while steps.scheduler.waiting:
        order += steps.step()
        steps.scheduler.move(steps.scheduler.running[0], Phase.ENDED)
    assert order == ["c", "e", "b", "d", "a"]


def test_short_prompts_of_a_worse_priority_do_not_overtake_long_ones():
    steps = Steps(100, chunk_size="auto")
    steps.add("short", [1] * 3, priority=1)
    steps.add("long", [2] * 200)
    assert next(iter(steps.step())) == "long"


def test_who_was_preempted_has_room_before_others_of_its_priority_and_after_those_of_a_better_one():
    steps = Steps(5, max_num_seqs=2)
    steps.add("a", [1] * 7, priority=1)
    steps.add("b", [2] * 7, priority=1)
    steps.step()
    for name, priority in (("c", 1), ("d", 2), ("e", 0)):
        steps.add(name, [3] * 7, priority=priority)
    while not steps.scheduler.num_preemptions:
        steps.step()
    assert [each.request_id for each in steps.scheduler.waiting] == ["e", "b", "c", "d"]


def test_blocks_are_reserved_for_the_lowest_priority_first():
    steps = Steps(100)
    for name, priority in (("a", 1), ("b", 0), ("c", 1)):
        sequence = Sequence(name, [1] * 3, 3, SamplingParams(0, 1000, priority=priority))
        steps.scheduler.move(sequence, Phase.RESERVING)
    granted = [steps.scheduler.grant() for _ in range(3)]
    assert [each and each.request_id for each in granted] == ["b", "a", "c"]


def test_without_chunking_a_prompt_is_computed_whole_or_waits():
    steps = Steps(100, chunked_prefill_enabled=False, max_num_batched_tokens=20, max_chunk_prefill_tokens=1)
    steps.add("a", [1] * 15)
    steps.add("b", [2] * 15)
    assert steps.step() == {"a": 15}
    assert steps.step() == {"a": 1, "b": 15}


def test_short_prompts_overtake_on_prefill_instances_where_nobody_has_chosen_otherwise():
    for settings, first in (
        ({"role": "prefill"}, "short"),
        ({"role": "prefill", "chunk_size": 8}, "long"),
        ({"role": "prefill", "chunked_prefill_enabled": False, "max_num_batched_tokens": 4000}, "long"),
        ({"role": "hybrid"}, "long"),
        ({"role": "decode"}, "long"),
    ):
        steps = Steps(2000, **({"chunk_size": None} | settings))
        steps.add("long", [2] * 3000)
        steps.add("short", [1] * 3)
        assert next(iter(steps.step())) == first, settings


def test_without_chunking_a_preempted_sequence_longer_than_a_step_is_computed_in_parts():
    steps = Steps(12, chunked_prefill_enabled=False, max_num_batched_tokens=16)
    old, new = steps.add("old", [1] * 12), steps.add("new", [2] * 12)
    while not steps.scheduler.num_preemptions:
        steps.step()
    assert new.num_tokens > 16
    steps.scheduler.release(old)
    steps.scheduler.move(old, Phase.ENDED)
    computed = []
    while new.num_uncomputed_tokens > 1:
        computed.append(steps.step()["new"])
    assert sum(computed) >= 17 - new.num_cached_tokens
    assert max(computed) <= 16


def test_the_newest_sequence_is_preempted_and_comes_back_first():
    steps = Steps(6)
    steps.add("old", [1] * 8)
    steps.add("new", [2] * 8)
    while not steps.scheduler.num_preemptions:
        steps.step()
    steps.add("later", [3])
    assert [each.request_id for each in steps.scheduler.running] == ["old"]
    assert [each.request_id for each in steps.scheduler.waiting] == ["new", "later"]


def test_a_step_that_preempts_admits_nobody():
    """Who came would take what was just made room for."""
    steps = Steps(6, max_num_seqs=2)
    steps.add("old", [1] * 8)
    steps.add("new", [2] * 8)
    steps.step()
    steps.add("urgent", [3], priority=-1)
    computed: dict[str, int] = {}
    while not steps.scheduler.num_preemptions:
        computed = steps.step()
    assert computed == {"old": 1}
    assert steps.step() == {"old": 1, "urgent": 1}


def test_a_preempted_sequence_comes_before_those_that_wait_and_before_reservations():
    steps = Steps(6, max_num_seqs=2)
    steps.add("old", [1] * 8)
    steps.add("new", [2] * 8)
    steps.add("waits", [3])
    reserving = Sequence("reserving", [4], 1, SamplingParams())
    steps.scheduler.move(reserving, Phase.RESERVING)
    while not steps.scheduler.num_preemptions:
        steps.step()
    assert [each.request_id for each in steps.scheduler.waiting] == ["new", "waits"]
    assert steps.blocks.num_free > 1
    assert steps.scheduler.grant() is None


def test_choices_that_find_no_room_come_in_their_order_and_before_those_that_wait():
    steps = Steps(100, max_num_seqs=2)
    parent = Sequence("r", [1] * 5, 5, SamplingParams(0, 1000, n=4))
    steps.scheduler.move(parent, Phase.WAITING)
    assert steps.step() == {"r": 5}
    steps.scheduler.move(parent, Phase.ENDING)
    steps.add("waits", [2] * 3)
    for choice in parent.choices:
        choice.token_ids = [*parent.token_ids]
    steps.scheduler.fork(parent, parent.choices)
    assert [each.choice for each in steps.scheduler.running] == [0, 1]
    assert [(each.request_id, each.choice) for each in steps.scheduler.waiting] == [("r", 2), ("r", 3), ("waits", 0)]


def test_a_reservation_waits_for_a_place_among_max_num_seqs():
    steps = Steps(100, max_num_seqs=1)
    running = steps.add("running", [1])
    steps.step()
    reserving = Sequence("reserving", [2], 1, SamplingParams())
    steps.scheduler.move(reserving, Phase.RESERVING)
    assert steps.scheduler.grant() is None
    steps.scheduler.release(running)
    steps.scheduler.move(running, Phase.ENDED)
    assert steps.scheduler.grant() is reserving


def test_admission_leaves_a_block_for_those_who_grow():
    # Known elsewhere: SGLang #6860, #9266.
    steps = Steps(4)
    steps.add("a", [1] * 8)
    steps.add("b", [2] * 8)
    assert steps.step() == {"a": 8}, "two blocks are free, which b would take both"


def test_admission_leaves_a_block_for_those_whose_kv_is_still_to_come():
    steps = Steps(4)
    steps.reserved("parked", [1] * 5)
    steps.add("a", [2] * 7)
    assert steps.step() == {}


def test_blocks_that_are_being_sent_are_not_taken_by_a_preemption():
    # Known elsewhere: vLLM #52234.
    steps = Steps(5)
    steps.add("a", [1] * 7)
    steps.step()
    sent = steps.add("sent", [2] * 12, prefill_only=True)
    steps.scheduler._watermark = 0
    steps.step()
    assert (sent.num_computed_tokens, steps.blocks.num_free) == (8, 0)
    assert steps.step() == {"sent": 4}, "there is no block for a, which gave its own up instead"
    assert (sent.num_computed_tokens, sent.num_tokens) == (12, 13)


def test_a_sequence_that_holds_the_whole_pool_ends_although_others_share_its_blocks():
    """It could not come back: it has more tokens than the pool has room for."""
    steps = Steps(3)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    full = steps.add("full", prompt)
    steps.step()
    steps.scheduler._watermark = 0
    steps.reserved("shares", prompt)
    while not steps.scheduler.out_of_blocks:
        steps.step()
    assert list(steps.scheduler.out_of_blocks) == [full]
    assert full.num_tokens == 3 * BLOCK + 1


def test_a_lone_sequence_waits_for_blocks_that_transfers_hold():
    # Known elsewhere: vLLM #49675.
    steps = Steps(5)
    steps.reserved("parked", [1] * 7)
    steps.add("a", [2] * 7)
    while not steps.scheduler.num_preemptions:
        steps.step()
    assert steps.step() == {}
    assert not steps.scheduler.out_of_blocks


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("after", Phase)
def test_a_change_of_phase_that_is_not_drawn_is_an_error_that_names_both_and_changes_nothing(before, after):
    steps = Steps(10)
    sequence = Sequence("r", [1], 1, SamplingParams(), phase=before)
    if (queue := steps.scheduler._queues.get(before)) is not None:
        queue.append(sequence)
    if after in NEXT_PHASES[before]:
        steps.scheduler.move(sequence, after)
        assert sequence.phase is after
        return
    with pytest.raises(AssertionError, match=f"r: {before.name} cannot become {after.name}"):
        steps.scheduler.move(sequence, after)
    assert sequence.phase is before
    assert queue is None or list(queue) == [sequence]


BAD_LIMITS = ["max_num_seqs", "max_num_batched_tokens", "chunk_size", "max_chunk_prefill_tokens"]


@pytest.mark.parametrize("name", BAD_LIMITS)
def test_a_limit_under_which_nothing_could_run_is_refused(name):
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(InvalidInstanceConfig, match=f"{name}=0: expected at least 1"):
        InstanceConfig(model_path="", **wrong)

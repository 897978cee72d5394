"""Random requests, transfers, failures and steps: nobody ever reads a token that is not its own, and all blocks return.

The pool holds, instead of keys and values, checksums of all tokens up to each, and every step looks through the block
table whether they are there. A block that was given to two, evicted while in use, hashed too early or found behind
another prefix shows at once.
"""

import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hbserve_core import Engine, InstanceConfig
from hbserve_core.bench.simulated_device import SimulatedDevice
from hbserve_core.engine.sequence import NEXT_PHASES, NOT_FINITE, UNREAD, Phase, Sequence
from hbserve_core.engine.step import StepResult
from hbserve_rpc import InvalidRequest, SamplingParams

BLOCK = 4
VOCABULARY = 50
NUM_STEPS = 10_000
STEPS_PER_EXAMPLE = 100


def keys(token_ids: list[int]) -> list[int]:
    """What the pool must hold: for each token a number that depends on it and on all before it."""
    found, last = [], 0
    for token in token_ids:
        last = zlib.crc32(bytes([token & 255]), last)
        found.append(last)
    return found


def next_token(token_ids: list[int]) -> int:
    """Of some sequences there is none, nor of any that goes on after that."""
    if NOT_FINITE in token_ids:
        return NOT_FINITE
    found = zlib.crc32(bytes(token_ids))
    return found % VOCABULARY if found % 37 else NOT_FINITE


def first_tokens(token_ids: list[int], num_choices: int) -> list[int]:
    """Of each choice another one; of some there is none."""
    return [next_token([*token_ids, choice]) for choice in range(num_choices)]


class TokenRunner(SimulatedDevice):
    """A ModelRunner whose keys and values are `keys` of the tokens."""

    def __init__(self, num_blocks: int, overlaps: bool, window: int) -> None:
        """window: the last tokens that one sees, itself included; 0: all."""
        model: Any = SimpleNamespace(vocab_size=VOCABULARY, max_model_len=60, reach=window, eos_token_ids=(0,))
        super().__init__(model, num_blocks, lambda work: 0.0)
        self.window = window
        self.pool = torch.full((num_blocks, BLOCK), -1)
        self.overlaps = overlaps
        self.last: TokenStep | None = None
        self.num_unread = 0

    def write(self, block_table: list[int], first: int, token_ids: list[int]) -> None:
        """Fill in tokens [first, all); block_table[0] is the block of token 0."""
        for place, key in list(enumerate(keys(token_ids)))[first:]:
            assert block_table[place // BLOCK] >= 0
            self.pool[block_table[place // BLOCK], place % BLOCK] = key

    def check(self, block_table: list[int], first: int, token_ids: list[int], why: str) -> None:
        """All that token `first` and those behind it see of these tokens is there."""
        oldest = max(0, first + 1 - self.window) if self.window else 0
        seen = block_table[oldest // BLOCK : -(-len(token_ids) // BLOCK)]
        assert min(seen, default=0) >= 0, why
        found = self.pool[seen].flatten().tolist()
        begin = oldest // BLOCK * BLOCK
        assert found[oldest - begin : len(token_ids) - begin] == keys(token_ids)[oldest:], why

    def launch(self, batch: Any) -> Callable[[], StepResult]:
        """Like a device that overlaps: steps in order, each as late as may be, with what was said at launch."""
        if self.last is not None:
            self.last.compute()
        self.last = TokenStep(self, batch, self.last)
        if not self.overlaps:
            self.last.compute()
        return self.last.read


class TokenStep:
    def __init__(self, runner: TokenRunner, batch: Any, before: "TokenStep | None") -> None:
        self.runner = runner
        self.sequences = [chunk.sequence for chunk in batch]
        self.work = [
            (list(chunk.sequence.block_table), list(chunk.sequence.token_ids), chunk.first, chunk.num_new_tokens,
             chunk.samples, len(chunk.sequence.choices)) for chunk in batch
        ]  # fmt: skip
        self.before = before
        self.result: list[int | None] | Any = None
        self.choices: dict[int, Any] = {}

    def compute(self) -> None:
        if self.result is not None:
            return
        self.result = []
        for place, (sequence, work) in enumerate(zip(self.sequences, self.work, strict=True)):
            block_table, token_ids, first, count, samples, num_choices = work
            if token_ids[-1] == UNREAD:
                # Only the step before can have sampled what nobody has read.
                assert self.before is not None
                token_ids[-1] = self.before.result[self.before.sequences.index(sequence)]
                self.runner.num_unread += 1
            known = token_ids[: first + count]
            self.runner.write(block_table, first, known)
            self.runner.check(block_table, first, known, "somebody else's tokens")
            self.result.append(next_token(known) if samples else None)
            if samples and num_choices:
                self.choices[place] = [(token, None) for token in first_tokens(known, num_choices)]
        self.before = None

    def read(self) -> StepResult:
        self.compute()
        assert self.result is not None
        return StepResult(self.result, choices=self.choices)


class RandomRequests(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.has_begun = False
        self.prompts: dict[str, list[int]] = {}
        self.generating: dict[str, set[int]] = {}
        """The choices of each that go on."""
        self.num_choices: dict[str, int] = {}
        self.prefilling: set[str] = set()
        self.reported: dict[str, list[int]] = {}
        self.sent: dict[str, tuple[list[int], list[int]]] = {}
        self.reserving: set[str] = set()
        self.parked: dict[str, Any] = {}
        self.quarantined: dict[str, tuple[list[int], torch.Tensor]] = {}
        """Blocks that a failed transfer may still read, and what it must find there."""
        self.count = 0

    @precondition(lambda self: not self.has_begun)
    @rule(
        num_blocks=st.integers(4, 24), chunked=st.booleans(), caching=st.booleans(), num_seqs=st.integers(1, 6),
        overlaps=st.booleans(), chunk_size=st.sampled_from([5, "auto"]), window=st.sampled_from([0, 0, 1, 3, 4, 6, 11]),
    )  # fmt: skip
    def start(
        self, num_blocks: int, chunked: bool, caching: bool, num_seqs: int, overlaps: bool, chunk_size: Any, window: int
    ) -> None:
        config = InstanceConfig(
            model_path="", block_size=BLOCK, chunk_size=chunk_size, max_num_batched_tokens=16,
            max_chunk_prefill_tokens=12,
            chunked_prefill_enabled=chunked, prefix_caching=caching, max_num_seqs=num_seqs,
        )  # fmt: skip
        self.runner = TokenRunner(num_blocks, overlaps, window)
        self.engine = Engine(config, self.runner)
        self.has_begun = True

    @precondition(lambda self: self.has_begun)
    @rule(
        kind=st.sampled_from(["generate", "prefill", "reserve"]),
        # Many prompts begin with the same blocks.
        begin=st.sampled_from([[], [1] * 4, [1] * 9, [1] * 12, [2] * 8]),
        end=st.lists(st.integers(1, 2), min_size=1, max_size=4),
        output=st.lists(st.integers(1, 2), max_size=3),
        more_tokens=st.integers(1, 40),
        n=st.sampled_from([1, 1, 2, 3, 8]),
    )
    def submit(self, kind: str, begin: list[int], end: list[int], output: list[int], more_tokens: int, n: int) -> None:
        self.count += 1
        prompt = begin + end
        request_id = f"{kind}-{self.count}"
        self.prompts[request_id] = prompt + output
        self.num_choices[request_id] = n
        params = SamplingParams(0, len(output) + more_tokens, n=n)
        if self.engine.blocks.num_blocks_for(len(prompt) + len(output)) > self.engine.blocks.num_blocks:
            with pytest.raises(InvalidRequest, match="the pool has"):
                self.engine.add(request_id, prompt, params, output)
        elif kind == "reserve":
            self.engine.reserve(request_id, prompt, params, output)
            self.reserving.add(request_id)
        else:
            self.engine.add(request_id, prompt, params, output, prefill_only=kind == "prefill")
            if kind == "prefill":
                self.prefilling.add(request_id)
            else:
                self.generating[request_id] = set(range(n))

    @precondition(lambda self: self.has_begun)
    @rule(count=st.sampled_from([1, 1, 1, 2, 3, 12]))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def step(self) -> None:
        for reservation in self.engine.poll_reservations():
            self.reserving.remove(reservation.request_id)
            # A remote writer may begin at once, in no order with the steps here.
            self.runner.pool[reservation.block_ids] = -3
            self.parked[reservation.request_id] = reservation
        for output in self.engine.step():
            assert output.token_id is None or (output.token_id != NOT_FINITE and output.error is None)
            if output.choice and output.request_id in self.sent:
                assert output.block_table == self.reported[output.request_id]
            elif output.request_id in self.prefilling:
                # What was reported before may be on its way already.
                known = self.reported.setdefault(output.request_id, list(output.block_table))
                assert output.block_table == known
                if output.token_id is not None or output.is_last:
                    self.prefilling.remove(output.request_id)
                    self.sent[output.request_id] = (output.block_table, self.prompts[output.request_id])
            elif output.token_id is not None or output.is_last:
                left = self.generating[output.request_id]
                assert output.choice in left, "a choice that has ended"
                if output.is_last:
                    self.end_choice(output.request_id, output.choice)

    def end_choice(self, request_id: str, choice: int) -> None:
        self.generating[request_id].remove(choice)
        if not self.generating[request_id]:
            del self.generating[request_id]

    @precondition(lambda self: self.generating)
    @rule(data=st.data())
    def abort_a_choice(self, data: st.DataObject) -> None:
        """Before its first token too. The last one that is left ends the request, when that has been forked."""
        request_id = data.draw(st.sampled_from(sorted(self.generating)))
        choice = data.draw(st.sampled_from(sorted(self.generating[request_id])))
        self.engine.release_choice(request_id, choice)
        if self.num_choices[request_id] > 1:
            self.end_choice(request_id, choice)

    @precondition(lambda self: self.generating)
    @rule(data=st.data(), num_reserved=st.sampled_from([0, 0, 1, 3]))
    def abort(self, data: st.DataObject, num_reserved: int) -> None:
        """Its blocks may be all that is left for those who reserve some, while a step still writes to them."""
        request_id = data.draw(st.sampled_from(sorted(self.generating)))
        del self.generating[request_id]
        self.engine.release(request_id)
        for number in range(num_reserved):
            reserving = f"reserve-{self.count}-{number}"
            self.prompts[reserving] = [1, 2] * 6
            self.num_choices[reserving] = 1
            if self.engine.blocks.num_blocks >= 3:
                self.engine.reserve(reserving, self.prompts[reserving], SamplingParams(0, 5))
                self.reserving.add(reserving)
        self.count += 1

    @precondition(lambda self: self.reserving)
    @rule(data=st.data())
    def abort_a_reservation_that_waits(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.reserving)))
        self.reserving.remove(request_id)
        self.engine.release(request_id)

    @precondition(lambda self: self.prefilling)
    @rule(data=st.data(), begun=st.booleans())
    def hold_a_prefill(self, data: st.DataObject, begun: bool) -> None:
        if begun:
            self.step()  # most of them have computed a chunk then
        if not self.prefilling:
            return
        request_id = data.draw(st.sampled_from(sorted(self.prefilling)))
        self.prefilling.remove(request_id)
        self.engine.hold(request_id)
        self.sent[request_id] = ([], [])

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), unknown=st.booleans(), num_read=st.integers(0, 3))
    def end_a_sending(self, data: st.DataObject, unknown: bool, num_read: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.sent)))
        block_table, prompt = self.sent.pop(request_id)
        if block_table:
            self.runner.check(block_table, len(prompt) // BLOCK * BLOCK, prompt, "sent blocks were overwritten")
        if unknown and block_table:
            # Of these blocks some may be shared with requests that go on.
            read = [block for block in block_table[max(0, len(block_table) - num_read) :] if block >= 0]
            self.engine.quarantine(request_id, len(read))
            self.quarantined[request_id] = (read, self.runner.pool[read].clone())
        else:
            self.engine.release(request_id)

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), outcome=st.sampled_from(["completed", "completed", "failed", "unknown"]))
    def end_a_receive(self, data: st.DataObject, outcome: str) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.parked)))
        reservation, prompt = self.parked.pop(request_id), self.prompts[request_id]
        if outcome == "completed":
            not_sent = -(-len(prompt) // BLOCK) - len(reservation.block_ids)
            self.runner.write([-1] * not_sent + reservation.block_ids, not_sent * BLOCK, prompt)
            n = self.num_choices[request_id]
            first = first_tokens(prompt, n) if n > 1 else [next_token(prompt)]
            if NOT_FINITE in first:
                self.engine.release(request_id)  # as the prefill side had no token, nothing is committed
                return
            ends = [n > 1 and token % 3 == 0 for token in first]
            self.engine.activate(request_id, *(None if end else token for end, token in zip(ends, first, strict=True)))
            if not all(ends):
                self.generating[request_id] = {choice for choice, end in enumerate(ends) if not end}
        elif outcome == "failed":
            self.engine.release(request_id)
        else:
            self.engine.quarantine(request_id, len(reservation.block_ids))
            # It may write to these, so it does, now and until the quarantine ends.
            self.runner.pool[reservation.block_ids] = -2
            self.quarantined[request_id] = (reservation.block_ids, self.runner.pool[reservation.block_ids])

    @precondition(lambda self: self.quarantined)
    @rule(data=st.data())
    def end_a_quarantine(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.quarantined)))
        block_ids, content = self.quarantined.pop(request_id)
        assert torch.equal(self.runner.pool[block_ids], content), "quarantined blocks were used"
        self.engine.release(request_id)

    @invariant()
    def every_block_has_its_holders(self) -> None:
        if self.has_begun:
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not self.has_begun:
            return
        for request_id in [*self.sent, *self.parked, *self.reserving, *self.quarantined]:
            self.engine.release(request_id)
        self.reserving.clear()
        while self.engine.has_work():
            self.step()
            assert not self.engine.stalled, "nobody holds anything, and yet nothing can be computed"
            for request_id in self.sent:
                self.engine.release(request_id)
            self.sent.clear()
        assert not self.generating
        assert not self.prefilling
        self.engine.check_integrity()
        assert self.engine.stats().num_free_blocks == self.engine.stats().num_blocks


RANDOM = settings(
    max_examples=NUM_STEPS // STEPS_PER_EXAMPLE, stateful_step_count=STEPS_PER_EXAMPLE, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def test_random_requests_go_through_every_change_of_phase_and_all_blocks_return(monkeypatch: pytest.MonkeyPatch):
    seen, enter = set(), Sequence.enter

    def record(sequence: Sequence, phase: Phase) -> None:
        seen.add((sequence.phase, phase))
        enter(sequence, phase)

    monkeypatch.setattr(Sequence, "enter", record)
    every = {(before, after) for before, following in NEXT_PHASES.items() for after in following}
    for _ in range(20):  # some arrows are rare: a run may miss one, twenty do not
        run_state_machine_as_test(RandomRequests, settings=RANDOM)
        if seen == every:
            break
    assert seen == every

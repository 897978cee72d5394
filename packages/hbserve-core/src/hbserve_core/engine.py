"""The engine: requests in, tokens out, one step at a time."""

from collections import deque
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Protocol

import torch

from hbserve_core.batch_scheduler import BatchScheduler
from hbserve_core.block_manager import BlockManager
from hbserve_core.config import InstanceConfig
from hbserve_core.model_config import ModelConfig
from hbserve_core.sequence import ScheduledChunk, Sequence
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import FinishReason


class Runner(Protocol):
    """What the engine needs of a ModelRunner."""

    model_config: ModelConfig
    pool: torch.Tensor

    def run(self, batch: Ids[ScheduledChunk]) -> list[int | None]: ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request."""

    request_id: str
    token_id: int | None
    """The new token, or None if the step only computed a part of the prompt."""
    index: int
    """Place of that token among the request's output tokens."""
    finish_reason: FinishReason | None
    num_computed_tokens: int
    block_table: list[int]
    """Of a prefill-only request, whose blocks stay as they are until `release`; else empty."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a request whose KV others will bring."""

    request_id: str
    block_ids: list[int]
    """Blocks of the tokens that are not cached here, in order."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_quarantined_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0


class Engine:
    """One model, one pool. Not thread-safe: everything is called by one thread.

    A request is added by one of
      `add`                    compute and generate all of it here;
      `add(prefill_only=True)` compute the prompt and the first token, then keep the blocks until `release`;
      `reserve`                somebody else computes the prompt; `poll_reservations` says when there is room, then its
                               KV arrives in the blocks, and `activate` lets it generate from the first token on.
    """

    def __init__(self, config: InstanceConfig, runner: Runner) -> None:
        self.config = config
        self._runner = runner
        self._model = runner.model_config
        self.blocks = BlockManager(runner.pool.shape[0], config.block_size, prefix_caching=config.prefix_caching)
        self._scheduler = BatchScheduler(config, self.blocks)
        self._sequences: dict[str, Sequence] = {}
        self._prefill_only: set[str] = set()
        self._held: set[str] = set()
        self._reserving: deque[Sequence] = deque()
        self._quarantined: dict[str, list[int]] = {}
        self._num_generated = self._num_prefilled = 0
        self.stalled = False
        """The last step found nothing that it could compute: everything waits for blocks that transfers hold."""

    # ---- requests ------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Ids[int],
        params: SamplingParams,
        output: Ids[int] = (),
        *,
        prefill_only: bool = False,
    ) -> None:
        """Queue a request. `output` are tokens that it has already from an earlier attempt.

        Raises:
            InvalidRequest: it could never run; says why.
        """
        sequence = self._make_sequence(request_id, prompt, params, output)
        if prefill_only:
            self._prefill_only.add(request_id)
        self._scheduler.waiting.append(sequence)

    def reserve(self, request_id: str, prompt: Ids[int], params: SamplingParams, output: Ids[int] = ()) -> None:
        """Queue a request for room; see `poll_reservations`. Raises what `add` raises."""
        self._reserving.append(self._make_sequence(request_id, prompt, params, output))

    def poll_reservations(self) -> list[Reservation]:
        """Reservations for which there is room now, in the order in which they were asked for."""
        granted = []
        # Preempted sequences come first: they were promised room before.
        while self._reserving and not self._scheduler.waiting:
            sequence = self._reserving[0]
            num_cached = self._scheduler.reserve(sequence)
            if num_cached is None:
                break
            self._reserving.popleft()
            self._held.add(sequence.request_id)
            first = num_cached // self.config.block_size
            granted.append(Reservation(sequence.request_id, sequence.block_table[first:], num_cached))
        return granted

    def activate(self, request_id: str, first_token: int) -> bool:
        """The KV of a reserved request is there: it goes on after `first_token`. False if it was aborted meanwhile."""
        sequence = self._sequences.get(request_id)
        if sequence is None or request_id not in self._held:
            return False
        self._scheduler.computed(sequence, sequence.num_tokens)
        self._held.remove(request_id)
        self._scheduler.num_reserved -= 1
        sequence.token_ids.append(first_token)
        self._scheduler.running.append(sequence)
        return True

    def abort(self, request_id: str) -> None:
        """Forget a request, unless its blocks are held for a transfer: then `release` or `quarantine` ends it."""
        sequence = self._sequences.get(request_id)
        if sequence is None or request_id in self._held:
            return
        if sequence in self._reserving:
            self._reserving.remove(sequence)
        self._scheduler.remove(sequence)
        self._forget(sequence)

    def release(self, request_id: str) -> None:
        """End a request in whatever state it is; no transfer touches its blocks any more."""
        if request_id in self._quarantined:
            self.blocks.end_quarantine(self._quarantined.pop(request_id))
        if request_id in self._held:
            self._held.remove(request_id)
            self._scheduler.num_reserved -= 1
        self.abort(request_id)

    def quarantine(self, request_id: str, num_blocks: int) -> None:
        """End a held request whose last `num_blocks` blocks a failed transfer may still touch, until `release`."""
        sequence = self._sequences[request_id]
        kept = len(sequence.block_table) - num_blocks
        block_ids = sequence.block_table[kept:]
        sequence.block_table = sequence.block_table[:kept]
        self.blocks.quarantine(block_ids)
        self.release(request_id)
        self._quarantined[request_id] = block_ids

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.release(sequence)
        self._prefill_only.discard(sequence.request_id)
        del self._sequences[sequence.request_id]

    def _make_sequence(self, request_id: str, prompt: Ids[int], params: SamplingParams, output: Ids[int]) -> Sequence:
        if request_id in self._sequences or request_id in self._quarantined:
            raise InvalidRequest(f"request_id={request_id!r} is in use")
        params.validate()
        self._check_prompt(prompt, len(output))
        sequence = Sequence(request_id, [*prompt, *output], len(prompt), params)
        self._sequences[request_id] = sequence
        return sequence

    def _check_prompt(self, prompt: Ids[int], num_output: int) -> None:
        if not prompt:
            raise InvalidRequest("prompt: expected at least one token")
        vocab_size = self._model.vocab_size
        if (worst := max(prompt)) >= vocab_size or (worst := min(prompt)) < 0:
            raise InvalidRequest(f"prompt: token {worst} is outside the vocabulary [0, {vocab_size})")
        num_known = len(prompt) + num_output
        if num_known >= self._model.max_model_len:
            raise InvalidRequest(
                f"prompt: {num_known} tokens leave no room for another; max_model_len is {self._model.max_model_len}"
            )
        if (needed := self.blocks.num_blocks_for(num_known)) > self.blocks.num_blocks:
            raise InvalidRequest(
                f"prompt: {num_known} tokens need {needed} blocks, the pool has {self.blocks.num_blocks}"
            )
        budget = self.config.max_num_batched_tokens
        if not self.config.chunked_prefill_enabled and num_known > budget:
            raise InvalidRequest(
                f"prompt: {num_known} tokens do not fit max_num_batched_tokens={budget} while chunked prefill is off"
            )

    @property
    def max_prompt_len(self) -> int:
        """Most tokens that a prompt may have."""
        longest = min(self._model.max_model_len - 1, self.blocks.num_blocks * self.config.block_size)
        return longest if self.config.chunked_prefill_enabled else min(longest, self.config.max_num_batched_tokens)

    # ---- steps ---------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether `step` may do something. Reserved and held requests wait for others, not for steps."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def step(self) -> list[StepOutput]:
        """Compute one batch."""
        preemptions = self._scheduler.num_preemptions
        batch = self._scheduler.schedule()
        self.stalled = not batch and preemptions == self._scheduler.num_preemptions
        tokens = self._runner.run(batch)
        outputs = [self._advance(chunk, token) for chunk, token in zip(batch, tokens, strict=True)]
        return outputs + self._end_exhausted()

    def _advance(self, chunk: ScheduledChunk, token: int | None) -> StepOutput:
        sequence = chunk.sequence
        request_id = sequence.request_id
        self._scheduler.computed(sequence, sequence.num_computed_tokens + chunk.num_new_tokens)
        self._num_prefilled += chunk.num_new_tokens if chunk.num_new_tokens > 1 else 0
        finish_reason = None
        if token is not None:
            sequence.token_ids.append(token)
            self._num_generated += 1
            finish_reason = self._finish_reason(sequence, token)
        output = StepOutput(
            request_id, token, sequence.num_output_tokens - 1, finish_reason, sequence.num_computed_tokens,
            sequence.block_table if request_id in self._prefill_only else [],
        )  # fmt: skip
        if token is not None and request_id in self._prefill_only:
            self._scheduler.remove(sequence)
            self._scheduler.num_reserved += 1
            self._held.add(request_id)
        elif finish_reason:
            self._scheduler.remove(sequence)
            self._forget(sequence)
        return output

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.params
        if token in params.stop_token_ids or (not params.ignore_eos and token in self._model.eos_token_ids):
            return "stop"
        if sequence.num_output_tokens >= params.max_tokens or sequence.num_tokens >= self._model.max_model_len:
            return "length"
        return None

    def _end_exhausted(self) -> list[StepOutput]:
        outputs = []
        for sequence in self._scheduler.exhausted:
            computed = sequence.num_computed_tokens
            outputs.append(StepOutput(sequence.request_id, None, sequence.num_output_tokens, "length", computed, []))
            self._forget(sequence)
        self._scheduler.exhausted.clear()
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self._scheduler.waiting) + len(self._reserving),
            num_running=len(self._scheduler.running),
            num_reserved=self._scheduler.num_reserved,
            num_blocks=self.blocks.num_blocks,
            num_free_blocks=self.blocks.num_free,
            num_quarantined_blocks=self.blocks.num_quarantined,
            num_generated_tokens=self._num_generated,
            num_prefill_tokens=self._num_prefilled,
            num_cached_tokens=self._scheduler.num_cached_tokens,
            num_preemptions=self._scheduler.num_preemptions,
        )

"""Engine: takes requests in and gives tokens out, one step at a time."""

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Ids
from sys import maxsize
from time import perf_counter
from typing import Any

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.batch_scheduler import BatchScheduler
from hbserve_core.engine.block_manager import NO_BLOCK, BlockManager
from hbserve_core.engine.sequence import NOT_FINITE, UNREAD, Phase, RequestLimits, ScheduledChunk, Sequence
from hbserve_core.engine.step import DrawnToken, EngineStats, Reservation, Runner, StepInFlight, StepOutput, error_of
from hbserve_core.engine.step_times import ChunkSizes, LaunchTimes, StepWork
from hbserve_core.grammars.compiler import GrammarCompiler
from hbserve_core.grammars.matcher import Matcher
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import TokenLogprobs
from hbserve_rpc.plain_values import plain_bool

_HAS_NO_OUTPUT = (Phase.HELD, Phase.QUARANTINED, Phase.FORKED, Phase.ENDED)
"""Phases in which a step's result is dropped: the sequence was ended by others since the step was launched, or its
choices already have their tokens."""


class Engine:
    """Engine of one model and one pool. Not thread-safe: one thread makes all calls.

    With a runner that overlaps, a step is scheduled and launched while the previous one is computed; then the tokens of
    the previous one are read. So at most one step, and at most one token of each sequence, is unread. `wait_s` says how
    long a caller may wait for requests that the next step could include.

    A request is added by one of
      `add`                    compute and generate all of it here;
      `add(prefill_only=True)` compute the prompt and the first token, or fail, then keep the blocks until `release`;
      `reserve`                somebody else computes the prompt; `poll_reservations` says when there is room, then its
                               KV arrives in the blocks, and `activate` lets it generate from the first token on.
    With `SamplingParams.n` above 1, the prompt is computed, or arrives, only once; the outputs are then its choices'.
    """

    def __init__(self, config: InstanceConfig, runner: Runner, clock: Callable[[], float] = perf_counter) -> None:
        self.config = config
        self._runner = runner
        self._clock = clock
        self._model = runner.model_config
        num_blocks, caching = runner.pool.shape[0], config.prefix_caching
        self.blocks = BlockManager(num_blocks, config.block_size, prefix_caching=caching, window=self._model.reach)
        self.grammars = GrammarCompiler(config.model_path, self._model.vocab_size, self._model.eos_token_ids)
        """Compiler of grammars, whose results are passed to `add` or `reserve`. Any thread may use it."""
        self.limits = RequestLimits(config, self._model.vocab_size, self._model.max_model_len, self.blocks.num_blocks)
        # A late launch would also have to wait for the other ranks' hosts, and it is not known how long these need.
        self.launch_times = LaunchTimes(clock, runner.is_idle, always_at_once=config.tensor_parallel_size > 1)
        predict_s, has_graphs = self.launch_times.step_times.predict_s, runner.device.type == "cuda"
        chunk_sizes = ChunkSizes(config, config.role, predict_s, has_graphs=has_graphs)
        self._scheduler = BatchScheduler(config, self.blocks, chunk_sizes)
        self._sequences: dict[str, Sequence] = {}
        """All sequences whose id is in use, by request id."""
        self._num_matchers = 0
        """Number of `_sequences` that have a grammar."""
        self._in_flight: StepInFlight | None = None
        self._granted: list[tuple[Reservation, int]] = []
        """Grants that are not reported yet, each with the number of the last step that may touch its blocks."""
        self._num_generated = self._num_prefilled = 0
        self._host_time_s = 0.0
        self.stalled = False
        """Whether the last step did nothing, because everything waits for blocks that transfers hold or for a
        quarantine to end."""
        self.on_early_output: Callable[[StepOutput], None] | None = None
        """Callback that `step` calls for prefill-only requests, whose blocks may be sent early: before the step is
        launched, if a request begins with a cached prefix, and after its launch, if the runner has an event that marks
        its end."""

    # ---- requests ------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt: Ids[int],
        params: SamplingParams,
        output: Ids[int] = (),
        *,
        prefill_only: bool = False,
        matcher: Matcher | None = None,
    ) -> None:
        """Queue a request. output: tokens that it already has from an earlier attempt. matcher: the matcher that
        `self.grammars` makes of params and output, if there are `params.structured_outputs`.

        Raises InvalidRequest, which says why, if the request could never run.
        """
        prefill_only = plain_bool("prefill_only", prefill_only)
        sequence = self._make_sequence(request_id, prompt, params, output, matcher)
        sequence.prefill_only = prefill_only
        self._scheduler.move(sequence, Phase.WAITING)

    def reserve(
        self,
        request_id: str,
        prompt: Ids[int],
        params: SamplingParams,
        output: Ids[int] = (),
        *,
        matcher: Matcher | None = None,
    ) -> None:
        """Queue a request for room; see `poll_reservations`. Arguments and errors are those of `add`."""
        sequence = self._make_sequence(request_id, prompt, params, output, matcher)
        sequence.num_scored_tokens = maxsize  # whoever computes the prompt scores it
        self._scheduler.move(sequence, Phase.RESERVING)

    def poll_reservations(self) -> list[Reservation]:
        """Return the reservations for which there is room now, in the order in which they were made.

        Others will write to these blocks, and their writes are not ordered with the steps here. So a grant waits for
        the last step that may use one of the blocks for its earlier owner. Most are granted at once, because they get
        blocks that no step may use.
        """
        while (sequence := self._scheduler.grant()) is not None:
            first = sequence.num_findable_tokens // self.config.block_size
            block_ids = sequence.block_table[first:].tolist()
            granted = Reservation(sequence.request_id, block_ids, sequence.num_cached_tokens)
            self._granted.append((granted, self.blocks.last_step(block_ids)))
        ended = self.blocks.last_ended
        safe = [granted for granted, step in self._granted if step <= ended]
        self._granted = [each for each in self._granted if each[1] > ended]
        return safe

    def activate(self, request_id: str, *first_tokens: int | None, is_trusted: bool = True) -> None:
        """Continue a reserved request, whose KV has arrived, after its first token. Does nothing if the request has
        ended.

        first_tokens: one for each choice; None for a choice that ended with it. is_trusted: see `Sequence.is_trusted`.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.phase is not Phase.HELD:
            return
        sequence.num_computed_tokens, sequence.is_trusted = sequence.num_tokens, is_trusted
        if not sequence.choices:
            sequence.token_ids += first_tokens  # type: ignore[arg-type]
            if sequence.matcher is not None:
                sequence.matcher.advance(sequence.token_ids[-1])
            self._scheduler.move(sequence, Phase.RUNNING)
            return
        for choice, token in zip(sequence.choices, first_tokens, strict=True):
            if token is not None:
                choice.token_ids = [*sequence.token_ids, token]
            elif choice.phase is Phase.NEW:
                self._scheduler.move(choice, Phase.ENDED)
        self._fork(sequence)

    def hold(self, request_id: str) -> None:
        """Stop computing a request, but keep its blocks until `release` or `quarantine`."""
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.phase not in (Phase.HELD, Phase.QUARANTINED):
            self._scheduler.move(sequence, Phase.HELD)

    def release(self, request_id: str) -> None:
        """End a request in any phase. The caller ensures that no transfer touches its blocks any more."""
        if (sequence := self._sequences.get(request_id)) is not None:
            self._end(sequence)

    def release_choice(self, request_id: str, choice: int) -> None:
        """End one of several choices, which need not have its first token yet. The others continue."""
        parent = self._sequences.get(request_id)
        for each in parent.choices if parent is not None else ():
            if each.choice == choice and each.phase is not Phase.ENDED:
                self._end(each)

    def quarantine(self, request_id: str, num_blocks: int) -> None:
        """End a held request whose last `num_blocks` blocks a failed transfer may still touch, until `release`."""
        sequence = self._sequences[request_id]
        self._scheduler.move(sequence, Phase.QUARANTINED)
        self._withdraw_grant(sequence)
        held = array("i", [each for each in sequence.block_table if each != NO_BLOCK])
        kept = max(0, len(held) - num_blocks)
        self.blocks.release(held[:kept])
        sequence.block_table = held[kept:]
        self.blocks.quarantine(sequence.block_table)

    def _end(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks, and forget it."""
        for choice in sequence.choices:
            if choice.phase is not Phase.ENDED:
                self._scheduler.release(choice)
                self._scheduler.move(choice, Phase.ENDED)
        if sequence.phase is Phase.QUARANTINED:
            self.blocks.end_quarantine(sequence.block_table)
        else:
            self._scheduler.release(sequence)
        self._scheduler.move(sequence, Phase.ENDED)
        if (parent := sequence.parent) is None:
            self._withdraw_grant(sequence)
            del self._sequences[sequence.request_id]
            self._num_matchers -= sequence.matcher is not None
        elif parent.phase is Phase.FORKED and all(each.phase is Phase.ENDED for each in parent.choices):
            self._end(parent)

    def _withdraw_grant(self, sequence: Sequence) -> None:
        self._granted = [granted for granted in self._granted if granted[0].request_id != sequence.request_id]

    def _make_sequence(
        self, request_id: str, prompt: Ids[int], params: SamplingParams, output: Ids[int], matcher: Matcher | None
    ) -> Sequence:
        sequence = self.limits.sequence(request_id, prompt, params, output)
        if sequence.request_id in self._sequences:
            raise InvalidRequest(f"request_id={request_id!r} is in use")
        if (matcher is None) != (sequence.params.structured_outputs is None):
            raise InvalidRequest("structured_outputs: need a matcher, which Engine.grammars makes; nothing else does")
        for each in (sequence, *sequence.choices):  # the first token of all of them has the same mask
            each.matcher = matcher
        self._num_matchers += matcher is not None
        self._sequences[sequence.request_id] = sequence
        return sequence

    # ---- steps ---------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Return whether `step` may do something. Reserved and held requests wait for others, not for steps."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._in_flight or self._granted)

    @property
    def launches_at_once(self) -> bool:
        """Whether `step` would launch something without waiting, because the device has nothing to do."""
        return self._runner.overlaps and self._in_flight is None and self.has_work()

    def wait_s(self) -> float | None:
        """Return how long to wait for more requests before calling `step`, or before asking again: 0 if it is time for
        a step, None if only others can bring work."""
        if self._in_flight is None:
            return 0.0 if self.has_work() and not self.stalled else None
        return self.launch_times.wait_s(can_launch=bool(self._scheduler.running or self._scheduler.waiting))

    def step(self) -> list[StepOutput]:
        """Launch a batch and read the tokens of the previous one, or of the same one if the runner does not overlap."""
        begin, preemptions = self._clock(), self._scheduler.num_preemptions
        batch = self._scheduler.schedule()
        launched = self._launch(batch) if batch else None
        before, host_time_s = self._in_flight, self._clock() - begin
        self._host_time_s += host_time_s
        outputs = self._read(before, host_time_s if launched else None)
        if launched is not None and launched.may_have_grammars:
            launched.wait_for_masks()
            self._runner.draw()
        self._begin(launched)
        if not self._runner.overlaps:
            outputs += self._read(self._in_flight)
        outputs += self._end_out_of_blocks()
        self.stalled = (
            not (outputs or batch or before or self._granted) and preemptions == self._scheduler.num_preemptions
        )
        return outputs

    def _launch(self, batch: list[ScheduledChunk]) -> StepInFlight:
        """Launch a step, and announce blocks that may be sent before it is read: see `on_early_output`."""
        chunks = [(chunk.sequence, chunk.first, chunk.num_new_tokens) for chunk in batch]
        sent = [each for each in chunks if each[0].prefill_only]
        for sequence, first, _ in sent:
            if first == sequence.num_cached_tokens > 0:
                self._tell_early(sequence, first)
        begin = self._clock()
        read = self._runner.launch(batch)
        self.blocks.last_launched += 1
        launched_at = self._clock() if self._runner.overlaps else begin
        if sent and (computed := self._runner.computed) is not None:
            for sequence, first, count in sent:
                self._tell_early(sequence, first + count, computed)
        return StepInFlight(chunks, read, self.blocks.last_launched, launched_at, self._num_matchers > 0, [])

    def _tell_early(self, sequence: Sequence, num_computed_tokens: int, ready: Any = None) -> None:
        if self.on_early_output is not None:
            self.on_early_output(StepOutput.of(sequence, num_computed_tokens, ready=ready))

    def _begin(self, step: StepInFlight | None) -> None:
        """Count a launched step's tokens as computed, so that the next step can be scheduled before they have been."""
        self._in_flight = step
        if step is None:
            return
        self.launch_times.began(StepWork.of(step.chunks), step.launched_at)
        for sequence, first, count in step.chunks:
            if sequence.phase is Phase.ENDED:
                continue  # it ended with its last token, which has just been read
            if first <= sequence.num_prompt_tokens:  # equal: its first own token, if others have computed its prompt
                self._num_prefilled += min(count, sequence.num_prompt_tokens - first)
                self._scheduler.make_digests(sequence, first + count)
            sequence.num_computed_tokens = first + count
            if first + count == len(sequence.token_ids):
                sequence.token_ids.append(UNREAD)
                if sequence.prefill_only or sequence.is_full:
                    self._scheduler.move(sequence, Phase.ENDING)

    def _read(self, step: StepInFlight | None, next_host_time_s: float | None = None) -> list[StepOutput]:
        """Wait for a step and take in its results."""
        self._in_flight = None
        if step is None:
            return []
        waited_from = self._clock() if self._runner.overlaps else step.launched_at
        result = step.read()
        begin, outputs = self._clock(), []
        for place in step.late:
            result.tokens[place] = None
            result.logprobs.pop(place, None)
        self.launch_times.ended(waited_from, begin, next_host_time_s)
        self.blocks.last_ended = step.number
        for place, scored in result.prompt_logprobs.items():
            sequence = step.chunks[place][0]
            sequence.prompt_logprobs += scored
            sequence.num_scored_tokens += len(scored)
        for place, drawn in result.choices.items():
            sequence, first, count = step.chunks[place]
            if sequence.phase not in _HAS_NO_OUTPUT:
                outputs += self._advance_choices(sequence, first + count, drawn)
        for place, ((sequence, first, count), token) in enumerate(zip(step.chunks, result.tokens, strict=True)):
            if sequence.phase not in _HAS_NO_OUTPUT:
                outputs.append(self._advance(sequence, first + count, token, result.logprobs.get(place)))
        self._host_time_s += self._clock() - begin
        return outputs

    def _advance(self, sequence: Sequence, end: int, token: int | None, logprobs: TokenLogprobs | None) -> StepOutput:
        """Take in a step's results for a sequence: tokens up to `end`, and the next one if it was sampled."""
        finish_reason = error = None
        if token is not None:
            sequence.token_ids[end] = token
            error = error_of(sequence, token, end - sequence.num_prompt_tokens)
        if token is not None and error is None:
            # A preempted sequence has given up its blocks.
            if sequence.block_table:
                self._scheduler.cache(sequence, end)
            self._num_generated += 1
            finish_reason = sequence.finish_reason(token, self._model.eos_token_ids)
            if sequence.matcher is not None and finish_reason is None and not sequence.prefill_only:
                sequence.matcher.advance(token)
        output = StepOutput.of(sequence, end, token, finish_reason, logprobs, error)
        if token is not None and sequence.prefill_only:
            self._scheduler.move(sequence, Phase.HELD)
        elif finish_reason is not None or error is not None:
            self._end(sequence)
        return output

    def _advance_choices(self, parent: Sequence, end: int, drawn: Ids[DrawnToken]) -> list[StepOutput]:
        """Take in the first tokens of several choices, which a step drew after it had computed their prompt."""
        del parent.token_ids[end:]
        if all(token != NOT_FINITE for token, _ in drawn):
            self._scheduler.cache(parent, end)
        outputs: list[StepOutput] = []
        for choice, (token, logprobs) in zip(parent.choices, drawn, strict=True):
            if choice.phase is Phase.ENDED:
                continue
            choice.token_ids = [*parent.token_ids, token]
            error = error_of(choice, token, parent.num_output_tokens)
            self._num_generated += error is None
            finish_reason = None if error else choice.finish_reason(token, self._model.eos_token_ids)
            output = StepOutput.of(parent, end, token, finish_reason, logprobs, error)
            output.choice = choice.choice
            if outputs:  # the first output brings the prompt's log-probabilities
                output.prompt_logprobs = []
            outputs.append(output)
            if output.is_last:
                self._scheduler.move(choice, Phase.ENDED)
        if parent.prefill_only:
            self._scheduler.move(parent, Phase.HELD)
        else:
            self._fork(parent)
        return outputs

    def _fork(self, parent: Sequence) -> None:
        """Let the choices that have not ended continue. From its first token on, each has its own grammar state."""
        choices = [choice for choice in parent.choices if choice.phase is Phase.NEW]
        for choice in choices:
            if parent.matcher is not None:
                choice.matcher = parent.matcher.forked(choice.token_ids[-1])
        self._scheduler.fork(parent, choices)
        if not choices:
            self._end(parent)

    def _end_out_of_blocks(self) -> list[StepOutput]:
        outputs = []
        for sequence in list(self._scheduler.out_of_blocks):
            outputs.append(StepOutput.of(sequence, sequence.num_computed_tokens, finish_reason="length"))
            self._end(sequence)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            **self._scheduler.stats(),
            num_generated_tokens=self._num_generated,
            num_prefill_tokens=self._num_prefilled,
            num_steps=self.blocks.last_launched,
            host_time_s=self._host_time_s,
            num_late_steps=self.launch_times.num_late,
            idle_time_s=self.launch_times.idle_time_s,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless each block is held by exactly the requests that have it in their table, and each
        request is in the queue, and has the blocks, that its phase says."""
        self._scheduler.check_integrity(self._sequences.values())

"""One request inside an engine, held as three integers; the part of it that one step computes; and the limits of
requests.

    token_ids   [0 .......... num_prompt_tokens ............ num_tokens)
    KV in pool  [0 ....... num_computed_tokens)
    this step          [num_computed_tokens, num_computed_tokens + num_new_tokens)

Prefill, a chunk of it, and decode are one case: compute some of the tokens that are known and not computed yet.
When a step computes the last known token, it also samples the next one. A step may be scheduled before that token has
been read: its place in token_ids is taken by UNREAD, at most one of a sequence, at the end.

The life of a sequence; `Sequence.enter` allows no other transitions:

    add ─────▶ WAITING ───admitted──▶ RUNNING ──last token launched──▶ ENDING ────────read──▶ ENDED
                  ▲                   │ │ ▲ │
                  └─────preempted─────┘ │ │ └───no block is left────▶ OUT_OF_BLOCKS ────────▶ ENDED
                                   hold ▼ │ activate
    reserve ─▶ RESERVING ──granted──▶  HELD ────────quarantine──────▶ QUARANTINED ──release─▶ ENDED

`hold` also leads to HELD from WAITING and ENDING, and a prefill-only sequence goes there by itself once its token has
been read. `release` leads to ENDED from every phase, as does a token that ends the request.

A request of several choices (`SamplingParams.n`) has a sequence for what they have in common, and one for each of them:

    of the request:    as above, until its last logits, or its keys and values, are there ──▶ FORKED ─▶ ENDED
    of each choice:    with its first token ──▶ RUNNING, or WAITING where there is no room ─▶ as above
"""

from array import array
from collections.abc import Container
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from enum import Enum
from random import SystemRandom
from sys import maxsize

from hbserve_core.config import InstanceConfig
from hbserve_core.grammars.matcher import Matcher
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import FinishReason, TokenLogprobs
from hbserve_rpc.plain_values import plain_id, plain_token_ids, shown

UNREAD = -1
"""Placeholder for a token that the device has, or will have, and that the host has not read yet."""
NOT_FINITE = -2
"""Value that is sampled in place of a token where the logits are not finite. No token has this id on any rank, so a
device may continue with it until the host has read it; then the engine ends the request."""
COLDEST, HOTTEST = 1e-30, 1e29
"""Bounds by which lower and higher temperatures are replaced. They are as good as greedy and as good as uniform. Logits
divided or multiplied by them are still float32 numbers, far from those that a device may flush to 0."""


class Phase(Enum):
    """Phase of a sequence's life, which decides what may happen to its blocks."""

    NEW = "new"
    """New: not in an engine. Sequences on other ranks always stay new, and choices stay new until they are forked."""
    WAITING = "waiting"
    """Waiting for room, without blocks; possibly again, after it had to give up its blocks."""
    RUNNING = "running"
    """Being computed by steps, in its own blocks."""
    ENDING = "ending"
    """No longer computed: its last token comes with the step in flight, which still uses its blocks."""
    OUT_OF_BLOCKS = "out of blocks"
    """Holding the whole pool, or all of it that can become free. The sequence ends with the step that found this."""
    RESERVING = "reserving"
    """Waiting, without blocks, for room to receive its keys and values."""
    HELD = "held"
    """Held: not computed, while a transfer reads its blocks or writes to them."""
    QUARANTINED = "quarantined"
    """Ended, but a failed transfer may still touch its blocks."""
    FORKED = "forked"
    """Forked into its choices, which continue by themselves. It has no blocks, and ends with the last of them."""
    ENDED = "ended"
    """Forgotten. The step in flight may still compute it; the result is dropped."""


NEXT_PHASES = {
    Phase.NEW: {Phase.WAITING, Phase.RESERVING, Phase.RUNNING, Phase.ENDED},
    Phase.WAITING: {Phase.RUNNING, Phase.HELD, Phase.ENDED},
    Phase.RUNNING: {Phase.WAITING, Phase.ENDING, Phase.OUT_OF_BLOCKS, Phase.HELD, Phase.ENDED},
    Phase.ENDING: {Phase.HELD, Phase.FORKED, Phase.ENDED},
    Phase.OUT_OF_BLOCKS: {Phase.ENDED},
    Phase.RESERVING: {Phase.HELD, Phase.ENDED},
    Phase.HELD: {Phase.RUNNING, Phase.FORKED, Phase.QUARANTINED, Phase.ENDED},
    Phase.QUARANTINED: {Phase.ENDED},
    Phase.FORKED: {Phase.ENDED},
    Phase.ENDED: set[Phase](),
}


def _no_blocks() -> "array[int]":
    return array("i")


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens and progress of one request or of one of its choices. Owned by the engine's thread."""

    request_id: str
    token_ids: list[int]
    """Token ids of the prompt, then of the output."""
    num_prompt_tokens: int
    params: SamplingParams
    num_computed_tokens: int = 0
    block_table: "array[int]" = field(default_factory=_no_blocks)
    """Numbers of its blocks. Block i holds tokens [i * block_size, (i + 1) * block_size); NO_BLOCK where no layer sees
    them any more. It is an array because numpy copies that without a loop."""
    block_digests: list[bytes] = field(default_factory=list)
    """Digests of its full blocks, as far as they were needed; see BlockManager."""
    num_cached_tokens: int = 0
    """Number of computed tokens that the prefix cache supplied when the sequence last got its blocks, including earlier
    ones that no layer sees."""
    num_findable_tokens: int = 0
    """Number of computed tokens in blocks that others may find, if these blocks are full."""
    is_trusted: bool = True
    """Whether others may find its blocks. False if it is not known who has sent them; see
    `TransferResult.is_trusted`."""
    prefill_only: bool = False
    """Whether the sequence ends with its next token, and its blocks are sent away while it is computed."""
    max_num_tokens: int = maxsize
    """Largest number of tokens that it may have, including its prompt."""
    num_scored_tokens: int = maxsize
    """Number of prompt tokens that have their log-probabilities or, like the first one, need none. Larger than any
    prompt if none are wanted."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of prompt tokens that have been computed so far."""
    num_preemptions: int = 0
    phase: Phase = Phase.NEW
    matcher: Matcher | None = None
    """Matcher of a request with a grammar, which decides what its next token may be. Only rank 0 has matchers."""
    is_special: bool = field(init=False)
    """Whether its next token needs more than temperature, top-k and top-p: see hbserve_core/logits."""
    choices: "list[Sequence]" = field(init=False, default_factory=list)
    """Choices, if `params.n` is more than one. They share its tokens until each is forked with one more."""
    choice: int = 0
    """Index of this sequence among the choices of `parent`."""
    parent: "Sequence | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.is_special = self.params.needs_logits or self.params.n > 1
        if self.params.n > 1:
            self.choices = [self._choice(number) for number in range(self.params.n)]
            self.max_num_tokens = len(self.token_ids) + 1

    def _choice(self, number: int) -> "Sequence":
        found = Sequence(self.request_id, self.token_ids, self.num_prompt_tokens, self.params.of_choice(number))
        found.max_num_tokens, found.choice, found.parent = self.max_num_tokens, number, self
        return found

    def enter(self, phase: Phase) -> None:
        """Enter the next phase of its life."""
        assert phase in NEXT_PHASES[self.phase], f"{self.request_id}: {self.phase.name} cannot become {phase.name}"
        self.phase = phase

    def finish_reason(self, token: int, eos_token_ids: Container[int]) -> FinishReason | None:
        """Return why an output token is the last one, or None if it is not."""
        # With a grammar, an end-of-sequence token that is ignored cannot be drawn, unless the answer is complete.
        is_end = not self.params.ignore_eos or self.matcher is not None
        if token in self.params.stop_token_ids or (is_end and token in eos_token_ids):
            return "stop"
        return "length" if self.is_full else None

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as it may have."""
        return len(self.token_ids) >= self.max_num_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_scored(self) -> bool:
        """Whether no log-probability of its prompt is wanted any more."""
        return self.num_scored_tokens >= self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens of one sequence that one step computes: [num_computed_tokens, num_computed_tokens + num_new_tokens).

    `sequence.block_table` covers them. The runner reads the sequence without changing it, and reads only those of its
    blocks that the model's windows reach.
    """

    sequence: Sequence
    num_new_tokens: int

    @property
    def first(self) -> int:
        """Position of the first token that is computed. Only meaningful until the sequence's progress is counted, like
        `samples`."""
        return self.sequence.num_computed_tokens

    @property
    def samples(self) -> bool:
        """Whether the chunk ends with the last known token, so that the step yields the next one."""
        return self.sequence.num_computed_tokens + self.num_new_tokens == len(self.sequence.token_ids)

    @property
    def scored_positions(self) -> range:
        """Positions of the tokens whose rows score the prompt token that follows."""
        sequence = self.sequence
        end = min(self.first + self.num_new_tokens, sequence.num_prompt_tokens - 1)
        return range(max(self.first, sequence.num_scored_tokens - 1), end)


class RequestLimits:
    """Limits of what an engine can run, set by its model, its pool and its configuration. Requests beyond them are
    refused at once, rather than when they get stuck."""

    def __init__(self, config: InstanceConfig, vocab_size: int, max_model_len: int, num_blocks: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks

    @property
    def max_prompt_len(self) -> int:
        """Largest number of tokens that a prompt may have."""
        longest = min(self._max_model_len - 1, self._num_blocks * self._config.block_size)
        return longest if self._config.chunked_prefill_enabled else min(longest, self._config.max_num_batched_tokens)

    def sequence(self, request_id: str, prompt: Ids[int], params: SamplingParams, output: Ids[int] = ()) -> Sequence:
        """Make the sequence of a request that can run, normalised and copied. output: tokens that it already has.

        Raises:
            InvalidRequest: names what is wrong, the value and the limit.
        """
        request_id = plain_id("request_id", request_id)
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(f"params={shown(params)}: expected SamplingParams")
        params = params.copied()
        params.require_vocabulary(self._vocab_size)
        prompt_ids = plain_token_ids("prompt", prompt, self._vocab_size)
        output_ids = plain_token_ids("output_token_ids", output, self._vocab_size)
        if not prompt_ids:
            raise InvalidRequest("prompt: expected at least one token")
        num_prompt, num_output = len(prompt_ids), len(output_ids)
        if num_output >= params.max_tokens:
            raise InvalidRequest(f"output_token_ids: {num_output} tokens already reach max_tokens={params.max_tokens}")
        self._check_length(num_prompt, num_prompt + num_output)
        most = min(num_prompt + params.max_tokens, self._max_model_len)
        if params.n > 1 and params.seed is None:
            params.seed = SystemRandom().getrandbits(63)  # choices differ by their seeds
        sequence = Sequence(request_id, prompt_ids + output_ids, num_prompt, params, max_num_tokens=most)
        if params.prompt_logprobs is not None and not output_ids:
            sequence.num_scored_tokens = 1
        return sequence

    def _check_length(self, num_prompt: int, num_known: int) -> None:
        if num_known >= self._max_model_len:
            raise InvalidRequest(
                f"prompt: {num_known} tokens leave no room for another; max_model_len is {self._max_model_len}"
            )
        needed = -(-num_known // self._config.block_size)
        if needed > self._num_blocks:
            raise InvalidRequest(f"prompt: {num_known} tokens need {needed} blocks, the pool has {self._num_blocks}")
        budget = self._config.max_num_batched_tokens
        if not self._config.chunked_prefill_enabled and num_prompt > budget:
            raise InvalidRequest(
                f"prompt: {num_prompt} tokens do not fit max_num_batched_tokens={budget} while chunked prefill is off"
            )

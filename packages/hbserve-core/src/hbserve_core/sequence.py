"""One request inside an engine, as three integers, and what one step computes of it.

    token_ids   [0 .......... num_prompt_tokens ............ num_tokens)
    KV in pool  [0 ....... num_computed_tokens)
    this step          [num_computed_tokens, num_computed_tokens + num_new_tokens)

Prefill, a chunk of it, and decode are one case: compute some of the tokens that are known and not computed yet.
When a step computes the last known token, it also samples the next one.
"""

from dataclasses import dataclass, field

from hbserve_rpc import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens and progress of one request. Owned by the engine's thread."""

    request_id: str
    token_ids: list[int]
    """Prompt, then output."""
    num_prompt_tokens: int
    params: SamplingParams
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    """Block i holds tokens [i * block_size, (i + 1) * block_size)."""
    block_digests: list[bytes] = field(default_factory=list)
    """Of the full blocks, as far as they were needed; see BlockManager."""
    num_cached_tokens: int = 0
    """Of those computed, how many the prefix cache gave when the sequence last got its blocks."""
    prefill_only: bool = False
    """The sequence ends with its next token, and its blocks are sent away while it is computed."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

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
    """What one step computes of one sequence: tokens [num_computed_tokens, num_computed_tokens + num_new_tokens).

    `sequence.block_table` covers them. The runner reads the sequence and changes nothing.
    """

    sequence: Sequence
    num_new_tokens: int

    @property
    def first(self) -> int:
        """The first token that is computed. Meaningful until the step has ended."""
        return self.sequence.num_computed_tokens

    @property
    def samples(self) -> bool:
        """Whether the chunk ends with the last known token, so that the step yields a next one."""
        return self.sequence.num_computed_tokens + self.num_new_tokens == self.sequence.num_tokens

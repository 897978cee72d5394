"""What an engine says to whoever runs it."""

from dataclasses import dataclass, field
from typing import Any

from hbserve_rpc.messages import FinishReason


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did for one request."""

    request_id: str
    token_id: int | None
    """The new token, or None if the step only computed a part of the prompt."""
    index: int
    """Place of that token, or without one of the next, among the request's output tokens."""
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Of those, how many came from the prefix cache."""
    block_table: list[int] = field(default_factory=list)
    """Of a prefill-only request, whose blocks stay as they are until `release`; else empty."""
    ready: Any = None
    """With a block table on a CUDA device: the event after which those tokens' keys and values are in the blocks."""

    @property
    def token_ids(self) -> list[int]:
        """The new token, if there is one."""
        return [] if self.token_id is None else [self.token_id]


@dataclass(frozen=True, slots=True)
class Reservation:
    """Room for a request whose KV others will bring."""

    request_id: str
    block_ids: list[int]
    """Blocks of the tokens that are not cached here, in order."""
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Gauges are of now, counters from the start."""

    num_waiting: int = 0
    num_running: int = 0
    num_reserved: int = 0
    """Requests whose blocks wait for a transfer."""
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that nobody holds, those kept as prefix cache included."""
    num_quarantined_blocks: int = 0
    num_generated_tokens: int = 0
    num_prefill_tokens: int = 0
    """Prompt tokens computed, those computed again after a preemption included."""
    num_cached_tokens: int = 0
    num_preemptions: int = 0

"""Settings of a modelled engine that bound its steps."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from hbserve_rpc import InvalidRequest
from hbserve_rpc.settings import NOT_NEGATIVE, POSITIVE, Bounds, EngineSettings, misfits

MOST_REMEMBERED = 4096
FEWEST_ROWS_MORE, MOST_ROWS_MORE = 32, 128
"""The fewest and most rows between the sizes of two graphs of steps with prompts, as in
hbserve_core/cuda_runner/step_packer.py."""


class Checked:
    """A dataclass whose fields are checked when it is made, as those of a configuration are.

    Raises:
        InvalidRequest: (a ValueError) a field has an invalid value. Names the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for _, problem in misfits(self):
            raise InvalidRequest(problem)


@dataclass(frozen=True)
class EngineLimits(Checked):
    """Settings of an engine on which its steps depend, named as in the configuration."""

    chunk_size: Annotated[int | Literal["auto"] | None, POSITIVE] = None
    itl_target_ms: Annotated[float | None, Bounds(0.1)] = None
    max_chunk_prefill_tokens: Annotated[int, POSITIVE] = 4096
    max_num_batched_tokens: Annotated[int, POSITIVE] = 2048
    max_num_seqs: Annotated[int, POSITIVE] = 256
    most_graph_tokens: Annotated[int, NOT_NEGATIVE] = 2048
    chunked_prefill_enabled: bool = True

    @classmethod
    def of(cls, settings: EngineSettings) -> "EngineLimits":
        """Make the limits that follow from a deployment's settings."""
        return cls(
            settings.chunk_size,
            settings.itl_target_ms,
            settings.max_chunk_prefill_tokens,
            settings.max_num_batched_tokens,
            settings.max_num_seqs,
            settings.most_graph_tokens,
            settings.chunked_prefill_enabled,
        )

    def graph_rows(self, num_tokens: int) -> int:
        """Return how many rows a GPU computes for a step with prompts that has `num_tokens` tokens: steps are padded to
        the size of a graph."""
        return _graph_rows(num_tokens, self.most_graph_tokens)


@lru_cache(MOST_REMEMBERED)
def _graph_rows(num_tokens: int, most_graph_tokens: int) -> int:
    if num_tokens > most_graph_tokens:
        return num_tokens
    more = max(FEWEST_ROWS_MORE, min(MOST_ROWS_MORE, (1 << (num_tokens.bit_length() - 1)) // 4))
    return min(most_graph_tokens, math.ceil(num_tokens / more) * more)

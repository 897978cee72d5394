"""Settings of a modelled engine."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from hbserve_rpc.settings import EngineSettings

MOST_REMEMBERED = 4096
FEWEST_ROWS_MORE, MOST_ROWS_MORE = 32, 128
"""The fewest and most rows between the sizes of two graphs of steps with prompts, as in
hbserve_core/cuda_runner/step_packer.py."""


@dataclass(frozen=True)
class EngineLimits:
    """Settings of an engine on which its steps depend, named as in the configuration."""

    chunk_size: int | Literal["auto"] | None = None
    itl_target_ms: float | None = None
    max_chunk_prefill_tokens: int = 4096
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    most_graph_tokens: int = 2048
    chunked_prefill_enabled: bool = True

    @classmethod
    def of(cls, settings: EngineSettings) -> "EngineLimits":
        """The limits that follow from a deployment's settings."""
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
        """Rows that a GPU computes for a step with prompts that has `num_tokens` tokens: steps are padded to the size
        of a graph."""
        return _graph_rows(num_tokens, self.most_graph_tokens)


@lru_cache(MOST_REMEMBERED)
def _graph_rows(num_tokens: int, most_graph_tokens: int) -> int:
    if num_tokens > most_graph_tokens:
        return num_tokens
    more = max(FEWEST_ROWS_MORE, min(MOST_ROWS_MORE, (1 << (num_tokens.bit_length() - 1)) // 4))
    return min(most_graph_tokens, math.ceil(num_tokens / more) * more)

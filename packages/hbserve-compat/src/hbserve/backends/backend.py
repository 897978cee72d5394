"""The interface between LLM and whatever computes for it, and what they exchange."""

import contextlib
import queue
from dataclasses import dataclass, field
from typing import Protocol

from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Progress:
    """What is new of one request, or of one of its choices."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    error: Exception | None = None
    """It failed."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of each of `token_ids`, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """With the first token, if the request asks for them: of each prompt token but the first."""
    choice: int = 0


News = queue.SimpleQueue[Progress]
"""Of the requests of one caller, who alone reads it."""


def drained(news: News) -> list[Progress]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(news.get_nowait())
    return found


class Backend(Protocol):
    """What computes: an engine in this process, or prefill and decode instances in others.

    Every method may be called from any thread, and raises Ended once `close` was called.
    """

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raises InvalidRequest if such a request can never run."""

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams, news: News) -> None:
        """Begin a request; first wait, if so many are waiting that there is no room. Raises InvalidRequest."""

    def step(self, news: News) -> tuple[list[Progress], int]:
        """Whatever is new for this caller, after one step if need be, and how many prompt tokens that computed."""

    def end(self, request_ids: list[str], reason: FinishReason, choice: int | None = None) -> None:
        """Compute these, or one choice of each, no further: "stop" if all that was wanted is there. Those that have
        ended are passed over."""

    def close(self) -> None:
        """End everything. May be called twice, and from several threads: each returns when it has ended."""

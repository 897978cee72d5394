"""The interface between LLM and whatever computes for it, and what they exchange."""

import contextlib
import queue
from dataclasses import dataclass, field
from typing import Protocol

from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import FinishReason, TokenLogprobs


@dataclass(frozen=True)
class Progress:
    """New tokens, or the end, of one request or of one of its choices."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    error: Exception | None = None
    """Why the request failed; None if it did not."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of each of `token_ids`, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Log-probabilities of each prompt token but the first, if the request asks for them. Come with the first token."""
    choice: int = 0


News = queue.SimpleQueue[Progress]
"""Queue of the progress of one caller's requests. Only that caller reads it."""


def drained(news: News) -> list[Progress]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(news.get_nowait())
    return found


class Backend(Protocol):
    """An engine in this process, or prefill and decode instances in other processes.

    Every method may be called from any thread, and raises Ended after `close` was called.
    """

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raise InvalidRequest if such a request can never run."""

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams, news: News) -> None:
        """Begin a request. If the queue of waiting requests is full, wait for room first. Raises InvalidRequest."""

    def step(self, news: News) -> tuple[list[Progress], int]:
        """Return this caller's news, after one step if there are none yet, and how many prompt tokens it computed."""

    def end(self, request_ids: list[str], reason: FinishReason, choice: int | None = None) -> None:
        """Stop computing these requests, or one choice of each. The reason is "stop" if everything that was wanted is
        there. Requests that have ended already are ignored."""

    def close(self) -> None:
        """End everything. May be called twice, and from several threads: each call returns when all has ended."""

"""Rendering of tokens and text as the JSON of an answer, whole or in chunks, for both chats and completions."""

from typing import Any, Protocol

import msgspec

from hbserve.results import GenerationDelta, Timings
from hbserve.server.answers.answers import News
from hbserve.server.fields.request_fields import SamplingFields
from hbserve.server.http.api_error import ApiError

DONE = b"data: [DONE]\n\n"
MARK = "\0"


def event(value: Any) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Choices(Protocol):
    """The choices of one answer: what differs between chats and completions."""

    object_name: str
    chunk_name: str

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Return a choice's first chunks, which are sent with the status line."""

    def chunk(self, index: int, delta: GenerationDelta) -> list[dict[str, Any]]:
        """Return a choice's next chunks."""

    def beside(self, index: int, delta: GenerationDelta) -> dict[str, Any]:
        """Return fields of the answer, beside its choices, that become known with this chunk of one choice."""

    def num_reasoning(self) -> int | None:
        """Return the number of reasoning tokens so far; None if the model does not reason."""

    def is_bare(self, index: int, delta: GenerationDelta) -> bool:
        """Whether a choice's next chunk has only text, so that it need not be built."""

    def bare(self, index: int, text: str) -> dict[str, Any]:
        """Return the chunk of a text alone."""

    def whole(self, index: int) -> dict[str, Any]:
        """Return a whole choice, after its last chunk."""


class Rendering:
    """The AnswerFormat of chats and completions, which also counts tokens."""

    def __init__(
        self, choices: Choices, body: SamplingFields, head: dict[str, Any], prompts: list[tuple[int, ...]]
    ) -> None:
        """`prompts` has the prompt of each choice, in order. The choices of one prompt are neighbours, and share one
        tuple."""
        options = body.stream_options
        self._choices = choices
        self._head = head
        self._ends_with_usage = bool(options and options.include_usage)
        self._has_usage = bool(self._ends_with_usage and options and options.continuous_usage_stats)
        self._prompts = prompts
        self._firsts = [i for i, each in enumerate(prompts) if i == 0 or each is not prompts[i - 1]]
        """Index of the first choice of each prompt."""
        self._num_output = 0
        self._beside: dict[str, Any] = {}
        self._timings: dict[int, Timings] = {}
        start = msgspec.json.encode({**head, "object": choices.chunk_name})[:-1]
        self._start = b"data: " + start + b',"choices":['
        self._around_text: list[tuple[bytes, bytes]] = []
        """Bytes before and after the text in an event that has only text, for each choice."""
        if body.stream and not self._has_usage:
            self._around_text = [self._around(choices.bare(index, MARK)) for index in range(len(prompts))]

    def _around(self, choice: dict[str, Any]) -> tuple[bytes, bytes]:
        before, _, behind = msgspec.json.encode(choice).partition(msgspec.json.encode(MARK))
        return self._start + before, behind + b"]}\n\n"

    # ---- in chunks -----------------------------------------------------------------------------------------------

    def opening(self) -> bytes:
        """Return the events that are sent with the status line."""
        return b"".join(
            [self._event(each) for index in range(len(self._prompts)) for each in self._choices.opening(index)]
        )

    def chunks(self, news: News) -> bytes:
        return b"".join([self._chunk(index, delta) for index, delta in news])

    def _chunk(self, index: int, delta: GenerationDelta) -> bytes:
        self._count(index, delta)
        if self._around_text and self._choices.is_bare(index, delta):
            before, behind = self._around_text[index]
            return before + msgspec.json.encode(delta["text"]) + behind if delta["text"] else b""
        more = self._choices.beside(index, delta) | (self.metrics() if delta["timings"] is not None else {})
        found = self._choices.chunk(index, delta)
        return b"".join([self._event(each, more if each is found[-1] else None) for each in found])

    def _event(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        if self._has_usage:
            more = {**(more or {}), "usage": self.usage()}
        rest = b"," + msgspec.json.encode(more)[1:] if more else b"}"
        return self._start + msgspec.json.encode(choice) + b"]" + rest + b"\n\n"

    def closing(self) -> bytes:
        """Return the events after the last chunk of every choice."""
        if not self._ends_with_usage:
            return DONE
        last = {
            **self._head,
            "object": self._choices.chunk_name,
            "choices": [],
            "usage": self.usage(),
            **self.metrics(),
        }
        return event(last) + DONE

    def failed(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    # ---- whole ---------------------------------------------------------------------------------------------------

    def take(self, news: News) -> None:
        """Keep new pieces for `whole`. Replaces `chunks` for a client that wants the answer in one piece."""
        for index, delta in news:
            self._count(index, delta)
            self._beside |= self._choices.beside(index, delta)
            self._choices.chunk(index, delta)

    def whole(self) -> dict[str, Any]:
        choices = [self._choices.whole(index) for index in range(len(self._prompts))]
        head = {**self._head, "object": self._choices.object_name}
        return {**head, "choices": choices, "usage": self.usage(), **self._beside, **self.metrics()}

    # ---- figures -------------------------------------------------------------------------------------------------

    def _count(self, index: int, delta: GenerationDelta) -> None:
        self._num_output += len(delta["token_ids"])
        if delta["timings"] is not None:
            self._timings[index] = delta["timings"]

    def usage(self) -> dict[str, Any]:
        """Return the number of tokens so far. Cached ones are counted for prompts whose first answer has ended."""
        num_prompt = sum(len(self._prompts[index]) for index in self._firsts)
        cached = sum(self._timings[index]["num_cached_tokens"] for index in self._firsts if index in self._timings)
        reasoning = self._choices.num_reasoning()
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_output,
            "total_tokens": num_prompt + self._num_output,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({} if reasoning is None else {"completion_tokens_details": {"reasoning_tokens": reasoning}}),
        }

    def metrics(self) -> dict[str, Any]:
        """Return times and other figures of an answer that is the only one: first those that vLLM has too."""
        if len(self._prompts) != 1 or 0 not in self._timings:
            return {}
        times = self._timings[0]
        generation_s = times["e2e_s"] - times["ttft_s"]
        is_paced = self._num_output > 1 and generation_s > 0
        return {
            "metrics": {
                "time_to_first_token_ms": 1e3 * times["ttft_s"],
                "generation_time_ms": 1e3 * generation_s,
                "queue_time_ms": 1e3 * times["queue_time_s"],
                "mean_itl_ms": 1e3 * times["tpot_s"],
                "tokens_per_second": (self._num_output - 1) / generation_s if is_paced else None,
                "handoff_ms": 1e3 * times["handoff_s"],
                "kv_transfer_time_ms": 1e3 * times["kv_transfer_time_s"],
                "kv_bytes": times["kv_bytes"],
                "prefill_instance": times["prefill_instance"],
                "decode_instance": times["decode_instance"],
                "num_attempts": times["num_attempts"],
            }
        }

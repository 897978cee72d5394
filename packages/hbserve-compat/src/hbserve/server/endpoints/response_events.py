"""Answers of /v1/responses: a whole response, or its events in their order."""

import time
from typing import Any

from hbserve.results import GenerationDelta
from hbserve.server.answers.logprobs import TokenNames, of_chat
from hbserve.server.chat.message_parts import MessageParts
from hbserve.server.endpoints.answer_blocks import Block, BlockFormat, Change
from hbserve.server.endpoints.responses_fields import ResponsesBody
from hbserve.server.http.api_error import ApiError

PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


class ResponseFormat(BlockFormat):
    """The format of one response, in which each block is an item of the output."""

    def __init__(
        self,
        body: ResponsesBody,
        names: TokenNames,
        head: dict[str, Any],
        prompt: tuple[int, ...],
        parts: MessageParts,
    ) -> None:
        """names: spells tokens if the body asks for their log-probabilities."""
        super().__init__(head, prompt, parts)
        self._body = body
        self._names = names
        self._num_events = 0
        self._num_told = 0
        """Number of tokens of the last text whose log-probabilities were sent in an event."""

    def _entries(self, delta: GenerationDelta) -> list[dict[str, Any]]:
        num_top = self._body.top_logprobs or 0
        return of_chat(self._names, delta["token_ids"], delta["logprobs"], num_top) if delta["logprobs"] else []

    def _sent(self, events: list[dict[str, Any]]) -> bytes:
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
        return super()._sent(events)

    def opening(self) -> bytes:
        """Return the events that are sent with the status line."""
        begun = self._response("in_progress")
        return self._sent([{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")])

    def closing(self) -> bytes:
        """Return the event with the whole response."""
        whole = self.whole()
        return self._sent([{"type": f"response.{whole['status']}", "response": whole}])

    def failed(self, error: ApiError) -> bytes:
        """Return the event that says why the response has failed."""
        told = {"code": "server_error", "message": error.message}
        response = self._response("failed", error=told)
        for item in response["output"][-1:]:
            item["status"] = "incomplete"
        return self._sent([{"type": "response.failed", "response": response}])

    def whole(self) -> dict[str, Any]:
        """Return the whole response, which has ended."""
        usage = {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": self._num_cached, "cache_write_tokens": 0},
            "output_tokens": self._num_output,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": self._num_prompt + self._num_output,
        }
        if self._reason == "length":
            return self._response("incomplete", usage=usage, incomplete_details={"reason": "max_output_tokens"})
        return self._response("completed", usage=usage, completed_at=int(time.time()))

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._head["id"],
            "object": "response",
            "created_at": self._head["created"],
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._head["model"],
            "output": [self._item(block) for block in self._blocks],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text.format if body.text else None) or {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    # ---- items ---------------------------------------------------------------------------------------------------

    def _id(self, block: Block) -> str:
        return f"{PREFIXES[block.kind]}_{self._head['id'].removeprefix(self._body.id_prefix)}_{block.index}"

    def _item(self, block: Block, *, begins: bool = False) -> dict[str, Any]:
        # A call that is whole has the reason `tool_calls`.
        ends_early = self._reason == "length" or (self._reason == "stop" and block.kind == "call")
        is_cut = ends_early and block is self._blocks[-1]
        status = "in_progress" if begins else "incomplete" if is_cut else "completed"
        item = {"id": self._id(block), "status": status}
        content = [] if begins else [_part(block)]
        if block.kind == "text":
            return {**item, "type": "message", "role": "assistant", "content": content}
        if block.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
        return {**item, "type": "function_call", **call}

    # ---- events --------------------------------------------------------------------------------------------------

    def _events(self, change: Change) -> list[dict[str, Any]]:
        happens, block, new = change
        place = {"item_id": self._id(block), "output_index": block.index}
        if happens == "grows":
            return [_grown(block, place, new, self._new_logprobs(block))]
        of_item = {"output_index": block.index, "item": self._item(block, begins=happens == "begins")}
        of_part = {"type": "response.content_part.", "content_index": 0, **place}
        of_part["part"] = _part(Block(block.kind, block.index) if happens == "begins" else block)
        if happens == "begins":
            self._num_told = 0
            part = [] if block.kind == "call" else [of_part | {"type": "response.content_part.added"}]
            return [{"type": "response.output_item.added", **of_item}, *part]
        ended = {"type": "response.output_item.done", **of_item}
        if block.kind == "call":
            called = {**place, "name": block.name, "arguments": block.text}
            return [{"type": "response.function_call_arguments.done", **called}, ended]
        text = {**place, "content_index": 0, "text": block.text}
        done = {"type": "response.reasoning_text.done", **text}
        if block.kind == "text":
            done = {"type": "response.output_text.done", **text, "logprobs": block.logprobs}
        return [done, of_part | {"type": "response.content_part.done"}, ended]

    def _new_logprobs(self, block: Block) -> list[dict[str, Any]]:
        new = block.logprobs[self._num_told :]
        self._num_told = len(block.logprobs)
        return new


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": block.logprobs}


def _grown(block: Block, place: dict[str, Any], new: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if block.kind == "call":
        return {"type": "response.function_call_arguments.delta", **place, "delta": new}
    grown = {**place, "content_index": 0, "delta": new}
    if block.kind == "reasoning":
        return {"type": "response.reasoning_text.delta", **grown}
    return {"type": "response.output_text.delta", **grown, "logprobs": logprobs}

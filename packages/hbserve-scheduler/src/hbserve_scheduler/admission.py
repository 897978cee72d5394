"""Admission of requests: a check that one can ever run, and a place to wait for room."""

import asyncio
from collections.abc import Callable, Sequence

from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import GenerateRequest, InstanceInfo
from hbserve_rpc.plain_values import plain_id, plain_token_ids, require_in_vocabulary, shown


def admitted(request: GenerateRequest, infos: Sequence[InstanceInfo]) -> GenerateRequest:
    """The request, plain and shared with nobody, checked against the instances that are ready.

    While there are none, they check it themselves later.

    Raises:
        InvalidRequest: says what is wrong, and what is allowed.
    """
    request_id = plain_id("request_id", request.request_id)
    if not isinstance(request.params, SamplingParams):
        raise InvalidRequest(f"params={shown(request.params)}: expected SamplingParams")
    params = request.params.copied()
    prompt = plain_token_ids("prompt", request.prompt_token_ids)
    output = plain_token_ids("output_token_ids", request.output_token_ids)
    if not prompt:
        raise InvalidRequest("prompt: expected at least one token")
    if len(output) >= params.max_tokens:
        raise InvalidRequest(
            f"output_token_ids: {len(output)} tokens; expected fewer than max_tokens={params.max_tokens}, "
            "which counts them"
        )
    num_tokens = len(prompt) + len(output)
    if infos and num_tokens > (longest := min(info.max_prompt_len for info in infos)):
        raise InvalidRequest(f"prompt: {num_tokens} tokens; the instances take at most {longest}")
    if infos:
        size = min(info.vocab_size for info in infos)
        require_in_vocabulary("prompt", prompt, size)
        require_in_vocabulary("output_token_ids", output, size)
        params.require_vocabulary(size)
    return GenerateRequest(request_id, prompt, params, output)


class Room:
    """Where those wait who would rather wait than be refused. Belongs to one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    async def wait_until(self, there_is: Callable[[], bool]) -> None:
        while not there_is():
            self._changed.clear()
            await self._changed.wait()

    def look_again(self) -> None:
        self._changed.set()

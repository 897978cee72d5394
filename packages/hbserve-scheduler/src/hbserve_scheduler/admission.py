"""Admission of requests: a check that one can ever run, the requests that wait, and a place to wait for room."""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import overload

from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import GenerateRequest, InstanceInfo
from hbserve_rpc.plain_values import plain_id, plain_token_ids, require_in_vocabulary, shown
from hbserve_scheduler.request import ScheduledRequest


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


class WaitingRequests(Sequence[ScheduledRequest]):
    """A sequence, oldest first, in which finding by id, removing and both ends take the same time however long it is.

    Not a deque, in which to remove and to look an id up is to go through all of it: with 20,000 requests it was 5 ms.
    """

    def __init__(self) -> None:
        # Linked, unlike a dict, whose beginning must be searched for once many have been removed there.
        self._by_id: OrderedDict[str, ScheduledRequest] = OrderedDict()

    def append(self, entry: ScheduledRequest) -> None:
        assert entry.request.request_id not in self._by_id, "ids are checked at admission"
        self._by_id[entry.request.request_id] = entry

    def remove(self, entry: ScheduledRequest) -> None:
        """Raises ValueError: it does not wait."""
        if entry not in self:
            raise ValueError(f"request {entry.request.request_id!r} does not wait")
        del self._by_id[entry.request.request_id]

    def find(self, request_id: str) -> ScheduledRequest | None:
        return self._by_id.get(request_id)

    def __contains__(self, entry: object) -> bool:
        return isinstance(entry, ScheduledRequest) and self._by_id.get(entry.request.request_id) is entry

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[ScheduledRequest]:
        return iter(self._by_id.values())

    def __reversed__(self) -> Iterator[ScheduledRequest]:
        return reversed(self._by_id.values())

    @overload
    def __getitem__(self, place: int) -> ScheduledRequest: ...

    @overload
    def __getitem__(self, place: slice) -> list[ScheduledRequest]: ...

    def __getitem__(self, place: int | slice) -> ScheduledRequest | list[ScheduledRequest]:
        if isinstance(place, slice):
            return list(self)[place]
        from_end = place < 0
        steps = -place - 1 if from_end else place
        found = next(itertools.islice(reversed(self) if from_end else iter(self), steps, None), None)
        if found is None:
            raise IndexError(f"request {place} of {len(self)} that wait")
        return found


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

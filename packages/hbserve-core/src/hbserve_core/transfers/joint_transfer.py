"""One transfer that several ranks send or receive together, each its own heads of the same blocks.

P, 2 ranks              D, 1 rank             A JointSend is of one rank: to each rank of the other side that wants some
  rank 0 ──heads 0, 1──▶ rank 0               of its heads. The instance's is made of those. A JointReceive is of the
  rank 1 ──heads 2, 3──▶                      instance: blocks are there when every rank has all its heads.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from hbserve_kv import Outcome, TransferResult

T = TypeVar("T")
_SEVERITY = (Outcome.COMPLETED, Outcome.FAILED_DRAINED, Outcome.UNKNOWN)


class Receive(Protocol):
    """What a PostedReceive can do, whichever rank's it is."""

    grant: bytes

    async def wait(self) -> TransferResult:
        """How it ended. Unless the outcome is UNKNOWN, the blocks are the caller's again."""

    async def cancel(self, reason: str) -> Outcome:
        """Want it no more. Nothing, if it has ended."""

    async def drained(self) -> None:
        """After UNKNOWN: wait until nothing can land any more. Raises TransferFailed: nobody will know."""


class Send(Protocol):
    """What an OutgoingTransfer can do, whichever rank's it is."""

    @property
    def num_blocks(self) -> int:
        """How many blocks the receiver wants."""

    def push(self, block_ids: Sequence[int], first: int) -> None:
        """Queue blocks that are computed: `block_ids[i]` goes to block `first + i` of those granted."""

    async def commit(self, payload: bytes) -> TransferResult:
        """Wait for all that was pushed, then hand the transfer over."""

    async def abort(self, reason: str) -> Outcome:
        """Send no more. Nothing, if it has ended."""

    async def drained(self) -> None:
        """After UNKNOWN: wait until no block is read any more."""


class JointReceive:
    """A Receive of all ranks of an instance."""

    def __init__(self, parts: Sequence[Receive], grant: bytes) -> None:
        self.grant = grant
        self._parts = parts

    async def wait(self) -> TransferResult:
        """As soon as one rank's has failed, the others' are cancelled: nobody wants them without it."""
        waiting = [asyncio.ensure_future(part.wait()) for part in self._parts]
        try:
            cause = ""
            for ended in asyncio.as_completed(waiting):
                result = await ended
                if result.outcome is not Outcome.COMPLETED and not cause:
                    cause = result.error
                    await self.cancel(cause)
            return replace(joint_result([await each for each in waiting]), error=cause)
        finally:
            for each in waiting:
                each.cancel()

    async def cancel(self, reason: str) -> Outcome:
        return worst(await asyncio.gather(*(part.cancel(reason) for part in self._parts)))

    async def drained(self) -> None:
        await asyncio.gather(*(part.drained() for part in self._parts))


class JointSend:
    """A Send to several ranks, or of several ranks. There may be none: a rank whose heads nobody wants of it."""

    def __init__(self, parts: Sequence[Send]) -> None:
        self.parts = parts

    @property
    def num_blocks(self) -> int:
        """The ranks of one instance want the same blocks."""
        return self.parts[0].num_blocks if self.parts else 0

    def push(self, block_ids: Sequence[int], first: int) -> None:
        for part in self.parts:
            part.push(block_ids, first)

    async def commit(self, payload: bytes) -> TransferResult:
        return joint_result(await asyncio.gather(*(part.commit(payload) for part in self.parts)))

    async def abort(self, reason: str) -> Outcome:
        return worst(await asyncio.gather(*(part.abort(reason) for part in self.parts)))

    async def drained(self) -> None:
        await asyncio.gather(*(part.drained() for part in self.parts))


def worst(outcomes: Sequence[Outcome]) -> Outcome:
    return max(outcomes, key=_SEVERITY.index, default=Outcome.COMPLETED)


def joint_result(results: Sequence[TransferResult]) -> TransferResult:
    """Of the parts of one transfer: bytes are added up, and the first error is told."""
    return TransferResult(
        worst([each.outcome for each in results]),
        results[0].payload if results else b"",
        sum(each.num_bytes for each in results),
        sum(each.num_parts for each in results),
        max((each.time_s for each in results), default=0.0),
        next((each.error for each in results if each.error), ""),
    )


async def all_or_none(
    opening: Sequence[Coroutine[Any, Any, T]], undo: Callable[[T], Coroutine[Any, Any, object]]
) -> list[T]:
    """The results of all; if one fails, `undo(result)` of each of the others is awaited, and the first error raised."""
    tasks = [asyncio.ensure_future(each) for each in opening]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        opened = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(undo(each) for each in opened if not isinstance(each, BaseException)))
        raise

"""Takes what senders announce over two-sided transports: each link's parts in the order of their announcements.

What was announced is on its way, and the next part would be taken in its place. So a part that is not taken ends its
link: the two sides no longer agree on what goes over it. The sender hears why, then that the link has ended, and ends
the send that nobody takes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from hbserve_kv.protocol.messages import AnnouncedPart, Cancelled, PartsAnnounced
from hbserve_kv.receiving.transfer import Incoming, IncomingLink
from hbserve_kv.transports.base import Part

logger = logging.getLogger(__name__)


class PartTaker:
    """The parts that are under way to one instance."""

    def __init__(self, timeout_s: float, fail: Callable[[Incoming, str], None]) -> None:
        """A part may take `timeout_s` from its turn on. `fail` ends a transfer, and tells its senders."""
        self._timeout_s = timeout_s
        self._fail = fail
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, link: IncomingLink, incoming: Incoming | None, message: PartsAnnounced) -> bool:
        """Begin to take parts of `incoming`, None if there is no such transfer (any more). False: they are not."""
        if link.broken:
            return False
        if error := _why_not_taken(incoming, message):
            link.notices.put_nowait(Cancelled(message.transfer_id, error))
            self._break(link, error)
            return False
        assert incoming is not None
        # A task of our own: the bytes may land even if the sender is lost.
        left = list(message.parts)
        task = asyncio.create_task(self._accept(link, incoming, left))
        link.accepting[task] = incoming
        self._tasks.add(task)
        # Not at the end of the task itself, which does not run at all if it is cancelled at once.
        task.add_done_callback(lambda done: self._ended(link, incoming, left, done))
        return True

    async def until_taken(self, link: IncomingLink, incoming: Incoming) -> None:
        """Wait until the parts that were announced so far have landed or failed."""
        if announced := [task for task, transfer in link.accepting.items() if transfer is incoming]:
            await asyncio.wait(announced)

    async def close(self) -> None:
        """After the links were lost: wait until nothing is taken any more."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, link: IncomingLink, incoming: Incoming, left: list[AnnouncedPart]) -> None:
        key = link.link.key
        async with link.in_order:
            while left:
                began_s = time.monotonic()
                await self._accept_one(link, incoming, left[0])
                incoming.taking_s[key] = incoming.taking_s.get(key, 0.0) + time.monotonic() - began_s
                incoming.state.end_part(key, left.pop(0).index)

    def _ended(
        self, link: IncomingLink, incoming: Incoming, left: Sequence[AnnouncedPart], task: asyncio.Task[None]
    ) -> None:
        """Nothing of these parts can land any more: those that are `left` have failed."""
        self._tasks.discard(task)
        del link.accepting[task]
        if left:
            error = "the link was lost" if task.cancelled() else _describe(left[0], task.exception())
            error = link.broken or incoming.state.cause or error
            self._break(link, error)
            for part in left:
                incoming.state.end_part(link.link.key, part.index, error)
        incoming.settle()

    async def _accept_one(self, link: IncomingLink, incoming: Incoming, part: AnnouncedPart) -> None:
        if link.broken:
            raise ConnectionError(link.broken)
        late = f"part {part.index} of transfer {incoming.transfer_id} did not come within {self._timeout_s:.3g} s"
        deadline = asyncio.get_running_loop().call_later(self._timeout_s, self._break, link, late)
        try:
            await asyncio.shield(link.connecting)
            block_ids = incoming.block_ids[part.first : part.end]
            await link.transport.accept(link.link, Part(incoming.transfer_id, part.index, incoming.region, block_ids))
        finally:
            deadline.cancel()

    def _break(self, link: IncomingLink, why: str) -> None:
        """End a link: its transfers fail, which tells the sender why, and then its stream ends."""
        if link.broken:
            return
        link.broken = why
        if link.is_connected:
            logger.warning("the link from rank %d broke: %s", link.hello.rank, why)
        for incoming in list(link.transfers):
            self._fail(incoming, why)
        link.notices.put_nowait(None)


def _describe(part: AnnouncedPart, error: BaseException | None) -> str:
    return f"part {part.index}: {type(error).__name__}: {error}"


def _why_not_taken(incoming: Incoming | None, message: PartsAnnounced) -> str:
    """Begins all the parts and returns "", or says why it begins none."""
    what = f"a part of transfer {message.transfer_id}"
    if incoming is None:
        return f"{what} is late"
    for part in message.parts:
        if not 0 <= part.first < part.end <= len(incoming.block_ids):
            return f"{what} is outside what was granted: {part}"
    if not incoming.state.start_parts(message.link, *(part.index for part in message.parts)):
        return f"{what} is late or was sent twice"
    return ""

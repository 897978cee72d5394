"""Failed transfers whose blocks may still be written, until it is certain that they are not.

A sender reports the end of its writes itself (ABANDON). If it is lost, the transport revokes its means to write, if it
can: see `Transport.revoke`. Otherwise this side asks the sender (ALIVE), in case its report was lost. If its process is
gone, it writes nothing more. If it merely does not answer, it may still write, so its transfers become UNKNOWN, and
their blocks wait until it answers or is gone. That may be never: no wait is long enough to prove that a paused process
will not continue. So a warning is repeated that says which blocks are out of use, and because of which sender.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from hbserve_kv.protocol import messages
from hbserve_kv.protocol.messages import Alive
from hbserve_kv.protocol.transfer_state import Phase
from hbserve_kv.receiving.transfer import IncomingLink, IncomingTransfer
from hbserve_rpc import HBServeRpcError, Keys, RpcClient
from hbserve_rpc.address import nobody_listens
from hbserve_rpc.reminder import Reminder

logger = logging.getLogger(__name__)

GRACE_S = 1.0
"""How long data may still arrive after its sender has ended, because the sender's system had already taken it."""
CHECK_INTERVAL_S = 0.5
ANSWER_TIMEOUT_S = 1.0
GONE = Alive(epoch="", writing=[])
"""Answer on behalf of a process that is not there any more."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 3600.0
"""Pauses between two warnings that blocks are out of use: see Reminder."""


class Quarantine:
    """Watches failed transfers until they are drained."""

    def __init__(
        self, *, longest_s: float, on_revoked: Callable[[set[str], str], None], keys: Keys | None = None
    ) -> None:
        """`longest_s` is how long a sender that answers may take to end what it was writing. `on_revoked` is called
        with the keys of links over which nothing lands any more, and with the reason."""
        self._longest_s = longest_s
        self._keys = keys
        self._on_revoked = on_revoked
        self._watching: dict[IncomingTransfer, asyncio.Task[None]] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Task[bool]] = set()

    def __len__(self) -> int:
        return len(self._watching)

    @property
    def num_blocks(self) -> int:
        return sum(len(each.block_ids) for each in self._watching)

    def find(self, transfer_id: str, link: str) -> IncomingTransfer | None:
        found = (each for each in self._watching if each.transfer_id == transfer_id and link in each.links)
        return next(found, None)

    def watch(self, transfer: IncomingTransfer) -> None:
        """Watch a transfer; each transfer calls this if it fails while something of it may still land."""
        task = asyncio.create_task(self._wait_until_drained(transfer))
        self._watching[transfer] = task
        task.add_done_callback(lambda _: self._watching.pop(transfer))

    def drain_later(self, transfer: IncomingTransfer, link: IncomingLink) -> None:
        """Note a moment later that the sender writes nothing more: what its system had already taken may still
        arrive."""
        task = asyncio.create_task(self._drain_later(transfer, link))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def _drain_later(self, transfer: IncomingTransfer, link: IncomingLink) -> None:
        if not await self.revoke(link):
            await asyncio.sleep(GRACE_S)
        transfer.sender_drained(link.link.key)

    async def until_empty(self, timeout_s: float) -> None:
        """Wait until every failed transfer is drained, but for no longer than `timeout_s`."""
        if self._watching:
            await asyncio.wait(self._watching.values(), timeout=timeout_s)

    async def close(self) -> None:
        """Stop watching, and wake whoever waits for transfers that are not drained."""
        watched = list(self._watching)
        running = [*self._watching.values(), *self._draining]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for transfer in watched:
            transfer.close()
        await asyncio.gather(*self._asking, return_exceptions=True)

    async def _wait_until_drained(self, transfer: IncomingTransfer) -> None:
        loop = asyncio.get_running_loop()
        reminder = Reminder(loop.time(), first_pause_s=FIRST_PAUSE_S, longest_pause_s=LONGEST_PAUSE_S)
        deadline_s = reminder.began_s + self._longest_s
        while not transfer.drained.is_set():
            writing = transfer.undrained
            lost = [link for link in writing if not link.is_connected and link.transport.one_sided]
            is_late = loop.time() > deadline_s
            for link in writing if is_late else lost:
                if await self.revoke(link) or (link in lost and await self._ask(link)):
                    transfer.sender_drained(link.link.key)
            # The deadline counts from when the sender stopped answering, because that is when its link is lost.
            if lost or (writing and is_late):
                transfer.give_up()
            if transfer.phase is Phase.UNKNOWN and reminder.say_now(loop.time()):
                _warn(transfer, loop.time() - reminder.began_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL_S):
                    await transfer.drained.wait()

    async def revoke(self, link: IncomingLink) -> bool:
        """Revoke the sender's means to write, whether it is there or not. Returns whether that worked, so that nothing
        lands over the link any more."""
        try:
            revoked = await link.transport.revoke(link.link)
        except Exception:  # whatever a backend raised; the sender can still be asked
            logger.exception("the means to write could not be taken from a lost sender")
            return False
        self._on_revoked(revoked, "a sender that was lost had to be kept from writing")
        return bool(revoked)

    async def _ask(self, link: IncomingLink) -> bool:
        # This needs a task of its own: a client that is cancelled while it closes would leave its socket behind.
        asking = asyncio.create_task(has_ended(link, self._keys))
        self._asking.add(asking)
        asking.add_done_callback(self._asking.discard)
        if not await asyncio.shield(asking):
            return False
        await asyncio.sleep(GRACE_S)
        return True


def _warn(transfer: IncomingTransfer, since_s: float) -> None:
    senders = " and ".join(link.hello.address for link in transfer.undrained)
    logger.warning(
        "transfer %s: its %d blocks are out of use since it failed %.0f s ago: %s may still write to them, and does "
        "not answer. They come back when it answers, when its host says that it is gone, or when this process is "
        "restarted.",
        transfer.transfer_id,
        len(transfer.block_ids),
        since_s,
        senders,
    )


async def has_ended(lost: IncomingLink, keys: Keys | None) -> bool:
    """Whether nobody writes over this link any more.

    A frozen process might, so only an answer counts: the sender's host says that nothing listens at its address, or
    whoever listens there says that it is another life, or that it has ended the link.
    """
    alive = await ask_sender(lost, keys)
    return alive is not None and (alive.epoch != lost.hello.epoch or lost.link.key not in alive.writing)


async def ask_sender(lost: IncomingLink, keys: Keys | None) -> Alive | None:
    """Ask whoever is at the address of the link's sender about itself. Returns GONE if the host says that nothing
    listens there, and None if there is no answer."""
    if await nobody_listens(lost.hello.address, ANSWER_TIMEOUT_S):
        return GONE
    try:
        async with RpcClient(lost.hello.address, heartbeat_timeout_s=ANSWER_TIMEOUT_S, keys=keys) as client:
            return await client.call(messages.ALIVE, messages.Nothing(), timeout_s=ANSWER_TIMEOUT_S)
    except HBServeRpcError as error:
        logger.debug("%s does not say what it writes: %s", lost.hello.address, error)
        return None

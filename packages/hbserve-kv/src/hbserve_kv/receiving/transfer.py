"""What comes to this instance: links from senders, and the transfers over them."""

import asyncio
from dataclasses import dataclass, field

from hbserve_kv.memory.heads import HeadRange
from hbserve_kv.memory.memory import Region
from hbserve_kv.protocol.messages import Cancelled, Handshake
from hbserve_kv.protocol.transfer_state import IncomingState, Outcome, State, TransferResult
from hbserve_kv.transports.base import Link, Transport


@dataclass(eq=False)
class IncomingLink:
    """One life of one sender's connection."""

    hello: Handshake
    link: Link
    transport: Transport
    common_heads: HeadRange
    """Heads that this sender and this rank both hold."""
    connecting: asyncio.Task[None]
    is_connected: bool = True
    """The sender's heartbeats come."""
    notices: asyncio.Queue[Cancelled | None] = field(default_factory=asyncio.Queue)
    """For the sender; None closes the link."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    transfers: "set[Incoming]" = field(default_factory=set)
    accepting: "dict[asyncio.Task[None], Incoming]" = field(default_factory=dict)
    """Announced parts that are under way, two-sided transports only."""
    in_order: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the announcement whose parts are being taken."""
    broken: str = ""
    """Why nothing more is taken, although the sender may not have heard it yet; "" while parts are taken."""


@dataclass(eq=False)
class Incoming:
    """One transfer that is expected or under way."""

    transfer_id: str
    region: Region
    block_ids: list[int]
    state: IncomingState
    result: asyncio.Future[TransferResult] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    drained: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing can land any more; or nobody will know, because the receiver was closed before."""
    links: dict[str, IncomingLink] = field(default_factory=dict)
    """Of the senders that have begun, by key; also after they were lost."""
    taking_s: dict[str, float] = field(default_factory=dict)
    """Time during which parts were taken, by link; two-sided transports only."""
    committed: list[TransferResult] = field(default_factory=list)
    """One of each sender that has committed."""

    def settle(self) -> None:
        """Publish what the state has become. To be called after every change of it."""
        if self.state.ended and not self.result.done():
            self.result.set_result(self._result())
        if self.state.state >= State.FAILED_DRAINED:
            self.drained.set()

    def _result(self) -> TransferResult:
        if self.state.state is not State.COMPLETED:
            return TransferResult(self.state.outcome, error=self.state.cause)
        return TransferResult(
            Outcome.COMPLETED,
            self.committed[0].payload,
            sum(each.num_bytes for each in self.committed),
            sum(each.num_parts for each in self.committed),
            max(each.time_s for each in self.committed),
        )

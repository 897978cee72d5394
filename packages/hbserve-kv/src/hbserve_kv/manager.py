"""`KVTransferManager`, which does everything that one instance sends and receives."""

import asyncio
import logging
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec

from hbserve_kv.base import KVTransferBase
from hbserve_kv.config import GOODBYE_TIMEOUT_S, KVTransferConfig
from hbserve_kv.errors import BackendUnavailable, FingerprintMismatch, TransferFailed
from hbserve_kv.memory.layout import HeadRange, checked_blocks
from hbserve_kv.memory.memory import Memory
from hbserve_kv.memory.pool_layout import PoolLayout
from hbserve_kv.protocol.handshake import Identity
from hbserve_kv.protocol.messages import ALIVE, Alive, Begin, Grant, Nothing, checked_id, read_grants
from hbserve_kv.protocol.stats import LinkInfo, TransferStats
from hbserve_kv.protocol.transfer_state import Outcome, TransferResult
from hbserve_kv.receiving.claims import Claim, Senders, SourceRank
from hbserve_kv.receiving.lookup_buffer import LookupBuffer, shape_of, tensor_of
from hbserve_kv.receiving.receiver import Receiver
from hbserve_kv.receiving.transfer import PostedReceive
from hbserve_kv.sending.offers import Offer, Offers, checked_seconds
from hbserve_kv.sending.peers import Peers
from hbserve_kv.sending.to_itself import transfer_to_itself
from hbserve_kv.sending.transfer import SendTransfer, require_loop
from hbserve_kv.transports.base import Transport
from hbserve_kv.transports.registry import make_transports
from hbserve_rpc import RpcServer, parse_address

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class KVTransferManager(KVTransferBase):
    """Manager of all transfers of one instance; under tensor parallelism, of one of its ranks. It belongs to the event
    loop that ran `start`: call every method there. `async with` starts and closes it.

    Engines move blocks of their pool. The receiver calls `post_receive` and passes the grant to the sender; the sender
    calls `open_send` with it, `push`es blocks as they fill, and `commit`s. To move whole tensors instead, use
    `send_kv_cache` and `receive_kv_cache`, in any order; these go through the lookup buffer.
    """

    def __init__(
        self,
        *,
        rank: int,
        pool: "PoolLayout | torch.Tensor | Any",
        fingerprint: Mapping[str, str | int],
        config: KVTransferConfig,
        epoch: str | None = None,
        heads: HeadRange | None = None,
        transport: Transport | None = None,
        name: str = "",
    ) -> None:
        """`pool` is a PoolLayout, or one contiguous tensor (num_blocks, …) whose block i is `pool[i]`. It is on a GPU,
        or on the CPU, where it need not be a torch tensor. It must stay where it is until `close`.

        `fingerprint` says what the bytes mean; both sides must have the same. `heads` are the KV heads that this rank's
        pool (num_blocks, …, heads.count, head_dim) holds under tensor parallelism. `transport` replaces the one that
        `config.backend` names. `name` is a name to which receivers may grant transfers.

        Raises:
            BackendUnavailable: the configured backend, or a library that it needs, is missing.
            BufferTooLarge: there is no memory for `config.buffer_size` bytes.
            ValueError: the pool does not have the right shape, or `config.buffer_size` is negative.
        """
        super().__init__(rank, config.options)
        self.config = config
        self.epoch = epoch or uuid.uuid4().hex
        self._memory = Memory(pool, config.buffer_size, heads)
        self.heads = self._memory.heads
        self.fingerprint = dict(fingerprint)
        self._transports = {each.name: each for each in ([transport] if transport else make_transports(config, rank))}
        peers: dict[str, Any] = {"heartbeat_timeout_s": config.timeout_s, "keys": config.keys, "allows": ["instance"]}
        self._server = RpcServer(config.host, config.port, epoch=self.epoch, **peers)
        self._buffer = LookupBuffer(self._memory, timeout_s=config.timeout_s, expiry_s=config.expiry_s)
        self._me = Identity(rank, self.epoch, self.fingerprint, self.heads, self._memory.layout, name)
        self._receiver = Receiver(self._me, self._memory, self._transports, self._buffer, config)
        self._receiver.serve_on(self._server)
        self._server.serve(ALIVE, self._alive)
        self._peers = self._make_peers(self._transports)
        self._offers = Offers(self._me, self.open_send, config.expiry_s)
        self._offers.serve_on(self._server)
        self._senders = Senders(config.timeout_s, config.keys)
        self._claims: set[Claim] = set()
        self._addresses: dict[int, str] = {}
        self._outgoing: set[SendTransfer] = set()
        """Transfers that this side sends, until their receivers know how they ended."""
        self._sent, self._received, self._failed, self._busy_time_s = 0, 0, 0, 0.0
        self._is_started = False
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def _make_peers(self, transports: Mapping[str, Transport]) -> Peers:
        """Make the set of peers to which this instance sends by these transports."""
        return Peers(self._me, lambda: self.address, transports, self.config.timeout_s, self.config.keys)

    async def start(self) -> None:
        """Bind the control server and make the memory ready.

        Raises:
            AddressInUse, AddressNotAvailable, BackendUnavailable.
            RuntimeError: the manager was started, or closed, before.
        """
        if self._loop is not None or self._closing:
            raise RuntimeError(f"this manager {'is closed' if self._closing else 'was started before'}")
        self._loop = asyncio.get_running_loop()
        started: list[Transport] = []
        try:
            await asyncio.to_thread(self.config.check_host)
            for name, transport in list(self._transports.items()):
                try:
                    await transport.start(self._memory)
                    started.append(transport)
                except BackendUnavailable as error:
                    if len(self._transports) == 1:
                        raise
                    logger.info("kv_transfer.backend=%s: not %s: %s", self.config.backend, name, error)
                    del self._transports[name]
            await self._server.start()
            if self._closing:
                raise RuntimeError("this manager was closed while it started")
            self._is_started = True
        except BaseException:
            await self._server.stop()
            self._loop = None
            for transport in started:
                await transport.close()
            raise

    async def transfer_to_itself(self) -> None:
        """Check each transport: move one block of the pool to another, as between two instances. This leaves no trace:
        no link, no byte in `stats`, and the pool as it was. Call it after `start`, before there are peers.

        Custom backends are left out, because they need not be able to do so: see `Transport.connects_to_itself`.

        Raises:
            BackendUnavailable: a block does not arrive; says by which transport, and why.
        """
        self._require_open("to itself")
        for name, transport in self._transports.items():
            if not transport.connects_to_itself:
                continue
            peers = self._make_peers({name: transport})
            try:
                await transfer_to_itself(peers, self.address, self.epoch, self._memory, self._receiver.expect)
            except (TransferFailed, FingerprintMismatch) as error:
                raise BackendUnavailable(
                    f"kv_transfer.backend={self.config.backend!r}: a transfer to itself by {name} failed: {error}"
                ) from error
            mine = [link for link in self._receiver.links.values() if link.hello.epoch == self.epoch]
            await asyncio.gather(*(link.ended.wait() for link in mine))

    async def close(self) -> None:
        """End every transfer and leave no thread, socket or task behind. May be called twice.

        Peers are told, and have a second or two to answer. If a part is moving to a frozen peer, this waits until the
        transport ends it (mooncake: after `timeout_s`), because the part reads the pool. Cancelling does not stop it.
        """
        if self._closing is None:
            require_loop(self._loop)
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._offers.close()
        await asyncio.gather(*(claim.close() for claim in self._claims))
        await self._senders.close()
        outgoing = list(self._outgoing)
        for transfer in outgoing:
            transfer.state.fail("the sender was closed")
        if outgoing:
            await asyncio.wait([transfer.result for transfer in outgoing], timeout=GOODBYE_TIMEOUT_S)
        # Transfers that still wait for their peer's answer do so only while there is a link to it.
        await self._peers.close()
        await asyncio.gather(*(task for transfer in outgoing for task in transfer.tasks), self._offers.closed())
        await self._receiver.say_goodbye()
        await self._server.stop()
        await self._receiver.close()
        for transport in self._transports.values():
            await transport.close()
        self._memory.release()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def address(self) -> str:
        """`host:port` of the control server, as peers reach it."""
        return self._server.address

    async def _alive(self, _: Nothing) -> Alive:
        """Answer a receiver that has lost its link to this sender: see `receiving/quarantine.py`."""
        return Alive(self.epoch, self._peers.writing())

    # ---- links ahead of transfers --------------------------------------------------------------------------------

    @property
    def endpoint(self) -> bytes:
        """Address at which this rank receives, for a sender's `open_link`. `join_grants` joins those of several."""
        self._require_open("to an endpoint")
        return msgspec.msgpack.encode(Grant("", self.address, self.epoch, self.heads))

    async def open_link(self, endpoint: bytes) -> None:
        """Connect to a receiver before the first transfer, which then need not wait for what is done only once.

        If the receiver has several ranks, this connects to those that want heads of this one. It returns at once if
        they are connected; after a failure, it makes no further attempt for a while.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, or was restarted.
        """
        self._require_open("ahead")
        receivers = [each for each in read_grants(endpoint) if self.heads.common(each.heads)]
        await asyncio.gather(*(self._peers.link_to(each.address, each.epoch) for each in receivers))

    # ---- blocks of the pool --------------------------------------------------------------------------------------

    def post_receive(
        self, transfer_id: str, block_ids: Sequence[int], *, may_be_partial: bool = False, sender: str = ""
    ) -> PostedReceive:
        """Expect one transfer into these blocks of the pool; with no blocks, only its commit. `sender` is the name of
        the only instance that may send it. If that one had connected and is lost before it begins, the transfer fails
        at once, not only after `config.expiry_s`.

        A commit with fewer blocks fails the transfer. With `may_be_partial` it does not; `TransferResult.is_partial` is
        then true, and the caller decides whether the missing blocks are needed.

        Raises:
            ValueError: the id is in use, or a block is outside the pool or appears twice.
        """
        self._require_open(transfer_id)
        blocks = checked_blocks(block_ids, num_blocks := self._memory.layout.num_blocks)
        if len(set(blocks)) != len(blocks):
            raise ValueError(f"block_ids={blocks}: expected distinct ones from 0 to {num_blocks - 1}")
        transfer = self._receiver.expect(transfer_id, "pool", blocks, may_be_partial=may_be_partial, sender=sender)
        transfer.result.add_done_callback(lambda done: self._count_received(done.result()))
        grant = Grant(transfer_id, self.address, self.epoch, self.heads)
        return PostedReceive(transfer, msgspec.msgpack.encode(grant))

    async def open_send(self, transfer_id: str, grant: bytes | Sequence[bytes]) -> SendTransfer:
        """Begin the transfer that `grant` allows. Connects to its receiver if necessary.

        If the receiver has several ranks, `grant` is the grants of all of them, in a list or joined by `join_grants`.
        The ranks that want heads of this one get them: all of these accept the transfer, or none does.

        Raises:
            FingerprintMismatch: the receiver's KV means something else.
            TransferFailed: the receiver is not there, was restarted, or has given up the transfer.
        """
        grants = [each for one in ([grant] if isinstance(grant, bytes) else grant) for each in read_grants(one)]
        # If no grant is for this rank, the first receiver refuses and says which heads each side has.
        mine = [each for each in grants if self.heads.common(each.heads)] or grants[:1]
        return await self._open(Begin(transfer_id, link=""), [(each.address, each.epoch) for each in mine])

    def concerns(self, grant: bytes) -> bool:
        """Whether this rank holds heads that the grant is for; not every pair of ranks has heads in common."""
        return any(self.heads.common(each.heads) for each in read_grants(grant))

    def _require_open(self, transfer_id: str) -> None:
        require_loop(self._loop)
        if self._closing:
            raise TransferFailed(f"transfer {transfer_id}: this manager is closed")
        if not self._is_started:
            raise RuntimeError(f"transfer {transfer_id}: this manager is not started")
        checked_id(transfer_id)

    async def _open(self, begin: Begin, receivers: Sequence[tuple[str, str]]) -> SendTransfer:
        self._require_open(begin.transfer_id)
        if not receivers:
            raise TransferFailed(f"transfer {begin.transfer_id}: its grant names no receiver")
        transfer = SendTransfer(begin, self._memory, self._peers, receivers)
        self._outgoing.add(transfer)
        asyncio.gather(*transfer.tasks).add_done_callback(lambda _: self._outgoing.discard(transfer))
        await transfer.open()
        transfer.result.add_done_callback(lambda done: self._count_sent(done.result()))
        return transfer

    # ---- blocks that the receiver fetches ------------------------------------------------------------------------

    def offer(self, transfer_id: str, *, lease_s: float = 30.0) -> Offer:
        """Offer a transfer whose receiver is not known yet: `push` its blocks, and `commit`.

        After the commit, the offer waits `lease_s` for a receiver that claims it, and `config.expiry_s` for one that
        has claimed it to have room. The engine has to pass on what a claim needs: the id, `address` and `epoch`.

        Raises:
            ValueError: the id is in use.
        """
        self._require_open(transfer_id)
        return self._offers.make(transfer_id, checked_seconds("lease_s", lease_s))

    def claim(self, transfer_id: str, address: str | Sequence[SourceRank], epoch: str = "") -> Claim:
        """Claim what the manager at `address` offers under this id, so that it is kept there until it is fetched.

        If the sender has several ranks, `address` lists those that have heads of this one, each head once.

        With an `epoch`, that life of the manager must offer it, now or in a moment. Without one, it may be offered at
        any time within the manager's `expiry_s`.
        """
        self._require_open(transfer_id)
        sources = [SourceRank(address, epoch)] if isinstance(address, str) else address
        claim = Claim(transfer_id, sources, self.heads, self._senders, self.post_receive)
        self._claims.add(claim)
        claim.task.add_done_callback(lambda _: self._claims.discard(claim))
        return claim

    # ---- whole tensors -------------------------------------------------------------------------------------------

    def add_peer(self, rank: int, address: str) -> None:
        """Note the address of a rank's manager, which is needed to send to it by rank. Raises InvalidAddress, which is
        a ValueError."""
        parse_address(address)
        self._addresses[rank] = address

    async def send_kv_cache(self, request_id: str, kv_buffer: "torch.Tensor", target_rank: int) -> None:
        """Send a tensor of any shape to the lookup buffer of `target_rank`. Waits for room there.

        Raises:
            TransferFailed: the peer is unknown, is lost, or does not have room in time.
            BufferTooSmall: the tensor is larger than this side's lookup buffer.
        """
        if target_rank not in self._addresses:
            raise TransferFailed(f"rank {target_rank} is unknown; add_peer({target_rank}, address) first")
        import torch

        self._require_open(request_id)
        flat = kv_buffer.contiguous().view(-1).view(torch.uint8)
        block_ids = await self._buffer.place(request_id, flat.numel())
        try:
            arena = self._memory.arena
            for block_id, piece in zip(block_ids, torch.split(flat, self._memory.block_bytes), strict=False):
                arena[block_id, : piece.numel()].copy_(piece)
            transfer = await self._open(Begin(request_id, "", flat.numel()), [(self._addresses[target_rank], "")])
            transfer.push(block_ids, 0)
            result = await transfer.commit_and_drain(shape_of(kv_buffer))
        finally:
            await self._buffer.free(block_ids)
        if result.outcome is not Outcome.COMPLETED:
            raise TransferFailed(f"{request_id}: {result.error}")

    async def receive_kv_cache(self, request_id: str, source_rank: int) -> "torch.Tensor":
        """Return the tensor that was sent under this id: from the lookup buffer if it is there, else when it arrives.

        Raises:
            TransferTimeout: nothing arrived before the deadline.
            TransferFailed: the sender failed or describes it wrongly, or another call already waits for this id.
        """
        self._require_open(request_id)
        block_ids, result = await self._buffer.take(request_id)
        try:
            blocks = self._memory.arena[block_ids]
        finally:
            await self._buffer.free(block_ids)
        return tensor_of(request_id, result.payload, blocks)

    # ---- figures -------------------------------------------------------------------------------------------------

    def _count_sent(self, result: TransferResult) -> None:
        self._sent += result.num_bytes
        self._count_ended(result)

    def _count_received(self, result: TransferResult) -> None:
        self._received += result.num_bytes
        self._count_ended(result)

    def _count_ended(self, result: TransferResult) -> None:
        self._busy_time_s += result.time_s
        self._failed += result.outcome is not Outcome.COMPLETED

    def stats(self) -> TransferStats:
        return TransferStats(
            active_transfers=len(self._receiver.transfers) + sum(not each.result.done() for each in self._outgoing),
            num_offers=len(self._offers.offers),
            buffered_bytes=self._memory.buffered_bytes,
            num_quarantined=len(self._receiver.quarantine),
            quarantined_blocks=self._receiver.quarantine.num_blocks,
            num_failed=self._failed,
            bytes_sent=self._sent,
            bytes_received=self._received,
            busy_time_s=self._busy_time_s,
            dropped_messages=self._receiver.dropped_messages + self._offers.dropped_messages,
            **msgspec.structs.asdict(self._server.faults),
        )

    def links(self) -> list[LinkInfo]:
        """Return what carries the bytes to and from each connected peer."""
        to = [(each.link, each.transport) for each in self._peers.links.values()]
        of = [(each.link, each.transport) for each in self._receiver.links.values()]
        return [LinkInfo(link.peer_rank, link.is_sender, by.name, link.summary) for link, by in [*to, *of]]

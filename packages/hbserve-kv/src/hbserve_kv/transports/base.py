"""The interface of transports, by which backends differ: they move bytes between instances that know which blocks."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from queue import SimpleQueue
from threading import Thread
from traceback import clear_frames
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from hbserve_kv.memory.layout import CopyPlan, Side, agreement
from hbserve_kv.memory.memory import Memory, Region, Rows

T = TypeVar("T")

MAX_VALUES, MAX_BYTES = 64, 1 << 20
"""Limits of one link's rendezvous; a group of two ranks needs two values of a few hundred bytes."""

logger = logging.getLogger(__name__)


class Rendezvous(Protocol):
    """Named values that the two ends of a link exchange while they connect, as either end sees them. Belongs to the
    manager's event loop.

    The receiver keeps them; the sender reaches them over the RPC connection that carries the link. So a process group
    needs no store with a port of its own. Torch's TCPStore binds every interface, and looks up the peer's name whenever
    it is connected to: a name server that drops the query then costs five seconds.
    """

    async def set(self, name: str, value: bytes) -> None: ...

    async def get(self, name: str) -> bytes:
        """Wait until either end has set it. Raises ConnectionError, or what the connection to the receiver does."""
        ...


class HeldRendezvous:
    """A Rendezvous at the receiver, which keeps the values."""

    def __init__(self) -> None:
        self._values: dict[str, asyncio.Future[bytes]] = {}
        self._ended = False

    async def set(self, name: str, value: bytes) -> None:
        """Raises ValueError: it is set already, or too long."""
        if len(value) > MAX_BYTES or self._value(name).done():
            raise ValueError(f"{name}: {len(value)} bytes, of at most {MAX_BYTES} that may be set once")
        self._value(name).set_result(value)

    async def get(self, name: str) -> bytes:
        return await asyncio.shield(self._value(name))

    def _value(self, name: str) -> asyncio.Future[bytes]:
        if self._ended:
            raise ConnectionError("the link has ended")
        if name not in self._values:
            if len(self._values) == MAX_VALUES:
                raise ValueError(f"{name}: there are {MAX_VALUES} values already")
            self._values[name] = asyncio.get_running_loop().create_future()
        return self._values[name]

    def end(self) -> None:
        """Fail whoever waits for a value."""
        self._ended = True
        for value in self._values.values():
            if not value.done():
                value.set_exception(ConnectionError("the link has ended"))
                value.exception()  # or asyncio complains if nobody waits
        self._values.clear()


class LinkValues:
    """A link's rendezvous as the store of a process group, for the thread that makes the group: see `nccl.link_store`.

    Made in the event loop, and kept by whoever uses the group: torch itself keeps only the C++ half of it.
    """

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        self._rendezvous = rendezvous
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.published: list[bytes] = []
        """What this side has set."""

    def set(self, name: str, value: bytes) -> None:
        self.published.append(bytes(value))
        self._run(self._rendezvous.set(name, bytes(value)), self._timeout_s)

    def get(self, name: str) -> bytes:
        return self._run(self._rendezvous.get(name), self._timeout_s)

    def wait(self, names: Sequence[str], timeout: timedelta | None = None) -> None:
        for name in names:
            self._run(self._rendezvous.get(name), timeout.total_seconds() if timeout else self._timeout_s)

    def check(self, names: Sequence[str]) -> bool:
        """NCCL's watchdog asks each second whether some rank wants a dump; none does."""
        return False

    def _run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        if self._loop.is_closed():
            work.close()
            raise ConnectionError("the event loop of this link has ended")

        async def bounded() -> T:
            async with asyncio.timeout(timeout_s):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()


@dataclass(eq=False)
class Link:
    """One direction between two instances, during one life of both. Parts go over it one after another."""

    key: str
    """Name of the link on both sides. It is never reused, so that a new life of a peer gets a new link."""
    is_sender: bool
    peer_rank: int
    peer_description: bytes
    """The peer's `Transport.describe()`; on the sender, what the receiver's `admit` returned."""
    mine: Side
    """What of this side's blocks goes over the link, in units of the smaller of both sides' blocks."""
    peer: Side
    """The same units, as they lie in the peer's memory."""
    rendezvous: Rendezvous = field(default_factory=HeldRendezvous)
    """Values that the two ends exchange while they connect."""
    detail: str = ""
    """Description, for people, of what really carries the bytes. Set by `connect`."""
    executor: ThreadPoolExecutor = field(init=False)
    """The link's thread, which runs its blocking I/O, so that a peer that hangs blocks nobody else."""
    _plans: dict[tuple[object, ...], Any] = field(init=False, default_factory=dict)
    _is_given_up: bool = field(init=False, default=False)
    _waited: "SimpleQueue[Exception | None]" = field(init=False, default_factory=SimpleQueue)
    """Results of the waits of `each`: None for a wait that has succeeded, else its error."""

    def __post_init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"kv-{self.key[:8]}")

    @cached_property
    def _agreed(self) -> str:
        return agreement(self.mine, self.peer)

    @property
    def summary(self) -> str:
        """Description of the link: `detail`, and how the two sides bridge differences between their pools."""
        return "; ".join(filter(None, (self.detail, self._agreed)))

    def rows(self, memory: Memory, region: Region, layers: range | None = None) -> Rows:
        """Return this side's units as rows of bytes, for transports that cannot write to the peer's layout directly."""
        key = region, layers
        if key not in self._plans:
            self._plans[key] = Rows(memory, memory.side(self.mine, region, layers), region)
        found: Rows = self._plans[key]
        return found

    def plan(self, memory: Memory, part: "Part", target_addresses: Sequence[int]) -> CopyPlan:
        """Return the plan for copying units to the peer, whose target region has its extents at these addresses."""
        key = part.region, part.target_region, part.layers
        if key not in self._plans:
            target = self.peer.of_layers(part.layers) if part.target_region == "pool" else self.peer.in_rows(0)
            source = memory.side(self.mine, part.region, part.layers)
            self._plans[key] = CopyPlan(source, memory.addresses[part.region], target, target_addresses)
        found: CopyPlan = self._plans[key]
        return found

    def each(self, waits: Sequence[Callable[[], Any]]) -> Iterator[None]:
        """Have a daemon thread call these functions one after another, and yield after each, in the link's thread.
        Raises what one raises, or ConnectionError once the link is given up; the daemon thread may then still wait."""
        waited = self._waited = SimpleQueue()
        if self._is_given_up:
            self.give_up()
        Thread(target=_wait_for_each, args=[waits, waited], name="kv-wait", daemon=True).start()
        for _ in waits:
            if (error := waited.get()) is not None:
                raise error
            yield

    def give_up(self) -> None:
        """End the waits of `each`. May be called twice."""
        self._is_given_up = True
        self._waited.put(ConnectionError("the link is closed"))

    async def idle(self) -> None:
        """Wait until the link's thread has nothing to do."""
        await self.run(lambda: None)

    async def run(self, blocking: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the link's thread. A cancelled caller still waits until the function has returned."""
        # The future of run_in_executor could be cancelled, and a shield around it would cost a turn of the loop.
        future, finished = self.executor.submit(blocking, *arguments), asyncio.Event()
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(finished.set))
        try:
            await finished.wait()
        except asyncio.CancelledError:
            # Bytes may move until the thread returns, and whoever cancels must know when they have stopped.
            await finished.wait()
            if (error := future.exception()) is not None:
                logger.debug("a cancelled operation of link %s failed: %s", self.key[:8], error)
            raise
        return future.result()


@dataclass(frozen=True)
class Part:
    """Some blocks of one transfer, in units of its link. `block_ids` are this side's, and `target_block_ids` the
    receiver's, which both sides know."""

    transfer_id: str
    index: int
    region: Region
    """The region of `block_ids`."""
    block_ids: list[int]
    target_region: Region = "pool"
    target_block_ids: list[int] = field(default_factory=list)
    ready: Any = None
    """CUDA event after which the source blocks may be read; None on the CPU. It has happened when the part is pushed,
    unless the transport `waits_on_device`."""
    layers: range | None = None
    """Layers of the blocks that the part has; None: all."""

    def require_targets_below(self, num_blocks: int) -> None:
        """Raise ValueError if the peer has named a block that it does not have: the write would go elsewhere."""
        if max(self.target_block_ids) >= num_blocks:
            raise ValueError(f"target_block_ids={self.target_block_ids}: the peer has {num_blocks} blocks")


Moving = asyncio.Future[float] | None
"""The end of a part that a device moves by itself: a future of the seconds that it took. None: it has moved already."""


class Deadline(Generic[T]):
    """Deadline for items that are under way on a link, in order. Calls `late` with the first of them if it has taken
    longer than `timeout_s` since it began, or since the one before it ended."""

    def __init__(self, timeout_s: float, late: Callable[[T], None]) -> None:
        self._timeout_s = timeout_s
        self._late = late
        self._under_way: list[T] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._under_way)

    def begin(self, part: T) -> None:
        self._under_way.append(part)
        if len(self) == 1:
            self._restart()

    def end(self, part: T) -> None:
        was_first = part is self._under_way[0]
        self._under_way.remove(part)
        if was_first:
            self._restart()

    def _restart(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._under_way:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._late, self._under_way[0])


class Transport(ABC):
    """Moves the blocks of parts over links. All methods run in the manager's event loop and must not block it.

    A link's parts are pushed one after another, in the same order on both sides. Those of one transfer are pushed in
    the order in which they were queued. If a part fails, and the transport is two-sided or raised DrainUnknown, the
    link is disconnected and never used again.
    """

    name: ClassVar[str]
    one_sided: ClassVar[bool]
    """Whether `push` writes into the peer's memory without its help, so that `accept` is never called."""
    waits_on_device = False
    """Whether `push` may be called before the part is ready, which is for one-sided transports only. The device then
    waits by itself until the part is ready, and no other part waits because of it."""
    connects_to_itself = False
    """Whether both ends of a link may be this transport, over one memory. An instance tries that before it is ready."""
    max_part_bytes = 64 << 20
    """Size of the parts into which larger pushes are cut, in bytes. It bounds the staging memory of two-sided
    transports, and what still moves after a transfer was given up."""

    @abstractmethod
    async def start(self, memory: Memory) -> None:
        """Prepare to send from and receive into `memory`. If it fails or is cancelled, nothing of it may be left.

        Raises:
            BackendUnavailable: a library or device is missing.
        """

    @abstractmethod
    def describe(self) -> bytes:
        """Return what a peer's `unreachable` needs, and its `connect` too unless `admit` returns something else."""

    def unreachable(self, description: bytes) -> str:
        """Return why this transport cannot reach the peer with this `describe()`; "" if it can, as far as is known."""
        return ""

    @abstractmethod
    async def connect(self, link: Link) -> None:
        """Make the link usable. Called on the sender; with two-sided transports on both sides at the same time."""

    @abstractmethod
    async def push(self, link: Link, part: Part) -> Moving:
        """Move a part, on the sender. It has moved when its source blocks are no longer read and, if one-sided, its
        bytes have landed. Returns then or, if a device moves it, as soon as the next part may be pushed behind it.

        If two-sided, this is cancelled, and `disconnect` called, when the receiver does not take the part.

        Raises:
            Exception: the part has failed, and nothing of it is read or lands any more; `DrainUnknown` if it still may.
        """

    async def accept(self, link: Link, part: Part) -> Moving:
        """Take a part into `part.block_ids`, on the receiver, with two-sided transports only. However it ends, nothing
        lands afterwards. Like `push`, it may return before the part has landed.

        This is cancelled, and `disconnect` called, when nothing arrives in time or the link is lost.
        """
        raise NotImplementedError(f"{self.name} is one-sided")

    async def admit(self, link: Link) -> bytes:
        """Prepare for what arrives over the link, on the receiver. Returns what the sender's `connect` needs."""
        return self.describe()

    async def revoke(self, link: Link) -> set[str]:
        """Take from the sender its means to write, whatever it says or does. For the receiver, if one-sided.

        Returns the keys of the links over which nothing lands any more, buffered or not: this one, and others that
        shared its means. Empty, as here, if that is impossible: then the receiver asks the sender, and waits for it.
        """
        return set()

    @abstractmethod
    async def disconnect(self, link: Link) -> None:
        """Forget the link. Returns once this side neither reads nor writes anything for it: what waits on the link
        fails soon, and what a device moves ends, whether or not it arrived.

        May be called twice, and for a link that was never connected. May take long; callers wait in the background.
        """

    @abstractmethod
    async def close(self) -> None:
        """End what is left of the transport, so that nothing stays behind. Not called if `start` has failed."""


class DrainUnknown(Exception):
    """Raised when a push failed and bytes may still be read or land, until `disconnect` has returned."""


def _wait_for_each(waits: Sequence[Callable[[], Any]], waited: "SimpleQueue[Exception | None]") -> None:
    try:
        for wait in waits:
            wait()
            waited.put(None)
    except Exception as error:
        waited.put(error)


async def abandonable(blocking: Callable[..., T], *arguments: Any, end: Callable[[T], Any] | None = None) -> T:
    """Run in a daemon thread of its own, for which a cancelled caller does not wait. What it returns after that is
    given to `end`, in another such thread.

    Gloo and NCCL wait for a frozen peer until their timeout, and no call ends that wait. It touches no block meanwhile.
    """
    outcome: Future[T] = Future()
    outcome.set_running_or_notify_cancel()  # from now on it takes a result, whether or not anybody waits for it

    def run() -> None:
        try:
            outcome.set_result(blocking(*arguments))
        except BaseException as error:
            clear_frames(error.__traceback__)  # Gloo's sockets are in one, and would last as long as the error does
            outcome.set_exception(error)

    def end_it(made: Future[T]) -> None:
        if end is not None and result.cancelled() and made.exception() is None:
            Thread(target=end, args=[made.result()], daemon=True).start()

    Thread(target=run, name="kv-link", daemon=True).start()
    result = asyncio.wrap_future(outcome)
    result.add_done_callback(lambda _: outcome.add_done_callback(end_it))
    return await result


async def disconnect(transport: Transport, link: Link) -> None:
    """Disconnect a link from its transport, and end its thread. Errors are logged, because there is nobody to tell."""
    try:
        await transport.disconnect(link)
    except Exception:
        logger.exception("disconnecting a link of %s failed", transport.name)
    link.executor.shutdown(wait=False)

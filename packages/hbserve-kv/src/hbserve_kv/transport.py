"""How bytes move between two instances, once both know which blocks: the part in which backends differ."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from hbserve_kv.memory import Memory, Region

T = TypeVar("T")


@dataclass(eq=False)
class Link:
    """One direction between two lives of two instances: parts go over it one after the other.

    It is never repaired. After any failure it is torn down, and the pair makes a new one.
    """

    key: str
    """Names the pair on both sides, and with it both epochs: a new life of a peer gets a new link."""
    is_sender: bool
    peer_rank: int = -1
    peer_description: bytes = b""
    """The peer's `Transport.describe(link)`."""
    jobs: set[asyncio.Task[Any]] = field(default_factory=set)
    """What is going on over this link."""
    executor: ThreadPoolExecutor = field(init=False)
    """Where blocking I/O of this link runs: a peer that hangs stops nobody else."""

    def __post_init__(self) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix=f"kv-{self.key[:8]}")

    def start(self, job: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a job that ends with the link."""
        task = asyncio.create_task(job)
        self.jobs.add(task)
        task.add_done_callback(self.jobs.discard)
        return task

    async def run(self, blocking: Callable[..., T], *arguments: Any) -> T:
        """Run in the link's thread. Cancelling the caller does not stop the thread: it waits for it."""
        future = asyncio.get_running_loop().run_in_executor(self.executor, blocking, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Bytes may move until the thread returns, and whoever cancels must know when they have stopped.
            await asyncio.wait([future])
            raise


@dataclass(frozen=True)
class Part:
    """Some blocks of one transfer. `block_ids` are of the side that uses this part, `target_*` of the receiver."""

    transfer_id: str
    index: int
    region: Region
    block_ids: list[int]
    target_region: Region = "pool"
    target_block_ids: list[int] = field(default_factory=list)
    ready: Any = None
    """CUDA event after which the source blocks may be read; None on the CPU."""

    @property
    def message_id(self) -> str:
        return f"{self.transfer_id}:{self.index}"


class Transport(ABC):
    """Moves the blocks of parts over links. All methods run in the manager's event loop."""

    name: ClassVar[str]
    one_sided: ClassVar[bool]
    """True: `push` writes into the peer's memory without its help, and `accept` is never called."""

    @abstractmethod
    async def start(self, memory: Memory) -> None:
        """Make `memory` ready to send from and receive into.

        Raises:
            BackendUnavailable: a library or device is missing.
        """

    @abstractmethod
    async def describe(self, link: Link) -> bytes:
        """This end of a new link: what the peer's `connect` needs. `link.peer_description` is known to receivers only."""

    @abstractmethod
    async def connect(self, link: Link) -> None:
        """Make the link usable. Called on the sender, and for two-sided transports on both sides at the same time."""

    @abstractmethod
    async def push(self, link: Link, part: Part) -> None:
        """Sender: move a part. Returns when it has landed, or (two-sided) its source blocks are no longer read.

        Raises:
            Exception: the part has failed. The caller tears the link down, on both sides.
        """

    async def accept(self, link: Link, part: Part) -> None:
        """Receiver, two-sided only: take a part into `part.block_ids`. However it ends, nothing lands afterwards."""
        raise NotImplementedError(f"{self.name} is one-sided")

    @abstractmethod
    async def disconnect(self, link: Link) -> None:
        """End this side of the link, whatever the peer does; what waits on it fails soon.

        After it has returned, and `push` and `accept` have, this side's memory is neither read nor written through the
        link any more. This is what makes the blocks of a failed transfer reusable, so it must be certain.
        """

    @abstractmethod
    async def close(self) -> None:
        """Leave nothing behind. Every link has been disconnected before."""


async def tear_down(transport: Transport, link: Link) -> None:
    """End a link. Returns when nothing moves over it any more: as late as the transport's own timeouts let it.

    Raises:
        Exception: what `disconnect` raised. Then it is not known whether something still moves.
    """
    for job in link.jobs:
        job.cancel()
    try:
        await transport.disconnect(link)
        if link.jobs:
            await asyncio.wait(set(link.jobs))
    finally:
        link.executor.shutdown(wait=False)

"""A modelled instance: answers a scheduler as hbserve_core's GpuInstance does, and computes nothing.

Its handlers are those of the RPC methods, so that it can stand behind an RpcServer too.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hbserve.simulator.engine import DecodeWork, EngineLimits, ModelledEngine, PromptWork
from hbserve.simulator.prefix_cache import PrefixCache
from hbserve.simulator.profile import Profile, StepLaw
from hbserve_rpc.messages import (
    ConnectRequest,
    DecodeRequest,
    Empty,
    FinishReason,
    GenerateRequest,
    Granted,
    GrantRequest,
    InstanceInfo,
    InstanceStats,
    PrefillRequest,
    Role,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.reports import InstanceReport, ReportsRequest

T = TypeVar("T")

BLOCK_SIZE = 16
SPARE_PART = 20
"""One token of the pool in so many stays free when a request is let in: those that decode grow."""
LONGEST = 1 << 20
VOCAB_SIZE = 1 << 17
TOKEN = 5
ZEROS = [TOKEN] * 4096


@dataclass(frozen=True)
class Shape:
    """What is known of a prompt beside its length."""

    hash_ids: tuple[int, ...] = ()
    """One for each full block of `block_size` tokens, of that block and all before it."""
    block_size: int = 512


@dataclass
class Fabric:
    """What the instances of a simulation have in common."""

    shape_of: Callable[[str], Shape]
    """By a request's id at its instances."""
    reservations: "dict[str, Reservation]"
    """By transfer."""
    prefix_tokens: int = 0
    """Prompt tokens that were found in prefix caches, and all that were asked for."""
    asked_tokens: int = 0


class Mailbox(Generic[T]):
    """Items on their way to one reader."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._waiting: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        self._items.append(item)
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def get(self) -> T:
        while not self._items:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return self._items.popleft()


class Reservation:
    """Room on a decode instance for one request."""

    def __init__(self, num_tokens: int, num_choices: int) -> None:
        self.num_tokens = num_tokens
        self.num_choices = num_choices
        self.cached_tokens = 0
        self.mail: Mailbox[str] = Mailbox()
        """What has happened: "room", then "kv"."""


class ModelledInstance:
    """Belongs to one event loop, whose time it takes."""

    def __init__(self, instance_id: str, role: Role, profile: Profile, limits: EngineLimits, fabric: Fabric) -> None:
        self.instance_id = instance_id
        self.role: Role = role
        self.epoch = uuid.uuid4().hex
        self.profile = profile
        self.law = StepLaw(profile)
        self.engine = ModelledEngine(self.law, limits)
        self._fabric = fabric
        self._loop = asyncio.get_running_loop()
        self._cache: PrefixCache | None = None
        self._used_tokens = 0
        """Of requests that were let in, without what they have grown by since."""
        self._num_active = 0
        self._waiting: deque[Reservation] = deque()
        self._granted: dict[str, asyncio.Future[bool]] = {}
        self._link_free_s = 0.0

    # ---- calls -------------------------------------------------------------------------------------------------------

    async def describe(self, _: Empty) -> InstanceInfo:
        return InstanceInfo(
            self.instance_id,
            self.role,
            self.epoch,
            "ready",
            max_model_len=LONGEST,
            max_num_seqs=self.engine.limits.max_num_seqs,
            max_prompt_len=LONGEST,
            vocab_size=VOCAB_SIZE,
            block_size=BLOCK_SIZE,
            num_blocks=self.profile.kv_tokens // BLOCK_SIZE,
            kv_endpoint=self.instance_id.encode() if self.role == "decode" else b"",
        )

    async def stats(self, _: Empty) -> InstanceStats:
        free = max(0, self.profile.kv_tokens - self._used_tokens) // BLOCK_SIZE
        return InstanceStats(
            self.instance_id,
            self.role,
            "ready",
            self.epoch,
            active_requests=self._num_active,
            waiting_requests=len(self._waiting),
            running_requests=self.engine.batch,
            num_blocks=self.profile.kv_tokens // BLOCK_SIZE,
            free_blocks=free,
        )

    async def connect(self, _: ConnectRequest) -> Empty:
        return Empty()

    async def grant(self, request: GrantRequest) -> None:
        future = self._granted.get(request.request_id)
        if future is not None and not future.done():
            future.set_result(bool(request.grant))

    # ---- streams -----------------------------------------------------------------------------------------------------

    async def reports(self, request: ReportsRequest) -> AsyncIterator[InstanceInfo | InstanceReport]:
        """What it is, and its figures whenever they are others."""
        yield await self.describe(Empty())
        report: InstanceReport | None = None
        while True:
            if report != (report := InstanceReport(await self.stats(Empty()))):
                yield report
            await asyncio.sleep(request.interval_s)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Both phases here."""
        count = len(request.prompt_token_ids) + len(request.output_token_ids)
        mail: Mailbox[TokenEvent] = Mailbox()
        first = len(request.output_token_ids)
        last = request.params.max_tokens
        room = Reservation(count, request.params.n)
        work: list[PromptWork | DecodeWork] = []

        def prompt_is_done() -> None:
            self._tell(mail, first, 1, last)
            if last > first + 1:
                work.append(self._decode_work(mail, count, first + 1, last))
                self.engine.add_decode(work[-1])  # type: ignore[arg-type]  # it is one
            self._remember(request.request_id)

        self._let_in(room)
        try:
            await room.mail.get()
            work.append(PromptWork(count, self._cached(request.request_id, count), None, prompt_is_done))
            self.engine.add_prompt(work[-1])  # type: ignore[arg-type]  # it is one
            while True:
                event = await mail.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            for each in work:
                self.engine.remove(each)
            self._let_out(room)

    async def decode(self, request: DecodeRequest) -> AsyncIterator[Granted | TokenEvent]:
        """Reserve room, wait for KV and decode."""
        count = len(request.prompt_token_ids) + len(request.output_token_ids)
        first = len(request.output_token_ids) + 1
        mail: Mailbox[TokenEvent] = Mailbox()
        work: DecodeWork | None = None
        room = self._fabric.reservations[request.transfer_id] = Reservation(count, request.params.n)
        self._let_in(room)
        try:
            await room.mail.get()
            room.cached_tokens = self._cached(request.request_id, count, counts=False)
            yield Granted(request.transfer_id.encode(), room.cached_tokens)
            await room.mail.get()
            work = self._decode_work(mail, count, first, request.params.max_tokens)
            self.engine.add_decode(work)
            while True:
                event = await mail.get()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if work is not None:
                self.engine.remove(work)
            self._remember(request.request_id)
            del self._fabric.reservations[request.transfer_id]
            self._let_out(room)

    async def prefill(self, request: PrefillRequest) -> AsyncIterator[TokenEvent | TransferDone]:
        """Compute a prompt, and move its KV as it is computed."""
        count = len(request.prompt_token_ids) + len(request.output_token_ids)
        first = len(request.output_token_ids)
        granted = self._granted[request.request_id] = self._loop.create_future()
        if not request.grant_follows:
            granted.set_result(bool(request.grant))
        computed: Mailbox[None] = Mailbox()
        work = PromptWork(count, self._cached(request.request_id, count), None, lambda: computed.put(None))
        pushing = _Pushing(self, work, granted, request.transfer_id)
        work.on_chunk = pushing.push
        self._num_active += 1
        self.engine.add_prompt(work)
        try:
            await computed.get()
            self._remember(request.request_id)
            was_granted = granted.done()
            moves = await granted
            moved_s = pushing.push()
            # Who waits for room waits for its first token, and not between that and the second.
            await self._pass(self.profile.message_s if was_granted else max(0.0, moved_s - self._loop.time()))
            yield _tokens(first, 1, request.params.max_tokens)
            if moves and request.params.max_tokens > first + 1:
                await self._pass(max(0.0, moved_s - self._loop.time()))
                yield TransferDone(pushing.num_bytes, pushing.num_parts, pushing.time_s)
        finally:
            self.engine.remove(work)
            self._num_active -= 1
            del self._granted[request.request_id]

    async def _pass(self, time_s: float) -> None:
        if time_s > 0:
            await asyncio.sleep(time_s)

    # ---- what they need ----------------------------------------------------------------------------------------------

    def _decode_work(self, mail: Mailbox[TokenEvent], context: int, first: int, last: int) -> DecodeWork:
        told = 0

        def is_first() -> None:
            nonlocal told
            told = 1
            self._tell(mail, first, 1, last)

        def is_done() -> None:
            self._tell(mail, first + told, last - first - told, last)

        return DecodeWork(context, last - first, is_first, is_done)

    def _tell(self, mail: Mailbox[TokenEvent], index: int, count: int, last: int) -> None:
        if count > 0:
            self._loop.call_later(self.profile.message_s, mail.put, _tokens(index, count, last))

    def _let_in(self, room: Reservation) -> None:
        self._num_active += room.num_choices
        self._waiting.append(room)
        self._look()

    def _let_out(self, room: Reservation) -> None:
        self._num_active -= room.num_choices
        if room in self._waiting:
            self._waiting.remove(room)
        else:
            self._used_tokens -= room.num_tokens
        self._look()

    def _look(self) -> None:
        """Give room to those that wait, in order."""
        most = self.profile.kv_tokens - self.profile.kv_tokens // SPARE_PART
        limits, inside = self.engine.limits, self._num_active - sum(each.num_choices for each in self._waiting)
        while self._waiting:
            room = self._waiting[0]
            is_alone = inside == 0
            if not is_alone and (
                self._used_tokens + room.num_tokens > most or inside + room.num_choices > limits.max_num_seqs
            ):
                return
            self._waiting.popleft()
            self._used_tokens += room.num_tokens
            inside += room.num_choices
            self._loop.call_later(2 * self.profile.message_s, room.mail.put, "room")

    def _blocks(self, block_size: int) -> PrefixCache:
        if self._cache is None:
            self._cache = PrefixCache(self.profile.kv_tokens // block_size)
        return self._cache

    def _cached(self, request_id: str, count: int, *, counts: bool = True) -> int:
        """Tokens of a prompt that need not be computed, or moved: never all, for the last one gives the next."""
        shape = self._fabric.shape_of(request_id)
        found = 0
        if shape.hash_ids:
            found = min(count - 1, self._blocks(shape.block_size).find(shape.hash_ids) * shape.block_size)
        if counts:
            self._fabric.prefix_tokens += found
            self._fabric.asked_tokens += count
        return found

    def _remember(self, request_id: str) -> None:
        shape = self._fabric.shape_of(request_id)
        if shape.hash_ids:
            self._blocks(shape.block_size).add(shape.hash_ids)

    def move(self, num_bytes: int) -> tuple[float, float]:
        """Begin and end of a copy that begins when those before it have ended."""
        begin_s = max(self._link_free_s, self._loop.time())
        self._link_free_s = begin_s + self.law.transfer_s(num_bytes)
        return begin_s, self._link_free_s

    def kv_is_there(self, transfer_id: str, at_s: float) -> None:
        reservation = self._fabric.reservations.get(transfer_id)
        if reservation is not None:
            self._loop.call_at(at_s, reservation.mail.put, "kv")


class _Pushing:
    """KV of one prompt on its way: each chunk as it is computed, once there is a grant."""

    def __init__(
        self, instance: ModelledInstance, work: PromptWork, granted: "asyncio.Future[bool]", transfer_id: str
    ) -> None:
        self._instance = instance
        self._work = work
        self._granted = granted
        self._transfer_id = transfer_id
        self._pushed: int | None = None
        self.num_bytes = self.num_parts = 0
        self.time_s = 0.0

    def push(self) -> float:
        """Hand over what is computed; returns when it will be there."""
        instance = self._instance
        now_s = instance._loop.time()
        if not self._granted.done() or not self._granted.result():
            return now_s
        if self._pushed is None:
            reservation = instance._fabric.reservations.get(self._transfer_id)
            self._pushed = reservation.cached_tokens if reservation is not None else 0
        num_bytes = max(0, self._work.done - self._pushed) * instance.profile.kv_bytes_per_token
        self._pushed = max(self._pushed, self._work.done)
        begin_s, end_s = instance.move(num_bytes) if num_bytes else (now_s, now_s)
        self.num_bytes += num_bytes
        self.num_parts += 1
        self.time_s += end_s - begin_s
        end_s += instance.profile.handoff_s
        if self._work.done == self._work.num_tokens:
            instance.kv_is_there(self._transfer_id, end_s)
        return end_s


def _tokens(index: int, count: int, last: int) -> TokenEvent:
    ends: FinishReason | None = "length" if index + count >= last else None
    return TokenEvent(index, ZEROS[:count] if count <= len(ZEROS) else [TOKEN] * count, ends)

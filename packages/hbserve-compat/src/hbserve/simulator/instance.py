"""A modelled instance: answers a scheduler as hbserve_core's GpuInstance does, and computes nothing."""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from hbserve.simulator.engine import ModelledEngine
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.prefix_cache import PrefixCache
from hbserve.simulator.profile import StepLaw
from hbserve_rpc.messages import GrantRequest, InstanceInfo, InstanceStats, Role

BLOCK_SIZE = 16
SPARE_PART = 20
"""Inverse of the share of the pool that must stay free when a request is admitted, because running sequences grow."""
LONGEST = 1 << 20
VOCAB_SIZE = 1 << 17


class Shape(NamedTuple):
    """Information about a modelled prompt in addition to its length."""

    hash_ids: tuple[int, ...] = ()
    """Ids of the full blocks of `block_size` tokens. Each stands for its block and all before it."""
    block_size: int = 512


NO_SHAPE = Shape()


class Tokens(tuple[int, ...]):
    """A prompt without token ids, of which only length and shape are known. The scheduler does not look at the token
    ids of a prompt that comes with its shape, and passes it on unchanged."""

    shape: Shape
    _count: int

    def __new__(cls, count: int, shape: Shape) -> "Tokens":
        tokens = super().__new__(cls)
        tokens._count, tokens.shape = count, shape
        return tokens

    def __len__(self) -> int:
        return self._count


class Entering(Protocol):
    """A session that needs room in the pool for its tokens."""

    num_tokens: int
    num_choices: int

    def enter(self) -> None:
        """Begin. Called when there is room."""


class Reserved(Protocol):
    """A session that waits for KV from another instance."""

    cached_tokens: int
    """Number of tokens whose KV is here already, and need not be moved."""

    def kv_is_there(self) -> None:
        """Go on to decode. Called when all of the KV has arrived."""


@dataclass
class Fabric:
    """State that the instances of a simulation share."""

    reservations: dict[str, Reserved] = field(default_factory=dict)
    """Sessions that wait for KV, by transfer id."""
    prefix_tokens: int = 0
    """Number of prompt tokens that were found in prefix caches; `asked_tokens` counts all that were looked for."""
    asked_tokens: int = 0


class ModelledInstance:
    """One modelled instance. It belongs to one event loop, and uses that loop's clock."""

    def __init__(self, instance_id: str, role: Role, law: StepLaw, limits: EngineLimits, fabric: Fabric) -> None:
        self.instance_id = instance_id
        self.role: Role = role
        self.epoch = uuid.uuid4().hex
        self.law = law
        self.profile = law.profile
        self.engine = ModelledEngine(law, limits, role)
        self.loop = asyncio.get_running_loop()
        self.fabric = fabric
        self._cache: PrefixCache | None = None
        self._used_tokens = 0
        """Tokens of the requests that were admitted, not counting those that were generated since."""
        self._num_active = self._num_inside = 0
        """Number of choices of all requests, and of those that were admitted."""
        self._waiting: deque[Entering] = deque()
        self._prefilling: dict[str, Callable[[bool, float], None]] = {}
        self._link_free_s = 0.0

    # ---- for the scheduler -------------------------------------------------------------------------------------------

    def info(self) -> InstanceInfo:
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

    def figures(self) -> InstanceStats:
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

    # ---- for its sessions --------------------------------------------------------------------------------------------

    def grant(self, request: GrantRequest, at_s: float) -> None:
        """Take a decode instance's answer to a reservation for a prompt that is computed here. An empty grant means
        that the prompt gets no room. `at_s` is when the message arrives, which is now or soon."""
        if (on_grant := self._prefilling.get(request.request_id)) is not None:
            on_grant(bool(request.grant), at_s)

    def begin_prefill(self, request_id: str, on_grant: Callable[[bool, float], None]) -> None:
        self._prefilling[request_id] = on_grant
        self._num_active += 1

    def end_prefill(self, request_id: str) -> None:
        del self._prefilling[request_id]
        self._num_active -= 1

    def let_in(self, session: Entering) -> None:
        """Queue a session, and call its `enter` once there is room."""
        self._num_active += session.num_choices
        self._waiting.append(session)
        self._admit()

    def let_out(self, session: Entering) -> None:
        """Remove a session, which has left the queue or no longer needs its room."""
        self._num_active -= session.num_choices
        if session in self._waiting:
            self._waiting.remove(session)
        else:
            self._used_tokens -= session.num_tokens
            self._num_inside -= session.num_choices
        self._admit()

    def _admit(self) -> None:
        """Give room to waiting sessions, in order."""
        if not self._waiting:
            return
        most = self.profile.kv_tokens - self.profile.kv_tokens // SPARE_PART
        while self._waiting:
            session = self._waiting[0]
            has_room = self._used_tokens + session.num_tokens <= most
            num_inside = self._num_inside + session.num_choices
            if self._num_inside and not (has_room and num_inside <= self.engine.limits.max_num_seqs):
                return
            self._waiting.popleft()
            self._used_tokens += session.num_tokens
            self._num_inside = num_inside
            session.enter()

    def _blocks(self, block_size: int) -> PrefixCache:
        if self._cache is None:
            self._cache = PrefixCache(self.profile.kv_tokens // block_size)
        return self._cache

    def cached(self, prompt: Sequence[int], count: int, *, counts: bool = True) -> int:
        """Return how many of a request's first `count` tokens (its prompt and output so far) are cached, and need not
        be computed or moved. Never all of them, because the last token must be computed to sample the next."""
        shape, found = getattr(prompt, "shape", NO_SHAPE), 0
        if shape.hash_ids:
            found = min(count - 1, self._blocks(shape.block_size).find(shape.hash_ids) * shape.block_size)
        if counts:
            self.fabric.prefix_tokens += found
            self.fabric.asked_tokens += count
        return found

    def remember(self, prompt: Sequence[int]) -> None:
        """Put a prompt into the prefix cache."""
        shape = getattr(prompt, "shape", NO_SHAPE)
        if shape.hash_ids:
            self._blocks(shape.block_size).add(shape.hash_ids)

    def move(self, num_bytes: int, at_s: float) -> tuple[float, float]:
        """Return when a copy of `num_bytes` begins and ends. It begins at `at_s`, or when earlier copies have ended."""
        begin_s = self._link_free_s if self._link_free_s > at_s else at_s
        self._link_free_s = begin_s + self.law.transfer_s(num_bytes)
        return begin_s, self._link_free_s

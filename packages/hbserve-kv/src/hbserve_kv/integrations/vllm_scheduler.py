"""The scheduler's side of the vLLM connector. It has one state for each request whose prompt is computed elsewhere, or
for somebody else. It does no I/O: what is to be done is collected as Orders for the workers. It does not import vLLM,
and knows only the names of what it is given.

The side that decodes wants the KV of all tokens of the prompt but the last. It computes that one itself, to have
something to sample from. What its prefix cache has is not fetched.
"""

import array
import hashlib
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from hbserve_kv.integrations.vllm_orders import Computed, Orders, Params, Source, Wanted
from hbserve_kv.protocol.messages import MOST_RANKS, Name
from hbserve_rpc.address import MAX_PORT, format_address

logger = logging.getLogger(__name__)

FINISHED_WELL = ("FINISHED_LENGTH_CAPPED", "FINISHED_STOPPED")
"""Names of vLLM's RequestStatus with which a prompt is computed; the first token may have been its last."""


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Compute a digest of a prompt. Both sides must have the same before KV of one is taken for that of the other."""
    return hashlib.blake2b(array.array("q", token_ids).tobytes(), digest_size=12).hexdigest()


class _Given(msgspec.Struct):
    """What this side reads of `kv_transfer_params`, which come from whoever sends requests."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    transfer_id: Name | int | None = None
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=MOST_RANKS)] | None = None
    """Number of ranks of the side that prefills; without it, and without `remote_ranks`, it is this side's number."""
    remote_num_tokens: int | None = None
    remote_ranks: Annotated[list[tuple[Name, Name]], msgspec.Meta(max_length=MOST_RANKS)] | None = None
    """Address and epoch of each rank there."""
    remote_host: Name | None = None
    remote_port: Annotated[int, msgspec.Meta(ge=0, le=MAX_PORT)] | None = None
    """Port of rank 0's control server; the others follow."""


@dataclass
class _Incoming:
    """A request whose KV another server has computed, or computes."""

    source: Source
    num_computed: int = 0
    """Number of tokens that this side had when it was last asked."""
    is_settled: bool = False
    """Whether its blocks are known to the workers, or it needs none."""


@dataclass
class _Outgoing:
    """A request that another server decodes."""

    request: Any
    """vLLM's own request, which counts its preemptions."""
    transfer_id: str
    is_awaited: bool
    """Whether the transfer id is the router's, so that the receiver may be there before the prompt is computed."""
    num_tokens: int
    digest: str
    """Digest of the prompt: see `prompt_digest`."""
    block_ids: list[int] = field(default_factory=list)
    num_told: int = 0
    """Number of blocks of which the workers know."""
    num_preemptions: int = 0
    """Number of preemptions when the workers were last told of blocks."""


class SchedulerSide:
    def __init__(self, engine_id: str, block_size: int, tp_size: int, num_kv_heads: int) -> None:
        self._engine_id = engine_id
        self._block_size = block_size
        self._tp_size = tp_size
        self._num_kv_heads = num_kv_heads
        self.ranks: list[tuple[str, str]] = []
        """Address and epoch of each of this engine's workers."""
        self._incoming: dict[str, _Incoming] = {}
        self._outgoing: dict[str, _Outgoing] = {}
        self._orders = Orders()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    # ---- arrival -------------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        if not request.prompt_token_ids:
            return  # embeddings: nothing says whether both sides mean the same
        try:
            given = msgspec.convert(request.kv_transfer_params or {}, _Given, strict=False)
            msgspec.json.encode(given)  # lone surrogates, which JSON may contain, cannot be sent to the other side
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            logger.warning("request %s is computed here: kv_transfer_params: %s", request.request_id, error)
            return
        if given.do_remote_decode:
            prompt, name = request.prompt_token_ids, str(given.transfer_id or "")
            self._outgoing[request.request_id] = _Outgoing(
                request, name or f"{self._engine_id}-{uuid.uuid4().hex}", bool(name), len(prompt), prompt_digest(prompt)
            )
            if name and len(prompt) > 1:
                self._orders.offers[request.request_id] = name
        elif given.do_remote_prefill and (source := self._source(request, given)):
            self._incoming[request.request_id] = _Incoming(source)
            self._orders.claims[request.request_id] = source

    def _source(self, request: Any, given: "_Given") -> Source | None:
        """Return where a request's KV is; None if it cannot be fetched, and is computed here."""
        num_tokens, num_ranks = given.remote_num_tokens, len(given.remote_ranks or ()) or given.tp_size or self._tp_size
        if not given.transfer_id or not (given.remote_ranks or given.remote_port):
            problem = "it has not transfer_id, and remote_ranks or remote_host and remote_port"
        elif self._num_kv_heads % num_ranks and num_ranks % self._num_kv_heads:
            problem = (
                f"tp_size is {num_ranks} on the side that prefilled it, and there are {self._num_kv_heads} KV heads"
            )
        elif num_tokens is not None and num_tokens != len(request.prompt_token_ids):
            problem = f"its prompt is {num_tokens} tokens there, and {len(request.prompt_token_ids)} here"
        else:
            host, port = given.remote_host or "127.0.0.1", given.remote_port or 0
            ranks = given.remote_ranks or [(format_address(host, port + rank), "") for rank in range(num_ranks)]
            source = Source(str(given.transfer_id), tuple(ranks))
            if all(each.source != source for each in self._incoming.values()):
                return source
            problem = "another request fetches the same KV, as the sequences of one request with `n` do"
        logger.warning("request %s is computed here, not fetched: %s", request.request_id, problem)
        return None

    # ---- the side that decodes -----------------------------------------------------------------------------------

    def num_wanted(self, request: Any, num_computed: int) -> int:
        """Return how many tokens are to be fetched if this side has `num_computed`. May be called many times."""
        incoming = self._incoming.get(request.request_id)
        if incoming is None or incoming.is_settled:
            return 0
        incoming.num_computed = num_computed
        return max(0, len(request.prompt_token_ids) - 1 - num_computed)

    def allocated(self, request: Any, block_ids: Sequence[int], num_tokens: int) -> None:
        """Note the blocks of a request, for `num_tokens` that are to be fetched. vLLM calls this again when the request
        gets more blocks."""
        incoming = self._incoming.get(request.request_id)
        if incoming is None or incoming.is_settled:
            return
        incoming.is_settled = True
        if not num_tokens:
            self._orders.releases.add(request.request_id)
            return
        first = incoming.num_computed // self._block_size
        end = self._num_blocks(incoming.num_computed + num_tokens)
        digest = prompt_digest(request.prompt_token_ids)
        self._orders.fetches[request.request_id] = Wanted(list(block_ids[first:end]), first, digest)

    # ---- the side that prefills ----------------------------------------------------------------------------------

    def scheduled(self, output: Any) -> Orders:
        """Return the orders of a step; `output` is its SchedulerOutput of vLLM."""
        for name, each in self._outgoing.items():
            # `preempted_req_ids` is not used: in 0.24 it lacks requests that `reset_prefix_cache` preempts.
            if each.num_told and each.request.num_preemptions != each.num_preemptions:
                each.block_ids, each.num_told = [], 0
                self._orders.preempted.add(name)
        for new in output.scheduled_new_reqs:
            if (outgoing := self._outgoing.get(new.req_id)) is not None:
                outgoing.block_ids = list(new.block_ids[0])
                self._computed(new.req_id, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for name, blocks, num_computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if (outgoing := self._outgoing.get(name)) is not None:
                if name in cached.resumed_req_ids:
                    outgoing.block_ids = []
                outgoing.block_ids += blocks[0] if blocks else []
                self._computed(name, num_computed, output)
        orders, self._orders = self._orders, Orders()
        return orders

    def _computed(self, name: str, num_computed: int, output: Any) -> None:
        """Tell the workers of the blocks that this step fills, if a receiver may wait for them."""
        outgoing = self._outgoing[name]
        if not outgoing.is_awaited:
            return
        num_tokens, needed = num_computed + output.num_scheduled_tokens[name], outgoing.num_tokens - 1
        is_all = num_tokens >= needed
        end = self._num_blocks(needed) if is_all else num_tokens // self._block_size
        blocks = outgoing.block_ids[outgoing.num_told : end]
        if blocks:
            self._orders.computed[name] = Computed(outgoing.transfer_id, blocks, outgoing.digest if is_all else "")
            outgoing.num_told, outgoing.num_preemptions = end, outgoing.request.num_preemptions

    # ---- the end, on either side ---------------------------------------------------------------------------------

    def finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, Params | None]:
        """Note that a request has finished. Returns whether the workers will vote when its blocks are free, and what a
        router passes to the side that decodes."""
        name = request.request_id
        if self._incoming.pop(name, None) is not None:
            self._orders.releases.add(name)
        outgoing = self._outgoing.pop(name, None)
        if outgoing is None:
            return False, None
        if request.status.name in FINISHED_WELL and request.num_computed_tokens >= outgoing.num_tokens - 1:
            return self._deliver(name, outgoing, block_ids)
        if not outgoing.is_awaited:
            return False, None
        self._orders.withdrawn[name] = (outgoing.transfer_id, f"its prefill ended with {request.status.name}")
        return True, None

    def _deliver(self, name: str, outgoing: _Outgoing, block_ids: Sequence[int]) -> tuple[bool, Params | None]:
        blocks = list(block_ids[: self._num_blocks(outgoing.num_tokens - 1)])
        if not blocks:
            return False, None  # a prompt of one token is computed where it is decoded
        rest = blocks[outgoing.num_told :]
        self._orders.finished[name] = Computed(outgoing.transfer_id, rest, outgoing.digest)
        host, _, port = self.ranks[0][0].rpartition(":")
        return True, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": outgoing.transfer_id,
            "remote_engine_id": self._engine_id,
            "remote_request_id": name,
            "remote_block_ids": blocks,
            "remote_num_tokens": outgoing.num_tokens,
            "remote_host": host.strip("[]"),
            "remote_port": int(port),
            "remote_ranks": [list(rank) for rank in self.ranks],
            "tp_size": self._tp_size,
        }

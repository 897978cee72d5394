"""As much of vLLM as its connectors see, in an imitation: vllm itself is too large for CI (280 MB, and CUDA).

`install()` makes modules of vLLM's names. An Engine does what vLLM's scheduler and worker do with a connector, in the
order of version 0.24 or 0.33, on CPU tensors of the shapes that these have: blocks are allocated, prompts are computed
in chunks, requests wait for their KV, and blocks go back as the connector votes. Its model is a function: the KV of a
place in a prompt is a number of the tokens up to it, so that whoever has another's KV is found out.
"""

import contextlib
import itertools
import pickle
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch

from hbserve_testing.narrowing import present

BLOCK_SIZE, NUM_LAYERS, HEAD_DIM = 4, 3, 8
CHUNK = 8
"""Tokens that a step computes at most."""


class Status(Enum):
    """vLLM's RequestStatus, as far as it matters here."""

    WAITING = 0
    WAITING_FOR_REMOTE_KVS = 1
    RUNNING = 2
    FINISHED_LENGTH_CAPPED = 3
    FINISHED_ABORTED = 4
    FINISHED_ERROR = 5


class FullAttentionSpec:
    """What vLLM says of the KV of one kind of layers."""


_making_rank = 0
"""Of the worker that is being made."""


def install() -> None:
    """Into this process, for its life."""

    class Base:
        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            self._connector_metadata: Any = None

        def bind_connector_metadata(self, metadata: Any) -> None:
            self._connector_metadata = metadata

        def clear_connector_metadata(self) -> None:
            self._connector_metadata = None

        def _get_connector_metadata(self) -> Any:
            assert self._connector_metadata is not None
            return self._connector_metadata

        def get_transfer_results(self, finished_req_ids: set[str]) -> Any:  # of 0.33
            sent, received = self.get_finished(finished_req_ids)  # type: ignore[attr-defined]
            return SimpleNamespace(finished_sending=set(sent or ()), finished_recving=set(received or ()))

        def set_xfer_handshake_metadata_pp_aware(self, metadata: Any) -> None:
            self.set_xfer_handshake_metadata({tp: each for (_, tp), each in metadata.items()})  # type: ignore[attr-defined]

    @dataclass
    class KVConnectorStats:
        data: dict[str, Any] = field(default_factory=dict)

    class KVConnectorPromMetrics:
        def __init__(self, vllm_config: Any, metric_types: Any, labelnames: Any, per_engine_labelvalues: Any) -> None:
            kinds = {kind.__name__: made for kind, made in metric_types.items()}
            self._counter_cls, self._histogram_cls = kinds["Counter"], kinds["Histogram"]
            self.per_engine_labelvalues = per_engine_labelvalues

    connector = "vllm.distributed.kv_transfer.kv_connector.v1"
    contents: dict[str, dict[str, Any]] = {
        f"{connector}.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorHandshakeMetadata": type("KVConnectorHandshakeMetadata", (), {}),
            "KVConnectorRole": Enum("KVConnectorRole", ["SCHEDULER", "WORKER"]),
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        f"{connector}.metrics": {
            "KVConnectorStats": KVConnectorStats,
            "KVConnectorPromMetrics": KVConnectorPromMetrics,
        },
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: _making_rank},
        "vllm.v1.kv_cache_interface": {"FullAttentionSpec": FullAttentionSpec},
    }
    for name, values in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        if name not in sys.modules:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(values)


def kv_caches(shape: str, num_blocks: int, num_heads: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A tensor for each layer, full of -1. Shapes: those of vllm_pool.py."""
    content = (num_blocks, num_heads, BLOCK_SIZE, 2 * HEAD_DIM)
    sizes = {
        "blocks first": (num_blocks, 2, BLOCK_SIZE, num_heads, HEAD_DIM),
        "keys and values first": (2, num_blocks, BLOCK_SIZE, num_heads, HEAD_DIM),
        "smaller blocks of the kernels": (2 * num_blocks, 2, BLOCK_SIZE // 2, num_heads, HEAD_DIM),
        "layers outermost": content,
        "blocks outermost": content,
        "latents": (num_blocks, BLOCK_SIZE, HEAD_DIM),
    }[shape]
    names = [f"model.layers.{layer}.attn" for layer in range(NUM_LAYERS)]
    if shape == "blocks outermost":  # BLHNC of 0.33: views of one buffer
        whole = torch.full((num_blocks, NUM_LAYERS, *sizes[1:]), -1.0, device=device)
        return {name: whole[:, layer] for layer, name in enumerate(names)}
    if shape == "layers outermost":  # LBNHC of 0.33: tokens before heads, in memory
        whole = torch.full((NUM_LAYERS, num_blocks, BLOCK_SIZE, num_heads, 2 * HEAD_DIM), -1.0, device=device)
        whole = whole.transpose(2, 3)
        return {name: whole[layer] for layer, name in enumerate(names)}
    return {name: torch.full(sizes, -1.0, device=device) for name in names}


def of_place(shape: str, cache: torch.Tensor, block_id: int, token: int) -> torch.Tensor:
    """A view of what one layer has of one token: keys and values, heads, and the numbers of one."""
    if shape == "keys and values first":
        return cache[:, block_id, token]
    if shape == "smaller blocks of the kernels":
        half = BLOCK_SIZE // 2
        return cache[2 * block_id + token // half, :, token % half]
    if shape == "latents":
        return cache[block_id, token : token + 1]
    if shape == "blocks first":
        return cache[block_id, :, token]
    return cache[block_id, :, token].unflatten(-1, (2, HEAD_DIM)).transpose(0, 1)


def numbers(tokens: list[int]) -> list[float]:
    """The KV of each place of a prompt."""
    found, number = [], 0
    for token in tokens:
        number = (number * 31 + token) % (1 << 20)
        found.append(float(number))
    return found


@dataclass(eq=False)
class Request:
    request_id: str
    prompt_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_hit: int = 0
    """Tokens that this side's prefix cache has."""
    is_known: bool = False
    """To the worker."""
    is_resumed: bool = False
    num_preemptions: int = 0
    is_loaded: bool = False
    recomputes: bool = False
    """Its KV did not come, and is computed here."""
    num_outputs: int = 1
    output_token_ids: list[int] = field(default_factory=list)
    is_right: bool = True
    """The KV that each of them was sampled from."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_next(self) -> int:
        """Tokens that its next step computes."""
        return min(CHUNK, len(self.token_ids) - self.num_computed_tokens)


@dataclass(eq=False)
class Rank:
    """One worker of an Engine."""

    engine: "Engine"
    connector: Any

    def start(self, rank: int) -> Any:
        """What its connector tells the scheduler's."""
        global _making_rank
        _making_rank = rank
        num_ranks, num_heads = len(self.engine.ranks), 1 if self.engine.shape == "latents" else self.engine.num_kv_heads
        count = max(1, num_heads // num_ranks)
        first = rank * num_heads // num_ranks
        self.heads = torch.arange(first, first + count, device=self.engine.device)[:, None] / 4
        if self.engine.shape != "latents":
            self.heads = torch.stack([self.heads, self.heads + 0.125])  # keys, and values
        self.caches = kv_caches(self.engine.shape, self.engine.num_blocks, count, self.engine.device)
        self.connector.register_kv_caches(self.caches)
        return pickle.loads(pickle.dumps(self.connector.get_handshake_metadata()))

    def step(self, scheduled: Any) -> tuple[set[str], set[str], set[int]]:
        worker, is_empty = self.connector, not scheduled.num_scheduled_tokens
        worker.handle_preemptions(scheduled.metadata)
        worker.bind_connector_metadata(scheduled.metadata)
        if self.engine.version == "0.24":
            worker.start_load_kv(None)
        for name, count in scheduled.num_scheduled_tokens.items():
            self.compute(self.engine.requests[name], count)
        if self.engine.version != "0.24":
            worker.start_load_kv(None)
        if self.engine.version != "0.24" or not is_empty:
            worker.wait_for_save()
        if self.engine.version == "0.24":
            sent, received = worker.get_finished(scheduled.finished_req_ids)
        else:
            results = worker.get_transfer_results(scheduled.finished_req_ids)
            sent, received = results.finished_sending, results.finished_recving
        invalid = worker.get_block_ids_with_load_errors()
        if (stats := worker.get_kv_connector_stats()) is not None:
            self.engine.figures = (
                type(stats)(data=self.engine.figures).aggregate(pickle.loads(pickle.dumps(stats))).data
            )
        worker.clear_connector_metadata()
        return sent or set(), received or set(), invalid

    def compute(self, request: Request, count: int) -> None:
        for found, right in self._of_places(request, request.num_computed_tokens - count, request.num_computed_tokens):
            found[:] = right

    def is_right(self, request: Request) -> bool:
        """As the attention of the next token would see it."""
        places = self._of_places(request, 0, len(request.token_ids))
        return all(bool((found == right).all()) for found, right in places)

    def _of_places(self, request: Request, first: int, end: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What each layer has of these tokens, and should have."""
        for place, value in enumerate(numbers(request.token_ids)[first:end], first):
            for layer, cache in enumerate(self.caches.values()):
                found = of_place(self.engine.shape, cache, request.block_ids[place // BLOCK_SIZE], place % BLOCK_SIZE)
                yield found, value + layer + self.heads


class Engine:
    """One vLLM server's core: `step` is called again and again."""

    def __init__(
        self, *, version: str = "0.24", shape: str = "blocks outermost", num_blocks: int = 32, policy: str = "fail",
        tp_size: int = 1, num_kv_heads: int = 2, device: str = "cpu", extra: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        from hbserve_kv.integrations.vllm import HBServeConnector, KVConnectorRole

        self.device, self.num_kv_heads = device, num_kv_heads
        self.version, self.shape, self.num_blocks, self.policy = version, shape, num_blocks, policy
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=tp_size, pipeline_parallel_size=1),
            kv_transfer_config=SimpleNamespace(
                engine_id=f"engine {id(self)}", kv_connector_extra_config={"timeout_s": 10.0, **(extra or {})}
            ),
            cache_config=SimpleNamespace(block_size=BLOCK_SIZE, cache_dtype="auto"),
            model_config=SimpleNamespace(
                model="org/model",
                dtype="float32",
                use_mla=shape == "latents",
                get_total_num_kv_heads=lambda: num_kv_heads,
            ),
        )
        cache = SimpleNamespace(
            num_blocks=num_blocks, kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())]
        )
        self.scheduler = HBServeConnector(config, KVConnectorRole.SCHEDULER, cache)
        self.ranks = [Rank(self, HBServeConnector(config, KVConnectorRole.WORKER, kv_cache_config=cache))
                      for _ in range(tp_size)]  # fmt: skip
        self.scheduler.set_xfer_handshake_metadata_pp_aware(
            {(0, rank): each.start(rank) for rank, each in enumerate(self.ranks)}
        )
        self.requests: dict[str, Request] = {}
        """Until their blocks are free."""
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free = deque(range(1, num_blocks))  # 0 is vLLM's null block
        self.finished_ids: set[str] = set()
        self.preempted_ids: set[str] = set()
        self.received_ids: set[str] = set()
        self.results: dict[str, tuple[str, Any, bool | None]] = {}
        """By request: status, kv_transfer_params, and whether its KV was right."""
        self.figures: dict[str, list[float]] = {}
        self.num_steps, self.num_preemptions = 0, 0
        self.while_computing: Callable[[], None] = lambda: None
        """Called in each step, when its workers have told what has become of requests."""
        self._votes: dict[tuple[int, str], int] = {}

    # ---- what a front end does -----------------------------------------------------------------------------------

    def add(
        self, name: str, tokens: list[int], params: dict[str, Any] | None = None, num_hit: int = 0, num_outputs: int = 1
    ) -> None:
        request = self.requests[name] = Request(name, tokens, params, num_hit=num_hit, num_outputs=num_outputs)
        self.scheduler.on_new_request(request)
        self.waiting.append(request)

    def abort(self, name: str) -> None:
        if (request := self.requests.get(name)) is not None and not request.status.name.startswith("FINISHED"):
            self._finish(request, Status.FINISHED_ABORTED)

    def preempt(self, name: str, is_told: bool = True) -> None:
        """For want of blocks, or as if for it, between two steps. `is_told`: to the connector, as always but by
        `reset_prefix_cache` of 0.24."""
        request = self.requests[name]
        self.running.remove(request)
        self.waiting.insert(0, request)
        self._free(request)
        request.status, request.num_computed_tokens, request.is_resumed = Status.WAITING, 0, True
        if is_told:
            self.preempted_ids.add(name)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def holds(self, tokens: list[int]) -> bool:
        """Whether the KV of their first place has come, or was computed."""
        return any(bool((cache == numbers(tokens)[0]).any()) for cache in self.ranks[0].caches.values())

    @property
    def is_empty(self) -> bool:
        """As vLLM's own test of its scheduler: nothing is known of any request, and all blocks are free."""
        return not (self.requests or self.waiting or self.running or self.received_ids) and (
            sorted(self.free) == list(range(1, self.num_blocks))
        )

    def close(self) -> None:
        for rank in self.ranks:
            rank.connector.shutdown()

    # ---- a step --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        self.num_steps += 1
        scheduled = self._schedule()
        outputs = [rank.step(scheduled) for rank in self.ranks]
        voted = [
            self._count(votes, kind) for kind, votes in enumerate(zip(*(each[:2] for each in outputs), strict=True))
        ]
        self.while_computing()
        self._update(scheduled, voted[0], voted[1], set().union(*(each[2] for each in outputs)))

    def _count(self, votes: tuple[set[str], ...], kind: int) -> set[str]:
        """Requests for which every rank has voted by now."""
        over = set()
        for name in itertools.chain(*votes):
            self._votes[kind, name] = self._votes.get((kind, name), 0) + 1
            if self._votes[kind, name] == len(self.ranks):
                del self._votes[kind, name]
                over.add(name)
        return over

    def _schedule(self) -> Any:
        new, cached, tokens = [], SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[]
        ), {}  # fmt: skip
        for request, more in self._with_blocks():
            if not request.is_known:
                new.append(SimpleNamespace(
                    req_id=request.request_id, block_ids=(list(request.block_ids),),
                    num_computed_tokens=request.num_computed_tokens,
                ))  # fmt: skip
            else:
                cached.req_ids.append(request.request_id)
                told = list(request.block_ids) if request.is_resumed else more
                cached.new_block_ids.append((told,) if told else None)
                cached.num_computed_tokens.append(request.num_computed_tokens)
                if request.is_resumed:
                    cached.resumed_req_ids.add(request.request_id)
            request.is_known, request.is_resumed = True, False
            tokens[request.request_id] = request.num_next
        finished, self.finished_ids = self.finished_ids, set()
        preempted, self.preempted_ids = self.preempted_ids, set()
        output = SimpleNamespace(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=tokens,
            finished_req_ids=finished, preempted_req_ids=preempted,
        )  # fmt: skip
        output.metadata = pickle.loads(pickle.dumps(self.scheduler.build_connector_meta(output)))
        for name, count in tokens.items():
            self.requests[name].num_computed_tokens += count
        return output

    def _with_blocks(self) -> list[tuple[Request, list[int]]]:
        """Requests that this step computes, and the blocks that each gets for it: first those that run, of which the
        last is preempted when another one lacks a block; then, if none was, those that wait."""
        found, num_before = [], self.num_preemptions
        for request in list(self.running):
            while request in self.running and self._num_missing(request) > len(self.free):
                self.preempt(self.running[-1].request_id)
            if request in self.running:
                found.append((request, self._allocate(request, request.num_computed_tokens + request.num_next)))
        for request in list(self.waiting) if self.num_preemptions == num_before else []:
            if self._admit(request):
                self.waiting.remove(request)
                self.running.append(request)
                request.status = Status.RUNNING
                found.append((request, self._allocate(request, request.num_computed_tokens + request.num_next)))
        return found

    def _num_missing(self, request: Request) -> int:
        """Blocks for its next step."""
        return -(-(request.num_computed_tokens + request.num_next) // BLOCK_SIZE) - len(request.block_ids)

    def _admit(self, request: Request) -> bool:
        """Give it blocks. False: it waits, for blocks or for its KV."""
        if request.status is Status.WAITING_FOR_REMOTE_KVS:
            if request.request_id not in self.received_ids or self._num_missing(request) > len(self.free):
                return False
            self.received_ids.remove(request.request_id)
            request.is_loaded = True
            if request.recomputes:
                self._free(request)
                request.num_computed_tokens = 0
            return True
        num_hit, num_wanted, is_async = 0, 0, False
        if request.num_computed_tokens == 0:
            num_hit = 0 if request.is_resumed else request.num_hit
            num_wanted, is_async = self.scheduler.get_num_new_matched_tokens(request, num_hit)
            assert is_async is (num_wanted > 0)
        num_tokens = num_hit + (num_wanted or min(CHUNK, len(request.token_ids) - num_hit))
        if -(-num_tokens // BLOCK_SIZE) - len(request.block_ids) > len(self.free):
            return False
        self._allocate(request, num_tokens)
        request.num_computed_tokens = num_hit
        for rank in self.ranks:
            rank.compute(request, num_hit)  # long ago, and by another request
        blocks = SimpleNamespace(get_block_ids=lambda: (list(request.block_ids),))
        self.scheduler.update_state_after_alloc(request, blocks, num_wanted)
        if is_async:
            request.status, request.num_computed_tokens = Status.WAITING_FOR_REMOTE_KVS, num_hit + num_wanted
        return not is_async

    def _allocate(self, request: Request, num_tokens: int) -> list[int]:
        more = [self.free.popleft() for _ in range(-(-num_tokens // BLOCK_SIZE) - len(request.block_ids))]
        request.block_ids += more
        return more

    def _update(self, scheduled: Any, sent: set[str], received: set[str], invalid: set[int]) -> None:
        for request in list(self.waiting):
            if request.status is Status.WAITING_FOR_REMOTE_KVS and invalid & set(request.block_ids):
                if self.policy == "fail":
                    self._finish(request, Status.FINISHED_ERROR)
                request.recomputes = True
        for name in scheduled.num_scheduled_tokens:
            request = self.requests[name]
            if request in self.running and request.num_computed_tokens == len(request.token_ids):
                self._sample(request)
        told = SimpleNamespace(finished_sending=sent or None, finished_recving=received or None)
        self.scheduler.update_connector_output(told)
        for name in told.finished_recving or ():
            request = self.requests[name]  # vLLM asserts that it is there
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                self.received_ids.add(name)
            else:
                assert request.status.name.startswith("FINISHED")
                self._forget(request)
        for name in told.finished_sending or ():
            self._forget(self.requests[name])

    def _sample(self, request: Request) -> None:
        request.is_right &= all(rank.is_right(request) for rank in self.ranks)
        request.output_token_ids.append(int(numbers(request.token_ids)[-1]) % 50)
        if len(request.output_token_ids) == request.num_outputs:
            self._finish(request, Status.FINISHED_LENGTH_CAPPED, request.is_right)

    def _finish(self, request: Request, status: Status, is_right: bool | None = None) -> None:
        is_parked = request.status is Status.WAITING_FOR_REMOTE_KVS and request.request_id not in self.received_ids
        self.received_ids.discard(request.request_id)
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        request.status = status
        is_kept, params = self.scheduler.request_finished_all_groups(request, (list(request.block_ids),))
        self.results[request.request_id] = (status.name, params, is_right)
        self.finished_ids.add(request.request_id)
        if not (is_parked or is_kept):
            self._forget(request)

    def _free(self, request: Request) -> None:
        self.free.extend(request.block_ids)
        request.block_ids = []

    def _forget(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._free(request)


def serve(control: Connection, port: int, backend: str, num_blocks: int, timeout_s: float) -> None:
    """A process: an engine that steps by itself, and does what it is told between its steps."""
    install()
    torch.set_num_threads(1)
    extra = {"backend": backend, "port": port, "timeout_s": timeout_s, "lease_s": 600.0}
    engine = Engine(extra=extra, num_blocks=num_blocks)
    control.send(present(engine.scheduler._scheduler).ranks[0][0])
    is_paused = False
    with contextlib.suppress(EOFError):
        while True:
            while control.poll(0.005):
                what, *arguments = control.recv()
                if what == "pause":
                    is_paused = arguments[0]
                elif what == "holds":
                    control.send(engine.holds(*arguments))
                elif what == "ask":
                    control.send((engine.results, engine.is_empty, engine.num_steps, set(engine.requests)))
                else:
                    getattr(engine, what)(*arguments)
            if not is_paused:
                engine.step()

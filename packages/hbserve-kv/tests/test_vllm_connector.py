"""The vLLM connector, by an imitation of vLLM's schedulers and workers of both versions: see hbserve_kv_vllm.py."""

import asyncio
import inspect
import random
import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import ClassVar

import hbserve_kv_vllm as imitation
import pytest
import torch
from hbserve_kv_vllm import Engine

from hbserve_kv import HeadRange, PoolLayout
from hbserve_kv.memory.layout import CopyPlan, sides
from hbserve_kv.memory.memory import copy_on_host
from hbserve_kv.protocol.messages import MOST_CHARACTERS
from hbserve_kv.transports.base import DrainUnknown
from hbserve_kv.transports.ipc import IpcTransport

DEADLINE_S = 60.0
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
PROMPT = [(7 * i) % 50 for i in range(18)]


@pytest.fixture(autouse=True, scope="module")
def vllm():
    imitation.install()


@pytest.fixture
def engines():
    """Makes engines; afterwards nothing may be left in them."""
    made = []

    def make(**kwargs):
        made.append(Engine(**{"extra": {"backend": "ipc"}, **kwargs}))
        return made[-1]

    yield make
    until(lambda: all(engine.is_empty for engine in made), *made)
    for engine in made:
        engine.close()


def until(condition, *engines):
    """Step all of them, as their loops do, until it is so."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        for engine in engines:
            engine.step()
        time.sleep(0.001)
        assert time.monotonic() < deadline_s


def pool_of_caches(caches, num_blocks):
    from hbserve_kv.integrations.vllm_pool import pool_of

    return pool_of(caches, num_blocks)[0]


def port(engine):
    return int(engine.scheduler._scheduler.ranks[0][0].rpartition(":")[2])


def leg(engine, transfer_id):
    """What a router that sends both legs at once gives to the one that decodes."""
    return {
        "do_remote_prefill": True,
        "transfer_id": transfer_id,
        "remote_host": "127.0.0.1",
        "remote_port": port(engine),
    }


def prefilled(prefill, name="p", tokens=PROMPT):
    """The parameters that the prefill leg is answered with."""
    prefill.add(name, tokens, dict(PREFILL))
    until(lambda: name in prefill.results, prefill)
    return prefill.results[name][1]


LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 18, 40]


@pytest.mark.parametrize(
    ("version", "shape"),
    [
        ("0.24", "blocks first"),
        ("0.24", "keys and values first"),
        ("0.33", "blocks outermost"),
        ("0.33", "layers outermost"),
        ("0.24", "latents"),
        ("0.24", "smaller blocks of the kernels"),
    ],
)
def test_prefill_then_decode_gives_every_prompt_its_own_kv(engines, version, shape):
    prefill, decode = (engines(version=version, shape=shape, num_blocks=128) for _ in range(2))
    prompts = {f"r{n}": [(n * i + n) % 50 for i in range(n)] for n in LENGTHS}
    for name, tokens in prompts.items():
        decode.add(name, tokens, prefilled(prefill, name, tokens))
    until(lambda: len(decode.results) == len(prompts), prefill, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}
    num_fetched = sum(n > 1 for n in LENGTHS)
    assert len(decode.figures["transfer_duration"]) == num_fetched
    assert "num_failed_transfers" not in decode.figures


def legs(prefill, decode, name):
    """Both at once, of servers whose ports a router would know."""
    addresses = [(address, "") for address, _ in prefill.scheduler._scheduler.ranks]
    decode.add(f"d{name}", PROMPT, {"do_remote_prefill": True, "transfer_id": name, "remote_ranks": addresses})
    prefill.add(f"p{name}", PROMPT, PREFILL | {"transfer_id": name})


@pytest.mark.parametrize(("num_kv_heads", "shape"), [(4, "blocks outermost"), (2, "blocks first"), (4, "latents")])
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1), (2, 4), (4, 2), (4, 4)])
def test_each_rank_fetches_its_heads_from_ranks_that_have_them(engines, n, m, num_kv_heads, shape):
    """With fewer heads than ranks several have the same one; latents are one that every rank has."""
    # Known elsewhere: vLLM #11247, #45330.
    prefill, decode = (engines(tp_size=size, num_kv_heads=num_kv_heads, shape=shape) for size in (n, m))
    decode.add("d", PROMPT, prefilled(prefill))
    legs(prefill, decode, "t")
    until(lambda: len(decode.results) == 2, prefill, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}
    assert len(decode.figures["bytes_transferred"]) == 2 * m
    until(lambda: prefill.is_empty, prefill)
    assert "num_not_delivered" not in prefill.figures


@pytest.mark.parametrize(
    ("sizes", "num_kv_heads", "expected"),
    [
        ((2, 2), 2, [{0: 1}, {1: 1}]),
        ((2, 4), 8, [{0: 1, 1: 1}, {2: 1, 3: 1}]),
        ((4, 2), 8, [{0: 2}, {0: 2}, {1: 2}, {1: 2}]),
        ((2, 4), 2, [{0: 1}, {1: 0, 2: 1, 3: 0}]),
        ((4, 4), 1, [{0: 1}, {1: 1}, {2: 1}, {3: 1}]),
        ((2, 4), 1, [{0: 1}, {1: 0, 2: 1, 3: 0}]),
        ((4, 2), 1, [{0: 2}, {0: 2}, {1: 2}, {1: 2}]),
        ((1, 8), 2, [{0: 1, 4: 1, 1: 0, 2: 0, 3: 0, 5: 0, 6: 0, 7: 0}]),
        ((6, 4), 12, [{0: 2}, {0: 2, 1: 2}, {1: 2}, {2: 2}, {2: 2, 3: 2}, {3: 2}]),
    ],
)
def test_a_rank_has_as_few_receivers_as_can_be_and_one_that_has_none_is_told_once(sizes, num_kv_heads, expected):
    from hbserve_kv.integrations.vllm_ranks import sources_of

    size, num_theirs = sizes
    assert [dict(sources_of(rank, size, num_theirs, num_kv_heads)) for rank in range(size)] == expected


def test_heads_that_cannot_be_cut_are_refused_at_start(engines):
    with pytest.raises(ValueError, match="tensor parallelism of 3: 4 KV heads are neither a multiple nor a divisor"):
        Engine(tp_size=3, num_kv_heads=4)


@pytest.mark.parametrize("num_ranks", [3, 6], ids=["as many as here", "as many as it says"])
def test_a_routers_port_is_rank_0s_and_the_others_follow(num_ranks):
    from hbserve_kv.integrations.vllm_scheduler import SchedulerSide

    side = SchedulerSide("engine", block_size=4, tp_size=3, num_kv_heads=3)
    params = {"do_remote_prefill": True, "transfer_id": "t", "remote_host": "::1", "remote_port": 7100}
    if num_ranks != 3:
        params["tp_size"] = num_ranks
    side.arrived(SimpleNamespace(request_id="d", prompt_token_ids=PROMPT, kv_transfer_params=params))
    nothing = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    output = SimpleNamespace(preempted_req_ids=None, scheduled_new_reqs=[], scheduled_cached_reqs=nothing)
    orders = side.scheduled(output)
    assert orders.claims["d"].ranks == tuple((f"[::1]:{7100 + rank}", "") for rank in range(num_ranks))
    assert not side.scheduled(output)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ipc", "nccl"])
@pytest.mark.parametrize("shape", ["blocks first", "keys and values first", "blocks outermost", "layers outermost"])
def test_on_a_gpu_blocks_are_sent_when_their_step_has_computed_them(engines, backend, shape):
    prefill, decode = (engines(shape=shape, device="cuda", extra={"backend": backend}) for _ in range(2))
    for number in range(10):
        prefill.add(f"p{number}", PROMPT, PREFILL | {"transfer_id": f"t{number}"})
        decode.add(f"d{number}", PROMPT, leg(prefill, f"t{number}"))
        until(lambda number=number: f"d{number}" in decode.results, prefill, decode)
        assert decode.results[f"d{number}"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("blocks outermost", "layers outermost"),
        ("blocks outermost", "keys and values first"),
        ("blocks first", "layers outermost"),
    ],
)
def test_layouts_of_the_two_sides_may_differ_also_of_two_versions(engines, one, other):
    """0.33 has each value behind its key, 0.24 has them apart."""
    # Known elsewhere: vLLM #42895.
    prefill, decode = engines(shape=one, version="0.33"), engines(shape=other)
    decode.add("d", PROMPT, prefilled(prefill))
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize("shape", ["blocks first", "keys and values first", "blocks outermost", "layers outermost"])
@pytest.mark.parametrize("to_vllm", [True, False])
def test_blocks_of_hbserves_own_pool_become_those_of_vllms_and_back(shape, to_vllm):
    """Layouts only: see docs/vllm.md for what else a deployment of both would need. Ranks may differ as well."""
    num_heads, size = 4, imitation.BLOCK_SIZE
    canonical = torch.rand(6, imitation.NUM_LAYERS, 2, size, num_heads, imitation.HEAD_DIM)
    own = canonical.clone() if to_vllm else torch.zeros_like(canonical)
    caches = imitation.kv_caches(shape, 6, 2)  # of the second of two ranks
    half = HeadRange(2, 2, num_heads)

    def of_vllm(block):
        found = [[imitation.of_place(shape, cache, block, token) for token in range(size)] for cache in caches.values()]
        return torch.stack([torch.stack(tokens, 1) for tokens in found])

    for block in range(6):
        for layer, cache in enumerate(caches.values()):
            for token in range(size):
                values = 0 if to_vllm else canonical[block, layer, :, token, 2:]
                imitation.of_place(shape, cache, block, token)[:] = values
    pools = [PoolLayout(own, "blocks layers kv tokens heads dim"), pool_of_caches(caches, 6)]
    ranges, blocks = [HeadRange(0, num_heads, num_heads), half], [[1, 4, 2], [5, 0, 3]]
    if not to_vllm:
        pools, ranges = pools[::-1], ranges[::-1]
    assert pools[0].layout.mismatch(pools[1].layout) is None
    mine, theirs = sides(pools[0].layout, ranges[0], pools[1].layout, ranges[1])
    addresses = [[extent.address for extent in pool.extents] for pool in pools]
    copy_on_host(
        CopyPlan(mine, addresses[0], theirs, addresses[1]), addresses[0][0], blocks[0], addresses[1][0], blocks[1]
    )
    for source, target in zip(*blocks, strict=True):
        if to_vllm:
            assert torch.equal(of_vllm(target), canonical[source][:, :, :, 2:])
        else:
            assert torch.equal(own[target][:, :, :, 2:], canonical[source][:, :, :, 2:])
            assert not own[target][:, :, :, :2].any(), "heads of the other rank"


def test_what_cannot_be_bridged_is_refused_by_its_name(engines, caplog):
    prefill, decode = engines(shape="blocks first"), engines(shape="smaller blocks of the kernels")
    decode.add("d", PROMPT, prefilled(prefill))
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0] == "FINISHED_ERROR"
    assert "kernel_blocks is 1 on rank 0 and 2 on rank 0" in caplog.text


@pytest.mark.parametrize("shape", [(7, 3, 4, 2, 8), (3, 2, 4, 2, 8), (16, 4), (16, 3, 4, 2, 8)])
def test_a_kv_cache_of_a_shape_that_nobody_knows_is_refused(shape):
    from hbserve_kv.integrations.vllm_pool import axes_of

    with pytest.raises(ValueError, match="does not know its dimensions"):
        axes_of(shape, 16)


@pytest.mark.parametrize("version", ["0.24", "0.33"])
@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_both_legs_at_once_and_blocks_come_while_the_rest_is_computed(engines, version, first):
    prefill, decode = engines(version=version), engines(version=version)
    if first == "decode":
        decode.add("d", PROMPT, leg(prefill, "t"))
        for _ in range(3):
            decode.step()
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    prefill.step()  # 8 tokens of 18
    if first == "prefill":
        decode.add("d", PROMPT, leg(prefill, "t"))
    until(lambda: decode.holds(PROMPT), decode)
    assert "p" not in prefill.results
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


def test_both_sides_agree_on_a_transfer_while_its_prompt_waits_to_be_computed(engines):
    prefill, decode = engines(), engines()
    free, prefill.free = prefill.free, deque()
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    decode.add("d", PROMPT, leg(prefill, "t"))
    manager = prefill.ranks[0].connector._worker.manager
    until(lambda: manager.stats().active_transfers, prefill, decode)
    assert not prefill.holds(PROMPT)
    prefill.free = free
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize("end", ["abort", "one token"])
def test_what_was_offered_as_it_arrived_and_is_not_computed_is_taken_back(engines, end):
    prefill, decode = engines(), engines(policy="recompute")
    tokens = PROMPT[:1] if end == "one token" else PROMPT
    free = prefill.free
    if end == "abort":
        prefill.free = deque()
    prefill.add("p", tokens, PREFILL | {"transfer_id": "t"})
    decode.add("d", tokens, leg(prefill, "t"))
    for _ in range(20):
        prefill.step()
        decode.step()
        time.sleep(0.002)
    if end == "abort":
        prefill.abort("p")
        prefill.free = free
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    until(lambda: prefill.is_empty, prefill)
    assert not prefill.ranks[0].connector._worker.manager.stats().num_offers


@pytest.mark.parametrize("num_hit", [4, 8, 16])
def test_what_the_decode_side_has_is_not_fetched(engines, num_hit):
    # Known elsewhere: vLLM #25399.
    prefill, decode = engines(), engines()
    decode.add("d", PROMPT, prefilled(prefill), num_hit=num_hit)
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    num_blocks, block_bytes = 5 - num_hit // 4, sum(cache[0].nbytes for cache in decode.ranks[0].caches.values())
    assert decode.figures["bytes_transferred"] == [num_blocks * block_bytes]


def test_a_full_hit_on_the_decode_side_moves_nothing_and_frees_the_prefill_side(engines):
    prefill, decode = engines(), engines()
    decode.add("d", PROMPT[:17], prefilled(prefill, tokens=PROMPT[:17]), num_hit=16)
    until(lambda: "d" in decode.results and prefill.is_empty, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    assert "bytes_transferred" not in decode.figures


def test_a_router_may_be_faster_than_the_step_that_tells_the_workers(engines):
    """vLLM answers a request before its workers hear that it has finished."""
    prefill, decode = engines(), engines()
    decode.add("d", PROMPT, prefilled(prefill))
    assert not prefill.ranks[0].connector._worker.manager.stats().num_offers
    for _ in range(100):
        decode.step()
        time.sleep(0.001)
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize(("tokens", "num_steps"), [(PROMPT, 2), (PROMPT[::-1], 5)], ids=["its KV", "another's KV"])
def test_kv_that_comes_while_a_step_is_computed_is_told_with_that_step_unless_it_is_not_valid(
    engines, tokens, num_steps
):
    prefill, decode = engines(), engines(policy="recompute")
    params = prefilled(prefill)
    prefill.step()
    votes = decode.ranks[0].connector._worker
    decode.while_computing = lambda: until(lambda: votes._votes.received | votes._votes.failed)
    decode.add("d", tokens, params)
    decode.step()
    decode.while_computing = lambda: None
    until(lambda: "d" in decode.results, decode)
    assert decode.num_steps == num_steps
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize("version", ["0.24", "0.33"])
def test_decode_requests_that_are_preempted_for_want_of_blocks_compute_their_prompts_themselves(engines, version):
    """Two have blocks for their prompts and not for their answers, and a third waits for blocks that come back. Who is
    preempted computes its prompt and what it has answered anew, in other blocks, and fetches nothing."""
    prefill, decode = engines(version=version), engines(version=version, num_blocks=13)
    prompts = {name: [(number * i + number) % 50 for i in range(18)] for number, name in enumerate("abc", 5)}
    for name, tokens in prompts.items():
        decode.add(name, tokens, prefilled(prefill, name, tokens), num_outputs=14)
    until(lambda: len(decode.results) == len(prompts), prefill, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}
    assert decode.num_preemptions > 0
    assert len(decode.figures["transfer_duration"]) == len(prompts), "each is fetched once"
    assert "num_failed_transfers" not in decode.figures


@pytest.mark.parametrize("policy", ["fail", "recompute"])
@pytest.mark.parametrize("version", ["0.24", "0.33"])
def test_a_load_that_fails_is_told_as_vllm_is_configured(engines, policy, version):
    # Known elsewhere: vLLM #20263.
    prefill, decode = engines(version=version), engines(version=version, policy=policy)
    params = prefilled(prefill)
    prefill.close()
    decode.add("d", PROMPT, params)
    until(lambda: "d" in decode.results, decode)
    expected = ("FINISHED_ERROR", None) if policy == "fail" else ("FINISHED_LENGTH_CAPPED", True)
    assert decode.results["d"][0::2] == expected
    assert decode.figures["num_failed_transfers"] == [1]
    prefill.requests.clear()  # what it did not give back ends with it
    prefill.free.extend(set(range(1, prefill.num_blocks)) - set(prefill.free))


@pytest.mark.parametrize("aborts", ["decode", "prefill"])
@pytest.mark.parametrize("at_once", [True, False], ids=["both legs at once", "one leg after the other"])
def test_an_abort_at_any_moment_gives_both_sides_their_blocks_back(engines, aborts, at_once):
    # Known elsewhere: vLLM #32255, #41269.
    prefill, decode = engines(extra={"backend": "ipc", "lease_s": 0.5}), engines()
    for moment in range(10):
        names = f"p{moment}", f"d{moment}"
        if at_once:
            prefill.add(names[0], PROMPT, PREFILL | {"transfer_id": f"t{moment}"})
            decode.add(names[1], PROMPT, leg(prefill, f"t{moment}"))
        else:
            decode.add(names[1], PROMPT, prefilled(prefill, names[0]))
        for _ in range(moment):
            prefill.step()
            decode.step()
        (prefill if aborts == "prefill" else decode).abort(names[aborts == "decode"])
        until(lambda: prefill.is_empty and decode.is_empty, prefill, decode)
    ended = {result[0::2] for name, result in decode.results.items()}
    assert ended <= {("FINISHED_ABORTED", None), ("FINISHED_ERROR", None), ("FINISHED_LENGTH_CAPPED", True)}
    assert ("FINISHED_ABORTED", None) in ended or aborts == "prefill"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("version", ["0.24", "0.33"])
def test_random_lives_of_requests_leave_nothing_and_no_answer_is_from_wrong_kv(engines, version, seed):
    rng = random.Random(seed)
    # Either may wait for the other's room, until `expiry_s`.
    extra = {"backend": "ipc", "lease_s": 0.1, "timeout_s": 2.0, "expiry_s": 0.5}
    prefill = engines(version=version, num_blocks=20, extra=extra)
    decode = engines(version=version, num_blocks=16, policy=rng.choice(["fail", "recompute"]), extra=extra)
    for number in range(30):
        p, d, tokens = f"p{number}", f"d{number}", [rng.randrange(50) for _ in range(rng.randint(2, 30))]
        if rng.random() < 0.6:
            for side in rng.sample(["prefill", "decode"], 2):
                if side == "prefill":
                    prefill.add(p, tokens, PREFILL | {"transfer_id": p})
                else:
                    decode.add(d, tokens, leg(prefill, p), num_outputs=rng.randint(1, 9))
                for _ in range(rng.randint(0, 3)):
                    prefill.step()
                    decode.step()
        else:
            decode.add(d, tokens, prefilled(prefill, p, tokens), num_hit=rng.choice([0, 0, len(tokens) // 8 * 4]))
        for _ in range(rng.randint(0, 4)):
            prefill.step()
            decode.step()
        engine = rng.choice([prefill, decode])
        if engine.running and rng.random() < 0.3:
            engine.preempt(rng.choice(engine.running).request_id, is_told=rng.random() < 0.5)
        if rng.random() < 0.4:
            engine.abort(rng.choice([p, d, f"p{rng.randint(0, number)}", f"d{rng.randint(0, number)}"]))
    for number in range(30):  # a prompt that never comes is waited for until `expiry_s`
        if f"p{number}" in prefill.results and prefill.results[f"p{number}"][0] == "FINISHED_ABORTED":
            decode.abort(f"d{number}")
    until(lambda: prefill.is_empty and decode.is_empty, prefill, decode)
    ends = {result[0::2] for result in [*prefill.results.values(), *decode.results.values()]}
    assert ends <= {("FINISHED_ABORTED", None), ("FINISHED_ERROR", None), ("FINISHED_LENGTH_CAPPED", True)}
    assert not prefill.ranks[0].connector._worker.manager.stats().num_offers


def test_who_leaves_before_the_decode_server_has_room_frees_the_prefill_server(engines):
    """vLLM's front end does so with a request that it refuses."""
    # Known elsewhere: vLLM #41269.
    prefill, decode = engines(), engines(num_blocks=3)
    decode.add("d", PROMPT, prefilled(prefill))
    for _ in range(3):
        decode.step()
    decode.abort("d")
    until(lambda: prefill.is_empty, prefill, decode)
    decode.add("e", PROMPT, prefilled(prefill, "q"))
    decode.abort("e")  # in the step in which it came
    until(lambda: prefill.is_empty, prefill, decode)


def test_a_prompt_that_nobody_fetches_gives_its_blocks_back_after_its_lease(engines):
    prefill = engines(extra={"backend": "ipc", "lease_s": 0.05})
    prefilled(prefill)
    until(lambda: prefill.is_empty, prefill)
    assert prefill.figures["num_not_delivered"] == [1]


@pytest.mark.parametrize("moment", ["nobody waits", "it is being fetched"])
@pytest.mark.parametrize("is_told", [True, False], ids=["for want of blocks", "by reset_prefix_cache of 0.24"])
def test_a_prompt_that_is_preempted_while_it_is_computed_is_delivered_or_fails_and_is_never_wrong(
    engines, moment, is_told
):
    # Known elsewhere: vLLM #49675.
    prefill, decode = engines(), engines(policy="recompute")
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    prefill.step()
    if moment == "it is being fetched":
        decode.add("d", PROMPT, leg(prefill, "t"))
        until(lambda: decode.holds(PROMPT), decode)
    prefill.preempt("p", is_told)
    prefill.add("other", [45, *PROMPT])  # the blocks get another's KV
    prefill.waiting.reverse()
    prefill.step()
    if moment == "nobody waits":
        decode.add("d", PROMPT, leg(prefill, "t"))
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    assert ("num_failed_transfers" in decode.figures) is (moment == "it is being fetched")


class Lasting(IpcTransport):
    """Whose writes fail, and may go on until the event is set."""

    has_ended: ClassVar[threading.Event]

    async def push(self, link, part):
        raise DrainUnknown("timed out")

    async def disconnect(self, link):
        await asyncio.to_thread(self.has_ended.wait)
        await super().disconnect(link)


@pytest.fixture
def lasting(engines, monkeypatch):
    """An engine that prefills and whose blocks may be read until the event is set, which comes second."""
    monkeypatch.setattr("hbserve_kv.sending.link.DRAIN_PATIENCE_S", 0.05)
    monkeypatch.setattr(Lasting, "has_ended", threading.Event(), raising=False)
    yield engines(extra={"backend": f"{__name__}:Lasting"}), Lasting.has_ended
    Lasting.has_ended.set()


def until_it_ends_unknown(prefill, *engines):
    sending = prefill.ranks[0].connector._worker._sending
    until(lambda: "p" in sending, *engines)
    offer = sending["p"].offer
    until(offer.result.done, *engines)


def test_blocks_whose_write_may_go_on_are_given_back_when_it_has_ended(engines, lasting):
    (prefill, has_ended), decode = lasting, engines(policy="recompute")
    decode.add("d", PROMPT, prefilled(prefill))
    until_it_ends_unknown(prefill, prefill, decode)
    prefill.add("other", PROMPT)
    until(lambda: "other" in prefill.results, prefill, decode)
    assert "p" in prefill.requests, "its blocks may still be read"
    has_ended.set()
    until(lambda: prefill.is_empty and "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


def test_a_preemption_waits_until_no_write_reads_its_blocks(engines, lasting):
    (prefill, has_ended), decode = lasting, engines(policy="recompute")
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    prefill.step()  # a chunk
    decode.add("d", PROMPT, leg(prefill, "t"))
    until_it_ends_unknown(prefill, decode)
    worker = prefill.ranks[0].connector._worker
    patience_s, worker._patience_s = worker._patience_s, 0.1
    with pytest.raises(TimeoutError):
        worker.preempt({"p"})
    worker._patience_s = patience_s
    has_ended.set()
    prefill.preempt("p")
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)


@pytest.mark.parametrize("transfer_id", ["t", "t" * MOST_CHARACTERS])
def test_a_transfer_id_that_a_router_uses_twice_fails_the_second_request_and_nothing_else(engines, transfer_id):
    # Known elsewhere: vLLM #42839.
    prefill, decode = engines(), engines(policy="recompute")
    for name in ("a", "b"):
        prefill.add(f"p{name}", PROMPT, PREFILL | {"transfer_id": transfer_id})
        decode.add(f"d{name}", PROMPT, leg(prefill, transfer_id))
    until(lambda: len(decode.results) == 2, prefill, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}


def test_a_transfer_id_of_two_prefill_servers_at_once_keeps_no_block_of_either(engines):
    one, other, decode = engines(), engines(), engines(policy="recompute")
    for prefill in (one, other):
        decode.add(f"d{port(prefill)}", PROMPT, leg(prefill, "t"))
    until(lambda: not decode.scheduler._scheduler._orders, decode)
    for prefill in (one, other):
        prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    until(lambda: len(decode.results) == 2, one, other, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}


@pytest.mark.parametrize("is_prefilled", [True, False])
def test_of_sequences_that_share_a_transfer_one_fetches_it_and_the_others_are_computed(engines, is_prefilled, caplog):
    """vLLM makes a request with `n` so many requests, each with the parameters of the one."""
    prefill, decode = engines(), engines()
    if is_prefilled:
        params = prefilled(prefill)
    else:
        prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
        params = leg(prefill, "t")
    for name in ("0_d", "1_d", "2_d"):
        decode.add(name, PROMPT, params)
    until(lambda: len(decode.results) == 3, prefill, decode)
    assert {result[0::2] for result in decode.results.values()} == {("FINISHED_LENGTH_CAPPED", True)}
    assert caplog.text.count("another request fetches the same KV") == 2


def test_kv_of_another_prompt_is_never_taken(engines):
    # Known elsewhere: vLLM #52234, #43094.
    prefill, decode = engines(), engines()
    other = [*PROMPT[:9], 99, *PROMPT[10:]]
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    decode.add("d", other, leg(prefill, "t"))
    until(lambda: "d" in decode.results, prefill, decode)
    assert decode.results["d"][0] == "FINISHED_ERROR"
    decode.add("e", [*PROMPT, 1], prefilled(prefill, "q"))
    until(lambda: "e" in decode.results, decode)
    assert decode.results["e"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    decode.add("end", PROMPT, prefill.results["q"][1])  # whoever comes for it after all
    until(lambda: "end" in decode.results, prefill, decode)


@pytest.mark.parametrize(
    ("params", "why"),
    [
        ({}, "it has not transfer_id"),
        ({"transfer_id": "t", "remote_port": 1, "tp_size": 3}, "tp_size is 3 on the side that prefilled it"),
        ({"transfer_id": "t", "remote_port": "x"}, "remote_port"),
        ({"transfer_id": "t", "remote_ranks": [["127.0.0.1:1"]]}, "remote_ranks"),
        ({"transfer_id": ["t"], "remote_port": 1}, "transfer_id"),
        ({"transfer_id": "t", "remote_port": 1, "tp_size": 0}, "tp_size"),
        ({"transfer_id": "a\nb", "remote_port": 1}, "transfer_id"),
        ({"transfer_id": "\ud800", "remote_port": 1}, "surrogates not allowed"),
        ({"transfer_id": "t", "remote_ranks": [["127.0.0.1:1", "\ud800"]]}, "surrogates not allowed"),
    ],
)
def test_what_cannot_be_fetched_is_computed_where_it_is_decoded(engines, params, why, caplog):
    """Whoever sends requests may write anything there; the server goes on."""
    decode = engines()
    decode.add("d", PROMPT, {"do_remote_prefill": True} | params)
    until(lambda: "d" in decode.results, decode)
    assert decode.results["d"][0::2] == ("FINISHED_LENGTH_CAPPED", True)
    assert "request d is computed here" in caplog.text
    assert why in caplog.text


def test_an_id_that_cannot_be_told_to_the_decode_side_leaves_the_other_requests_of_its_step_alone(engines):
    prefill, decode = engines(), engines()
    prefill.add("bad", PROMPT, PREFILL | {"transfer_id": "\ud800"})
    decode.add("d", PROMPT, prefilled(prefill))
    until(lambda: {"bad"} <= set(prefill.results) and "d" in decode.results, prefill, decode)
    assert decode.results["d"][0] == "FINISHED_LENGTH_CAPPED"


@pytest.mark.parametrize("address", ["no address", "127.0.0.1:99999"])
def test_an_address_that_is_none_fails_its_request_and_nothing_else(engines, address):
    decode = engines()
    decode.add("d", PROMPT, {"do_remote_prefill": True, "transfer_id": "t", "remote_ranks": [[address, ""]]})
    until(lambda: "d" in decode.results, decode)
    assert decode.results["d"][0] == "FINISHED_ERROR"
    decode.add("e", PROMPT)
    until(lambda: "e" in decode.results, decode)


def test_a_router_that_does_not_say_how_many_ranks_prefill_fails_the_request_and_reads_why(engines, caplog):
    prefill, decode = engines(tp_size=2), engines(tp_size=1)
    prefill.add("p", PROMPT, PREFILL | {"transfer_id": "t"})
    prefill.step()  # a chunk
    decode.add("d", PROMPT, leg(prefill, "t"))
    until(lambda: "d" in decode.results, decode)
    assert decode.results["d"][0] == "FINISHED_ERROR"
    assert "with heads [0, 1) of 2, where [0, 2) of 2 are needed" in caplog.text
    prefill.abort("p")  # its other rank waits for a receiver


def test_figures_are_in_vllms_form(engines):
    # Known elsewhere: vLLM #43828.
    prometheus = pytest.importorskip("prometheus_client", reason="it comes with vLLM, not with hbserve-kv")
    from hbserve_kv.integrations.vllm import HBServeConnector

    prefill, decode = engines(), engines()
    decode.add("d", PROMPT, prefilled(prefill))
    until(lambda: "d" in decode.results, prefill, decode)
    stats = HBServeConnector.build_kv_connector_stats(decode.figures)
    assert (stats.reduce()["Num successful transfers"], stats.is_empty()) == (1, False)
    registry = prometheus.CollectorRegistry()
    metrics = (prometheus.Counter, prometheus.Gauge, prometheus.Histogram)
    kinds = {kind: lambda kind=kind, **given: kind(registry=registry, **given) for kind in metrics}
    config = SimpleNamespace(kv_transfer_config=None)
    prom = HBServeConnector.build_prom_metrics(config, kinds, ["engine"], {0: ["0"]})
    prom.observe(stats.data | {"num_failed_transfers": [1, 1]}, 0)
    text = prometheus.generate_latest(registry).decode()
    assert 'vllm:hbserve_num_failed_transfers_total{engine="0"} 2.0' in text
    assert 'vllm:hbserve_bytes_transferred_count{engine="0"} 1.0' in text
    stats.reset()
    assert stats.is_empty()
    assert stats.reduce()["Num successful transfers"] == 0


@pytest.mark.parametrize(
    ("wrong", "cure"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size=2"),
        ({"groups": 2}, "--disable-hybrid-kv-cache-manager"),
        ({"spec": type("SlidingWindowSpec", (), {})}, "of SlidingWindowSpec.*--disable-sliding-window"),
        ({"extra": {"bakend": "ipc"}}, "`bakend`; it takes backend, host, port"),
    ],
)
def test_what_is_not_served_is_refused_at_start_with_its_cure(wrong, cure):
    # Known elsewhere: vLLM #23587.
    from hbserve_kv.integrations.vllm import HBServeConnector, KVConnectorRole

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, **wrong.get("parallel", {})),
        kv_transfer_config=SimpleNamespace(engine_id="e", kv_connector_extra_config=wrong.get("extra", {})),
        cache_config=SimpleNamespace(block_size=16),
    )
    spec = wrong.get("spec", imitation.FullAttentionSpec)()
    groups = [SimpleNamespace(kv_cache_spec=spec)] * wrong.get("groups", 1)
    cache = SimpleNamespace(num_blocks=2, kv_cache_groups=groups)
    with pytest.raises(ValueError, match=cure):
        HBServeConnector(config, KVConnectorRole.SCHEDULER, cache)


BASE = {
    "__init__": "vllm_config role kv_cache_config", "build_connector_meta": "scheduler_output",
    "build_kv_connector_stats": "data",
    "build_prom_metrics": "vllm_config metric_types labelnames per_engine_labelvalues",
    "get_block_ids_with_load_errors": "", "get_finished": "finished_req_ids", "get_handshake_metadata": "",
    "get_kv_connector_stats": "", "get_num_new_matched_tokens": "request num_computed_tokens",
    "handle_preemptions": "kv_connector_metadata", "on_new_request": "request", "register_kv_caches": "kv_caches",
    "request_finished": "request block_ids", "request_finished_all_groups": "request block_ids",
    "save_kv_layer": "layer_name kv_layer attn_metadata kwargs", "set_xfer_handshake_metadata": "metadata",
    "shutdown": "", "start_load_kv": "forward_context kwargs",
    "update_connector_output": "connector_output",
    "update_state_after_alloc": "request blocks num_external_tokens", "wait_for_layer_load": "layer_name",
    "wait_for_save": "",
}  # fmt: skip
"""Parameters of what the base classes of vLLM 0.24.0 and of 0.33.0 both have, and the connector overrides."""
ONLY_0_33 = {"supports_sleep_mode": "kv_transfer_config"}
ABSTRACT = [
    "build_connector_meta", "get_num_new_matched_tokens", "request_finished_all_groups", "save_kv_layer",
    "start_load_kv", "update_state_after_alloc", "wait_for_layer_load", "wait_for_save",
]  # fmt: skip
"""Of KVConnectorBase_V1 and SupportsHMA, in both."""


def test_the_connector_overrides_vllms_methods_by_their_own_names_and_parameters():
    from hbserve_kv.integrations.vllm import HBServeConnector

    mine = {name: value for name, value in vars(HBServeConnector).items() if callable(value) or name in ONLY_0_33}
    mine |= {name: getattr(HBServeConnector, name) for name in vars(HBServeConnector) if not name.startswith("_")}
    for name, method in mine.items():
        parameters = [each for each in inspect.signature(method).parameters if each != "self"]
        assert " ".join(parameters) == (BASE | ONLY_0_33)[name], name
    assert set(ABSTRACT) <= mine.keys()
    assert "register_cross_layers_kv_cache" not in vars(HBServeConnector), "0.24 alone has it"

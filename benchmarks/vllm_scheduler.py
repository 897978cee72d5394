"""The vLLM connector with vLLM's own scheduler and block manager, of which CI has only an imitation.

    pip install vllm hbserve-kv; python benchmarks/vllm_scheduler.py    # 0.24.0, 0.33.0

There are two schedulers of vLLM, one that prefills and one that decodes. Each has a worker that is this connector's own
side, and a model that is a function: the KV of a place is a number of the tokens up to it, on CPU tensors of vLLM's
shape. After each scene every request must have what one server would have answered, from the right KV, and all blocks
must be free by vLLM's own count. No GPU and no weights are needed, but vllm must be importable (also for --help), which
requires libcuda.so.1 at least.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 8, 16, 16, 40
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": NUM_HEADS * HEAD_DIM,
    "intermediate_size": 256,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "num_key_value_heads": NUM_HEADS,
    "vocab_size": 20_000,
    "max_position_embeddings": 2048,
}
PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200]
"""Lengths of prompts: around the borders of blocks, and of the chunks of 64 tokens that a step computes."""
DEADLINE_S = 60.0


def numbers(tokens: list[int]) -> list[int]:
    """Return the KV of each place, which is a number of the tokens up to it."""
    found, number = [], 0
    for token in tokens:
        number = (number * 31 + token) % 4096
        found.append(number)
    return found


def answer(prompt: list[int], num_outputs: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_outputs):
        tokens.append(numbers(tokens)[-1] * 7 % 1000)
    return tokens[len(prompt) :]


class Server:
    """One vLLM engine core: its scheduler, and a worker with one rank."""

    def __init__(self, model: Path, role: str) -> None:
        cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True)
        cache.num_gpu_blocks = NUM_BLOCKS
        extra = {"backend": "ipc", "timeout_s": 4, "lease_s": 60}
        config = VllmConfig(
            model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=2048),
            cache_config=cache,
            scheduler_config=SchedulerConfig(
                max_num_seqs=16, max_num_batched_tokens=64, max_model_len=2048, is_encoder_decoder=False,
                async_scheduling=False,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector="HBServeConnector", kv_connector_module_path="hbserve_kv.integrations.vllm", kv_role=role,
                kv_load_failure_policy="fail", kv_connector_extra_config=extra,
            ),
            device_config=DeviceConfig("cpu"),
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_DIM, dtype=torch.float32)
        layers = [f"model.layers.{layer}" for layer in range(NUM_LAYERS)]
        kv_cache = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(layers, spec)])
        grammars = StructuredOutputManager(config)
        self.scheduler = Scheduler(config, kv_cache, grammars, block_size=BLOCK_SIZE, log_stats=True)
        self.worker = KVConnectorFactory.create_connector(config, KVConnectorRole.WORKER, kv_cache)
        shape = (NUM_BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, HEAD_DIM)
        self.caches = {name: torch.full(shape, -1.0) for name in layers}
        self.worker.register_kv_caches(self.caches)
        self.scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): self.worker.get_handshake_metadata()})
        self.results: dict[str, tuple[str, list[int], Any]] = {}
        """How each request ended, its answer, and its kv_transfer_params."""
        self.num_preempted, self.num_steps = 0, 0
        self.computing_s = 0.0
        """How long a step goes on, like that of a device, after its worker has reported on transfers."""
        self._tokens: dict[str, list[int]] = {}
        self._num_prompt: dict[str, int] = {}
        self._blocks: dict[str, list[int]] = {}

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.worker.get_handshake_metadata().address.rpartition(":")
        return host, int(port)

    def add(self, name: str, prompt: list[int], num_outputs: int, params: dict[str, Any] | None) -> None:
        sampling = SamplingParams(
            max_tokens=num_outputs, ignore_eos=True, extra_args={"kv_transfer_params": params} if params else None
        )
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._tokens[name], self._num_prompt[name] = list(prompt), len(prompt)
        self.scheduler.add_request(Request(name, prompt, sampling, None, block_hasher=hasher))

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    @property
    def is_empty(self) -> bool:
        free = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        return not self.scheduler.requests and free == NUM_BLOCKS - 1  # without the null block

    def step(self) -> None:
        """Run a step as vLLM's core and model runner do."""
        scheduled, worker = self.scheduler.schedule(), self.worker
        self.num_steps += 1
        self.num_preempted += len(scheduled.preempted_req_ids or ())
        starts = dict(self._starts(scheduled))
        worker.handle_preemptions(scheduled.kv_connector_metadata)
        worker.bind_connector_metadata(scheduled.kv_connector_metadata)
        worker.start_load_kv(None)
        sampled = [self._compute(name, starts[name], count) for name, count in scheduled.num_scheduled_tokens.items()]
        if sampled:
            worker.wait_for_save()
        told = KVConnectorOutput()
        told.finished_sending, told.finished_recving = worker.get_finished(scheduled.finished_req_ids)
        told.invalid_block_ids = worker.get_block_ids_with_load_errors()
        told.kv_connector_stats = worker.get_kv_connector_stats()
        worker.clear_connector_metadata()
        places = {name: place for place, name in enumerate(scheduled.num_scheduled_tokens)}
        time.sleep(self.computing_s)
        output = ModelRunnerOutput(
            list(places), places, sampled, prompt_logprobs_dict={}, pooler_output=[], kv_connector_output=told
        )
        for of_client in self.scheduler.update_from_output(scheduled, output).values():
            for each in of_client.outputs:
                if each.finish_reason is not None:
                    name = each.request_id
                    answered = self._tokens[name][self._num_prompt[name] :]
                    self.results[name] = str(each.finish_reason), answered, each.kv_transfer_params

    def _starts(self, scheduled: Any) -> Iterator[tuple[str, int]]:
        """Yield how many tokens of each request were computed before, and note its blocks."""
        for new in scheduled.scheduled_new_reqs:
            self._blocks[new.req_id] = list(new.block_ids[0])
            yield new.req_id, new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, blocks, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.resumed_req_ids:
                self._blocks[name] = []
            self._blocks[name] += blocks[0] if blocks else []
            yield name, start

    def _compute(self, name: str, start: int, count: int) -> list[int]:
        """Compute tokens of a request. Returns what is sampled: nothing before the end of the prompt, and another token
        than expected if the KV is wrong."""
        values, blocks = numbers(self._tokens[name]), self._blocks[name]
        for place in range(start, start + count):
            for layer, cache in enumerate(self.caches.values()):
                cache[blocks[place // BLOCK_SIZE], :, place % BLOCK_SIZE] = values[place] + layer
        if start + count < len(values):
            return []
        is_right = all(
            bool((cache[blocks[place // BLOCK_SIZE], :, place % BLOCK_SIZE] == value + layer).all())
            for place, value in enumerate(values)
            for layer, cache in enumerate(self.caches.values())
        )
        self._tokens[name].append(values[-1] * 7 % 1000 if is_right else -1)
        return self._tokens[name][-1:]


def until(condition: Callable[[], bool], *servers: Server) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        for server in servers:
            server.step()
        assert time.monotonic() < deadline_s, "it does not end"
        time.sleep(0.001)


def prompts(lengths: list[int], seed: int) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(3, 20_000) for _ in range(length)] for length in lengths]


def check(prefill: Server, decode: Server, expected: dict[str, tuple[list[int], int]]) -> None:
    """Run steps until these prompts have been answered with so many tokens each, and check the answers."""
    until(lambda: expected.keys() <= decode.results.keys(), prefill, decode)
    for name, (prompt, num_outputs) in expected.items():
        assert decode.results[name][:2] == ("length", answer(prompt, num_outputs)), (name, decode.results[name])
    until(lambda: prefill.is_empty and decode.is_empty, prefill, decode)


def one_leg_after_the_other(prefill: Server, decode: Server, name: str, prompt: list[int], num_outputs: int) -> None:
    prefill.add(name, prompt, 1, dict(PREFILL))
    until(lambda: name in prefill.results, prefill, decode)
    decode.add(name, prompt, num_outputs, prefill.results[name][2])


def both_legs(prefill: Server, decode: Server, name: str, prompt: list[int], num_outputs: int) -> None:
    host, port = prefill.address
    params = {"do_remote_prefill": True, "transfer_id": name, "remote_host": host, "remote_port": port}
    decode.add(name, prompt, num_outputs, params)
    prefill.add(name, prompt, 1, PREFILL | {"transfer_id": name})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        with mock.patch("hbserve_kv.integrations.vllm.get_tensor_model_parallel_rank", return_value=0):
            prefill, decode = (Server(Path(folder), role) for role in ("kv_producer", "kv_consumer"))
    scenes(prefill, decode)


def scenes(prefill: Server, decode: Server) -> None:
    for name, send in (("one", one_leg_after_the_other), ("both", both_legs)):
        given = {f"{name}-{len(prompt)}": (prompt, 5) for prompt in prompts(LENGTHS, len(name))}
        for request, (prompt, num_outputs) in given.items():
            send(prefill, decode, request, prompt, num_outputs)
        check(prefill, decode, given)
        print(f"{send.__name__}: {len(given)} requests", flush=True)
    given = {f"long-{number}": (prompt, 60) for number, prompt in enumerate(prompts([60] * 12, 1))}
    for request, (prompt, num_outputs) in given.items():
        one_leg_after_the_other(prefill, decode, request, prompt, num_outputs)
    check(prefill, decode, given)
    assert decode.num_preempted
    print(f"preemptions of requests that decode: {decode.num_preempted}, of {len(given)} requests", flush=True)
    (soon, prompt) = prompts([90, 90], 2)
    one_leg_after_the_other(prefill, decode, "soon", soon, 1)
    prefill.step()
    num_before, decode.computing_s = decode.num_steps, 0.2
    until(lambda: "soon" in decode.results, decode)
    print(f"KV that comes while a step is computed: a token after {decode.num_steps - num_before} steps", flush=True)
    decode.computing_s = 0.0
    until(lambda: prefill.is_empty and decode.is_empty, prefill, decode)
    host, port = prefill.address
    never = {"do_remote_prefill": True, "transfer_id": "never", "remote_host": host, "remote_port": port}
    decode.add("aborted", prompt, 5, never)
    decode.step()
    decode.abort("aborted")
    until(lambda: decode.is_empty, prefill, decode)
    print("an abort while the KV is awaited: all blocks are back", flush=True)
    one_leg_after_the_other(prefill, decode, "lost", prompt, 5)
    prefill.worker.shutdown()
    until(lambda: "lost" in decode.results and decode.is_empty, decode)
    assert decode.results["lost"][0] == "error"
    print("a prefill server that ends: its request fails, all blocks are back", flush=True)
    decode.worker.shutdown()


if __name__ == "__main__":
    main()

"""Prompts that are computed before their decode instance has granted, with real processes that freeze and die."""

import asyncio
import os
import signal

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve_testing.narrowing import present
from hbserve_testing.processes import freeze
from hbserve_testing.waits import until

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BLOCK = 16


@pytest.mark.warm
async def test_a_decode_instance_that_dies_before_it_grants_costs_the_last_block_of_the_prompt(small_model):
    prompt = [3 + 7 * i % 250 for i in range(6 * BLOCK + 5)]
    hybrid = LLM(str(small_model("qwen3")), num_kvcache_blocks=64, kvcache_block_size=BLOCK)
    expected = hybrid.generate([prompt], PARAMS, use_tqdm=False)[0]["token_ids"]
    hybrid.exit()
    roles = {"prefill-0": "prefill", "decode-0": "decode", "decode-1": "decode"}
    config = PdDisaggConfig(
        model_path=str(small_model("qwen3")), num_blocks=64, block_size=BLOCK, chunk_size=32,
        gpu_instances=[
            {"instance_id": name, "instance_type": role, "kv_rank": rank}
            for rank, (name, role) in enumerate(roles.items())
        ],
    )  # fmt: skip
    async with DisaggregatedLLM(config) as llm:
        handles = llm.scheduler.fleet.handles
        pids = {name: present(handles[name].info).pid for name in roles}
        for name in ("decode-0", "decode-1"):
            freeze(pids[name])
        answering = asyncio.create_task(llm.generate([prompt], PARAMS))
        await until(lambda: llm.scheduler.running_requests)
        await until(lambda: present(handles["prefill-0"].last_stats).prefill_tokens == len(prompt))
        assert not answering.done(), "nobody grants"
        (request,) = llm.scheduler.running_requests.values()
        assert request.output == [], "and so the first token is not told"
        used = request.attempts[-1].decode_instance
        (other,) = {"decode-0", "decode-1"} - {used}
        os.kill(pids[used], signal.SIGKILL)
        os.kill(pids[other], signal.SIGCONT)
        (result,) = await answering
        assert result["token_ids"] == expected
        assert (result["num_attempts"], result["decode_instance"]) == (2, other)
        await llm.refresh_system_stats()
        again = present(handles["prefill-0"].last_stats).prefill_tokens - len(prompt)
        # Twice on a machine so slow that the blocks were given back meanwhile: see GRANT_PATIENCE_S.
        assert again in (len(prompt) % BLOCK, 2 * (len(prompt) % BLOCK))
        for name in ("prefill-0", other):
            await until(lambda name=name: present(handles[name].last_stats).active_requests == 0)
            assert present(handles[name].last_stats).free_blocks == 64

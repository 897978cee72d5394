"""Two prefill and two decode instances under a mixed load: everything right, all four used, then everything empty."""

import random

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

NUM_REQUESTS = 200


def workload() -> tuple[list[list[int]], list[SamplingParams]]:
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 250) for _ in range(draw.randint(1, 150))] for _ in range(NUM_REQUESTS)]
    params = [
        SamplingParams(temperature=0, max_tokens=draw.randint(1, 24), ignore_eos=draw.random() < 0.5) for _ in prompts
    ]
    return prompts, params


@pytest.mark.warm
async def test_two_prefill_and_two_decode_instances_share_200_requests_and_end_empty(small_model, until_empty):
    prompts, params = workload()
    hybrid = LLM(str(small_model("qwen3")), num_kvcache_blocks=2000, kvcache_block_size=16)
    expected = [result["token_ids"] for result in hybrid.generate(prompts, params, use_tqdm=False)]
    hybrid.exit()

    instances = [
        {
            "instance_id": f"{role}-{i}",
            "instance_type": role,
            "gpu_id": 0,
            "host": "127.0.0.1",
            "port": 0,
            "kv_rank": rank + i,
        }
        for rank, role in [(0, "prefill"), (2, "decode")]
        for i in range(2)
    ]
    # 100 blocks of 16 tokens hold about ten of the requests: the decode side must make some wait, and preempt.
    config = PdDisaggConfig(
        model_path=str(small_model("qwen3")), gpu_instances=instances, num_blocks=100, block_size=16, chunk_size=48
    )
    async with DisaggregatedLLM(config) as llm:
        results = await llm.generate(prompts, params)
        assert [result["token_ids"] for result in results] == expected

        stats = await until_empty(llm)
        scheduler = stats["cpu_scheduler"]
        assert scheduler["completed_requests"] == scheduler["total_requests"] == NUM_REQUESTS
        assert scheduler["success_rate"] == 1
        assert set(stats["gpu_instances"]) == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        for instance_id, instance in stats["gpu_instances"].items():
            assert instance["total_requests"] > 0, f"{instance_id} was not used"

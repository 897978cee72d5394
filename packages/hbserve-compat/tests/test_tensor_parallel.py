"""tensor_parallel_size=2, in this process and in an instance of its own."""

import os
import signal
from pathlib import Path

import pytest

from hbserve import LLM, SamplingParams
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.processes.launcher import instance_settings
from hbserve_core import RankFailed
from hbserve_scheduler import convert
from hbserve_testing.processes import children_of, command_of

pytestmark = pytest.mark.warm

PARAMS = SamplingParams(0, 10, ignore_eos=True)
PROMPTS = ["Hello", [5, 6, 7] * 20]
HYBRID = [{"instance_id": "hybrid-0", "instance_type": "hybrid"}]


def ranks() -> list[int]:
    """Return the pids of the ranks that this process has started."""
    return [pid for pid in children_of(os.getpid()) if "hbserve_core.ranks.worker_main" in command_of(pid)]


@pytest.fixture(scope="module")
def expected(small_model) -> list[list[int]]:
    llm = LLM(small_model("qwen3"), num_blocks=100)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    llm.exit()
    return [output["token_ids"] for output in outputs]


def test_an_llm_of_two_ranks_gives_the_tokens_of_one_names_a_lost_rank_and_leaves_none(small_model, expected):
    llm = LLM(small_model("qwen3"), num_blocks=100, tensor_parallel_size=2)
    (pid,) = ranks()
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankFailed, match=rf"rank 1 of 2 \(pid {pid}\) was ended by SIGKILL"):
        llm.generate(PROMPTS, SamplingParams(0, 400, ignore_eos=True), use_tqdm=False)
    llm.exit()
    assert ranks() == []


async def test_a_hybrid_instance_of_two_ranks_gives_the_tokens_of_one(small_model, expected):
    config = PdDisaggConfig(
        small_model("qwen3"), num_blocks=100, tensor_parallel_size=2, gpu_instances=HYBRID, device="cpu"
    )
    async with DisaggregatedLLM(config) as llm:
        results = await llm.generate(PROMPTS, PARAMS)
        assert [result["token_ids"] for result in results] == expected


def test_a_model_that_cannot_be_divided_is_told_before_anything_starts(small_model):
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3: num_attention_heads=4 .*allowed for .*: 1, 2, 4"):
        LLM(small_model("qwen3"), tensor_parallel_size=3)
    assert ranks() == []


def test_instances_share_a_gpu_where_their_ranks_overlap():
    """Ranks of the first have GPUs 0 and 1, of the second 1 and 2, of the third 3 and 4, and the fourth has GPU 2."""
    instances = [
        {"instance_id": str(gpu), "instance_type": "hybrid", "gpu_id": gpu, "kv_rank": gpu} for gpu in (0, 1, 3)
    ]
    instances += [{"instance_id": "2", "instance_type": "hybrid", "gpu_id": 2, "kv_rank": 2, "tensor_parallel_size": 1}]
    config = convert({"model": {"tensor_parallel_size": 2}, "gpu_instances": instances})
    settings = [instance_settings(config, each, Path("model"), log_level="INFO") for each in config.gpu_instances]
    assert [each["num_on_gpu"] for each in settings] == [2, 2, 1, 2]

"""A scheduler of one's own: short prompts first.

Run it: uv run python examples/custom_scheduler.py [MODEL_FOLDER]
"""

import asyncio
import sys

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.pd_disagg.cpu_scheduler import CpuScheduler
from hbserve.sampling_params import SamplingParams


class ShortestPromptFirst(CpuScheduler):
    """A long prompt waits while shorter ones are there. (Add ageing before real use: it could wait for ever.)"""

    async def _schedule_waiting_requests(self) -> None:
        while self.waiting_requests and self.has_room():
            self.start_request(min(self.waiting_requests, key=lambda entry: entry.num_prompt_tokens))


async def main(model_path: str | None) -> None:
    # One prompt at a time is with the prefill instance, so that the order matters.
    config = PdDisaggConfig(model_path=model_path, scheduler={"max_inflight_prefills": 1})
    prompts = ["Tell me a story about the sea. " * 10, "Hi!", "What is a prefix cache? " * 5]
    async with DisaggregatedLLM(config, scheduler=ShortestPromptFirst) as llm:
        results = await llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{len(prompt):4} characters: first token after {result['ttft_s'] * 1e3:.0f} ms")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))

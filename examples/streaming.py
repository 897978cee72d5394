"""Several answers at once, each streamed as it comes; one reader has seen enough early, which aborts its request.

Run it: uv run python examples/streaming.py [MODEL_FOLDER]
"""

import asyncio
import contextlib
import sys

from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.sampling_params import SamplingParams


async def read(llm: DisaggregatedLLM, name: str, prompt: str, most_characters: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    text, end = "", "left"
    # `aclosing`: leaving the loop ends the request at once, and not when the generator is collected.
    async with contextlib.aclosing(llm.stream(prompt, params, request_id=name)) as deltas:
        async for delta in deltas:
            text += delta["text"]
            print(f"{name}: +{len(delta['token_ids'])} tokens, {len(text)} characters")
            if len(text) > most_characters:
                break
            end = delta["finish_reason"] or end
    print(f"{name} {end}: {text!r}")


async def main(model_path: str | None) -> None:
    async with DisaggregatedLLM(PdDisaggConfig(model_path=model_path)) as llm:
        await asyncio.gather(
            read(llm, "patient", "Tell me a story about the sea.", most_characters=10_000),
            read(llm, "hasty", "Tell me a story about a mountain.", most_characters=20),
        )
        stats = llm.get_system_stats()["cpu_scheduler"]
    print(f"{stats['completed_requests']} completed, {stats['aborted_requests']} aborted")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else None))

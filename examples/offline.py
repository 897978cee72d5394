"""Many prompts at once, in one process: a script that has its prompts and wants its answers.

Run it: uv run python examples/offline.py [MODEL_FOLDER]
"""

import sys

from hbserve import LLM, SamplingParams


def main(model_path: str | None) -> None:
    prompts = ["The capital of France is", "机器学习是", "A haiku about the sea:"]
    params = SamplingParams(temperature=0.6, max_tokens=32, seed=0)
    with LLM(model_path) as llm:  # with kv_transfer_backend="nccl", prefill and decode run apart
        outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{prompt!r}: {output['text']!r} ({len(output['token_ids'])} tokens)")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

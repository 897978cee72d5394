"""Tokens a second of one hybrid engine and of transformers' `generate`: the same model, prompts, threads and number of
tokens, in one run.

    uv run python benchmarks/hybrid_vs_transformers.py --model FOLDER --batch-sizes 1 16

Without --model, the demo model is used. The two take turns, so that another load on the machine hits both; the best
round of each counts. The limit is what the machine's memory allows: each decode step reads every weight once.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.torch_runner.runner import ModelRunner
from hbserve_rpc import SamplingParams

Generate = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    folder = args.model or demo_model()
    peer = transformers_generate(folder, args.dtype)
    ours, weight_bytes = engine_generate(folder, args)
    bandwidth = read_bandwidth()
    print(f"torch {torch.__version__}, {args.threads} threads, {args.dtype}, {folder}")
    print(f"memory reads at {bandwidth / 1e9:.1f} GB/s; a decode step reads {weight_bytes / 1e6:.0f} MB of weights")
    for batch_size in args.batch_sizes:
        compare(peer, ours, batch_size, args, limit=batch_size * bandwidth / weight_bytes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def demo_model() -> Path:
    from hbserve.models.demo_model import demo_model_path

    return Path(demo_model_path())


def transformers_generate(folder: Path, dtype: str) -> Generate:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        given = torch.tensor(prompts)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, min_new_tokens=count, max_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [row[len(prompts[0]) :] for row in out.tolist()]

    return generate


def engine_generate(folder: Path, args: argparse.Namespace) -> tuple[Generate, int]:
    """Make a function that generates with the engine. Returns it, and the bytes of weights that one step reads."""
    config = InstanceConfig(
        model_path=str(folder), dtype=args.dtype, device="cpu", prefix_caching=False, num_threads=args.threads,
        max_num_batched_tokens=4096, max_chunk_prefill_tokens=4096,
    )  # fmt: skip
    runner = ModelRunner(config)
    engine = Engine(config, runner)

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        tokens: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
        for index, prompt in enumerate(prompts):
            engine.add(str(index), prompt, params)
        while engine.has_work():
            for output in engine.step():
                if output.token_id is not None:
                    tokens[output.request_id].append(output.token_id)
        return list(tokens.values())

    return generate, step_weight_bytes(runner)


def step_weight_bytes(runner: ModelRunner) -> int:
    model = runner.model_config
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    layer = model.hidden_size * (heads + 3 * model.intermediate_size)
    return (model.num_layers * layer + model.vocab_size * model.hidden_size) * runner.dtype.itemsize


def read_bandwidth() -> float:
    """Measure the bytes per second at which all threads read memory that is in no cache."""
    block = torch.ones(64 << 20)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return block.nbytes / min(times)


def compare(peer: Generate, ours: Generate, batch_size: int, args: argparse.Namespace, limit: float) -> None:
    chosen = random.Random(batch_size)
    prompts = [[chosen.randrange(10, 1000) for _ in range(args.prompt_tokens)] for _ in range(batch_size)]
    times: dict[str, list[float]] = {"transformers": [], "hbserve": []}
    tokens: dict[str, list[list[int]]] = {}
    for round_number in range(args.rounds + 1):
        for name, generate in (("transformers", peer), ("hbserve", ours)):
            gc.collect()
            start = time.perf_counter()
            tokens[name] = generate(prompts, args.output_tokens)
            # The first round warms up: both build kernels for the shapes that they meet.
            if round_number:
                times[name].append(time.perf_counter() - start)
    count = batch_size * args.output_tokens
    assert all(len(row) == args.output_tokens for rows in tokens.values() for row in rows)
    rates = {name: count / min(values) for name, values in times.items()}
    medians = {name: count / statistics.median(values) for name, values in times.items()}
    same = sum(a == b for a, b in zip(tokens["transformers"], tokens["hbserve"], strict=True))
    print(
        f"batch {batch_size:3d}, {args.prompt_tokens} + {args.output_tokens} tokens: "
        f"hbserve {rates['hbserve']:.1f} tok/s, transformers {rates['transformers']:.1f} tok/s, "
        f"ratio {rates['hbserve'] / rates['transformers']:.2f} (of medians "
        f"{medians['hbserve'] / medians['transformers']:.2f}); {rates['hbserve'] / limit:.0%} of the memory limit "
        f"{limit:.0f} tok/s; {same} of {batch_size} outputs identical"
    )


if __name__ == "__main__":
    main()

"""Rates of a mixture of experts on vLLM and on HBServe, on the same GPUs, in the four workloads of `bench engine`.

    pip install vllm==0.24.0; python benchmarks/mixture_beside_vllm.py --folder /dev/shm/mixture
    python benchmarks/mixture_beside_vllm.py --folder /dev/shm/mixture --layers 12 --ranks 2

The script writes a checkpoint of Qwen3-30B-A3B's shape with random numbers in 8-bit floats to `--folder`, unless there
is one, and runs both engines on it, one after the other. Both have the same weights and sample tokens at random, so
that rows choose different experts. Both runs of a workload are printed; the first may compile on the way. The physical
limit of each is what `bench engine` prints.
Routers are in 16 bits, as in published checkpoints, and config.json says so (`modules_to_not_convert`). Without that,
and with `load_format: dummy` too, vLLM takes a router for 8-bit floats whose scales nothing has set. Its choices then
are not numbers, all rows have the same eight experts, and a step takes two thirds of the time.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

NUM_EXPERTS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 128, 2048, 768, 32, 4, 128, 151936
STD, SCALE, LARGEST = 0.02, 2.0**-12, 448.0
"""Standard deviation of weights, value of all their scales, and largest 8-bit float."""


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, num_layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(8) as threads:
        places = list(threads.map(lambda layer: write_layer(folder, layer), range(num_layers)))
    head = {
        "model.embed_tokens.weight": numbers(VOCABULARY, HIDDEN), "model.norm.weight": ones(HIDDEN),
        "lm_head.weight": numbers(VOCABULARY, HIDDEN),
    }  # fmt: skip
    save_file(head, folder / "model-head.safetensors")
    places.append(dict.fromkeys(head, "model-head.safetensors"))
    weight_map = {name: file for each in places for name, file in each.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(configuration(num_layers)))  # last: it says that all is there


def configuration(num_layers: int) -> dict[str, Any]:
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(num_layers)]
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": 6144, "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "num_experts": NUM_EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": INNER, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": VOCABULARY, "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "attention_bias": False, "tie_word_embeddings": False,
        "bos_token_id": 151643, "eos_token_id": 151645, "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
            "modules_to_not_convert": ["lm_head", *routers],
        },
    }  # fmt: skip


def write_layer(folder: Path, layer: int) -> dict[str, str]:
    """Write one layer to a file. Returns the name of the file for each tensor."""
    prefix, file = f"model.layers.{layer}", f"model-{layer:05d}.safetensors"
    of_heads, of_kv_heads = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (of_heads, HIDDEN), "self_attn.k_proj": (of_kv_heads, HIDDEN),
        "self_attn.v_proj": (of_kv_heads, HIDDEN), "self_attn.o_proj": (HIDDEN, of_heads),
    }  # fmt: skip
    for expert in range(NUM_EXPERTS):
        of_expert = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        shapes |= {f"mlp.experts.{expert}.{name}": shape for name, shape in of_expert.items()}
    tensors = {f"{prefix}.mlp.gate.weight": numbers(NUM_EXPERTS, HIDDEN)}
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN, "self_attn.q_norm": HEAD_DIM}
    for name, size in (norms | {"self_attn.k_norm": HEAD_DIM}).items():
        tensors[f"{prefix}.{name}.weight"] = ones(size)
    for name, (rows, columns) in shapes.items():
        # A number beyond the largest becomes none.
        narrow = (normal(rows, columns) * (STD / SCALE)).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        tensors[f"{prefix}.{name}.weight"] = narrow.cpu()
        tensors[f"{prefix}.{name}.weight_scale_inv"] = torch.full((rows // 128, columns // 128), SCALE)
    save_file(tensors, folder / file)
    return dict.fromkeys(tensors, file)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda" if torch.cuda.is_available() else "cpu")


def numbers(*shape: int) -> torch.Tensor:
    return (normal(*shape) * STD).bfloat16().cpu()


def ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


# ---- the engines -----------------------------------------------------------------------------------------------------


def measure_vllm(folder: Path, ranks: int) -> None:
    """Run the workloads of hbserve_core/bench/workloads.py on vLLM."""
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), max_model_len=4096, max_num_seqs=512, tensor_parallel_size=ranks, skip_tokenizer_init=True)

    def seconds(prompt_lens: list[int], output_lens: list[int]) -> float:
        prompts = [{"prompt_token_ids": random.choices(range(10000), k=length)} for length in prompt_lens]
        params = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length, detokenize=False)
            for length in output_lens
        ]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - began

    seconds([100], [16])
    for _ in range(2):
        lengths = [[random.randint(100, 1024) for _ in range(256)] for _ in range(2)]
        print(f"vLLM mixed    {sum(lengths[1]) / seconds(*lengths):8.0f} out tok/s", flush=True)
    for _ in range(2):
        print(f"vLLM single   {512 / seconds([512], [512]):8.0f} out tok/s", flush=True)
    for _ in range(2):
        print(f"vLLM prefill  {64 * 2048 / seconds([2048] * 64, [1] * 64):8.0f} in tok/s", flush=True)
    for _ in range(2):
        prompts_s = seconds([1024] * 256, [1] * 256)
        step_s = (seconds([1024] * 256, [257] * 256) - prompts_s) / 256
        print(f"vLLM decode   {256 / step_s:8.0f} out tok/s {1e3 * step_s:8.2f} ms a decode step", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="32 GB with all layers")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--only", choices=["write", "vllm", "hbserve"], help="one part; all by default")
    options = parser.parse_args()
    if not (options.folder / "config.json").exists():
        write_checkpoint(options.folder, options.layers)
    folder, ranks = str(options.folder), str(options.ranks)
    if options.only is None:
        # In a process of its own: it keeps the GPU's memory until it ends.
        subprocess.run([sys.executable, __file__, "--folder", folder, "--ranks", ranks, "--only", "vllm"], check=True)
    if options.only == "vllm":
        measure_vllm(options.folder, options.ranks)
    if options.only in (None, "hbserve"):
        command = [sys.executable, "-m", "hbserve", "bench", "engine", "--model", folder]
        subprocess.run([*command, "--tensor-parallel-size", ranks], check=True)


if __name__ == "__main__":
    main()

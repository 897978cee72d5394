"""Random models, settings and requests on a GPU, to compare CudaRunner's numbers with those of the plain runner.

    uv run python benchmarks/random_models.py --seconds 300 --processes 14

Each case has a small model of some family, of usual and of other sizes, in 32 or 16 bits or with weights in 8 or 4; an
engine with random settings; and random requests. The requests come in waves, and then once more, with cached prefixes
and beside other requests. The log-probability of each token is compared with the plain runner's in float32. The bar is
a multiple of the plain runner's own differences in the case's dtype, which are due to rounding alone.

Many processes should share the device. They hold each other up, so that programs and warps of a kernel differ in speed,
which finds one that does not wait for another. A case that fails, or differs by more than rounding explains, is
printed; `--first N --cases 1` repeats case N. With --ranks 2, the model is split over two GPUs.
"""

import argparse
import gc
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parent.parent / "packages/hbserve-core/tests"))

from hbserve_core_quantised import AWQ_ORDER, packed

from hbserve_core import Engine, HBServeCoreError, InstanceConfig, ModelRunner, make_runner
from hbserve_rpc import SamplingParams

Request = tuple[str, list[int], SamplingParams]
FAMILIES = {
    "gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig", "granite": "GraniteConfig", "llama": "LlamaConfig",
    "mistral": "MistralConfig", "mixtral": "MixtralConfig", "olmo2": "Olmo2Config", "olmoe": "OlmoeConfig",
    "opt": "OPTConfig", "phi3": "Phi3Config", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config",
    "qwen3-moe": "Qwen3MoeConfig", "seed-oss": "SeedOssConfig", "smollm3": "SmolLM3Config",
    "stablelm": "StableLmConfig", "starcoder2": "Starcoder2Config",
}  # fmt: skip
MIXTURES = ("mixtral", "olmoe", "qwen3-moe")
OWN_HEAD_DIM = ("gemma2", "gemma3", "llama", "mistral", "mixtral", "qwen3", "qwen3-moe", "seed-oss")
"""Families whose heads need not be parts of the hidden size."""
WINDOWED = ("gemma2", "gemma3", "mistral", "mixtral", "phi3", "starcoder2")
MAX_MODEL_LEN = 2048
NARROW = (None, None, "fp8 block", "fp8 row", "fp8 tensor", "awq", "gptq")
QUANTILES = (0.5, 0.9, 0.99)
FEW = 20
"""Number of differences below which their quantiles are left to chance, so that only the largest is judged."""
ROUNDING, EIGHT_BIT_ROUNDING = 2.0, 9.0
"""Allowed multiple of the plain runner's differences, and, if activations become 8-bit floats too, of those of
bfloat16."""
SLACK, NARROW_SLACK = 0.005, 0.04
"""Difference that is always allowed. The second is for 8-bit keys, values or activations, which may be rounded to
either side."""


@dataclass
class Case:
    """One model, and the settings of its engine."""

    family: str
    sizes: dict[str, Any]
    narrow: str | None
    settings: dict[str, Any]

    @property
    def has_8_bit_rows(self) -> bool:
        kept = self.settings["keep_activations"] or self.settings["widen_weights"]
        return self.narrow is not None and self.narrow.startswith("fp8") and not kept

    @property
    def compared_dtype(self) -> str:
        """The dtype of the plain runner whose rounding is the measure."""
        return "bfloat16" if self.has_8_bit_rows else str(self.settings["dtype"])

    def allowed(self, noise: list[float]) -> list[float]:
        """Return the allowed difference for each of QUANTILES, given those between the plain runner's two dtypes."""
        factor = EIGHT_BIT_ROUNDING if self.has_8_bit_rows else ROUNDING
        is_narrow = self.has_8_bit_rows or self.settings["kv_cache_dtype"] == "fp8"
        slack = NARROW_SLACK if is_narrow else SLACK
        found = [factor * each + slack * times for each, times in zip(noise, (1, 2, 4), strict=True)]
        # A rounding can exchange an expert, which changes everything that follows.
        return found[:2] if self.family in MIXTURES else found


# ---- a case ----------------------------------------------------------------------------------------------------------


def random_case(chance: random.Random, ranks: int) -> Case:
    family = chance.choice(list(FAMILIES))
    block = chance.choice((8, 16, 16, 32, 64))
    settings = {
        "block_size": block,
        "num_blocks": chance.choice((300, 1200)) * 16 // block,
        "dtype": chance.choice(("bfloat16", "bfloat16", "float16", "float32")),
        "kv_cache_dtype": chance.choice(("auto", "auto", "fp8")),
        "chunk_size": chance.choice((16, 24, 100, 512, "auto")),
        "max_num_batched_tokens": chance.choice((64, 200, 512, 2048)),
        "max_num_seqs": chance.choice((1, 3, 8, 17, 40, 70, 140)),
        "cuda_graph_enabled": chance.random() < 0.7,
        "cuda_graph_max_seq_len": chance.choice((64, 512)),
        "prefix_caching": chance.random() < 0.8,
        "widen_weights": chance.random() < 0.1,
        "keep_activations": chance.random() < 0.4,
        "tensor_parallel_size": ranks,
        "expert_parallel": ranks > 1 and family in MIXTURES and chance.random() < 0.5,
        "max_model_len": MAX_MODEL_LEN,
    }
    return Case(family, random_sizes(chance, family, ranks), chance.choice(NARROW), settings)


def random_sizes(chance: random.Random, family: str, ranks: int) -> dict[str, Any]:
    """Draw the arguments of the family's configuration."""
    key_heads = chance.choice((1, 2, 2, 3, 4, 4, 8) if ranks == 1 else (2, 4, 8))
    heads = key_heads * chance.choice((1, 2, 2, 3, 4, 5, 6, 7, 8))
    head_dim = chance.choice((16, 32, 64, 64, 80, 96, 112, 128, 128, 192, 256))
    if heads * head_dim > 4096:
        head_dim = 64
    sizes: dict[str, Any] = {
        "vocab_size": chance.choice((257, 1000, 4096, 32003, 49152, 151936)),
        "num_hidden_layers": chance.choice((1, 2, 2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "hidden_size": heads * head_dim,
        "intermediate_size": chance.choice((72, 256, 512, 704, 1000, 1536, 2816)),
        "max_position_embeddings": 2 * MAX_MODEL_LEN,
        "pad_token_id": 0,
        "tie_word_embeddings": chance.random() < 0.4,
    }
    if family in OWN_HEAD_DIM:
        sizes |= {"head_dim": head_dim, "hidden_size": heads * chance.choice((8, 16, 24, 40, 64, 96))}
    if family in WINDOWED:
        sizes["sliding_window"] = chance.choice((5, 16, 33, 100, 256, 777))
    return sizes | of_family(chance, family, sizes)


def of_family(chance: random.Random, family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Draw the arguments that only this family has."""
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    if family in MIXTURES:
        count = chance.choice((3, 4, 8, 16, 60))
        inner = "moe_intermediate_size" if family == "qwen3-moe" else "intermediate_size"
        return {
            "num_local_experts" if family == "mixtral" else "num_experts": count,
            "num_experts_per_tok": min(count, chance.choice((1, 2, 4, 6, 8))),
            inner: chance.choice((64, 96, 128, 192, 352, 704, 768)),
        }
    if family in ("gemma2", "gemma3"):
        return {"query_pre_attn_scalar": head_dim, "final_logit_softcapping": chance.choice((None, 30.0))}
    if family == "granite":
        return {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "attention_multiplier": head_dim**-0.5}
    if family == "opt":
        return {"ffn_dim": sizes["intermediate_size"], "word_embed_proj_dim": sizes["hidden_size"]}
    if family in ("phi3", "stablelm"):
        partial = chance.choice((0.25, 0.5, 1.0))
        return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": partial}}
    return {"attention_bias": True} if family == "llama" and chance.random() < 0.4 else {}


def random_requests(chance: random.Random, case: Case) -> list[Request]:
    """Draw requests. Some begin alike; some ask for log-probabilities, and some for those of their prompts too."""
    longest, vocab_size, block = chance.choice((40, 300, 1400)), case.sizes["vocab_size"], case.settings["block_size"]
    common = [chance.randrange(3, vocab_size) for _ in range(longest)]
    requests = []
    for number in range(chance.choice((1, 2, 5, 12, 40, 90))):
        borders = (1, 2, 15, 16, 17, block - 1, block, block + 1, 64, 128)
        length = min(longest, chance.choice(borders) if chance.random() < 0.4 else chance.randint(1, longest))
        begin = common[: chance.randrange(length)] if chance.random() < 0.4 else []
        tokens = begin + [chance.randrange(3, vocab_size) for _ in range(length - len(begin))]
        wanted: dict[str, Any] = chance.choice(({}, {"logprobs": 0}, {"logprobs": 0, "prompt_logprobs": 0}))
        params = SamplingParams(temperature=0, max_tokens=chance.choice((1, 2, 7, 20)), ignore_eos=True, **wanted)
        requests.append((str(number), tokens, params))
    return requests


# ---- its model -------------------------------------------------------------------------------------------------------


def write_model(chance: random.Random, case: Case, folder: Path) -> None:
    """Write a model with weights by which attention is sharp, and all of the context matters."""
    config = getattr(transformers, FAMILIES[case.family])(**case.sizes)
    torch.manual_seed(chance.randrange(1 << 30))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            mean = 1.0 if "norm" in name and "bias" not in name else 0.0
            torch.nn.init.normal_(weight, mean, 0.1)
        else:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.5 if "embed" in name or "lm_head" in name else 0.9
            torch.nn.init.normal_(weight, 0.0, gain * weight.shape[-1] ** -0.5)
    dtype = torch.bfloat16 if case.settings["dtype"] == "bfloat16" else torch.float32
    model.to(dtype).save_pretrained(folder, max_shard_size="100GB")
    if case.narrow is not None:
        make_narrow(chance, folder, case.narrow)


def make_narrow(chance: random.Random, folder: Path, kind: str) -> None:
    """Rewrite the folder's projections in 8 or 4 bits; those whose inputs are no whole groups of 4-bit numbers stay."""
    stored: dict[str, torch.Tensor] = {}
    generator, group = torch.Generator().manual_seed(chance.randrange(1 << 30)), chance.choice((32, 64, 128))
    for name, weight in load_file(folder / "model.safetensors").items():
        rows, columns = weight.shape if weight.dim() == 2 else (1, 1)
        is_projection = name.endswith("weight") and ("proj" in name or ".fc" in name or ".experts." in name)
        if weight.dim() != 2 or not is_projection or (kind in ("awq", "gptq") and (rows % 8 or columns % group)):
            stored[name] = weight.clone()
        elif kind in ("awq", "gptq"):
            stored |= {name.removesuffix("weight") + part: each for part, each in
                       of_4_bits(kind, rows, columns, group, generator).items()}  # fmt: skip
        else:
            stored |= of_8_bits(kind, name, weight.float())
    save_file(
        {name: each.contiguous() for name, each in stored.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config = json.loads((folder / "config.json").read_text())
    weights = {"num_bits": 8, "type": "float", "strategy": "channel" if kind == "fp8 row" else "tensor"}
    groups = {"g": {"weights": weights, "input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}}
    config["quantization_config"] = {
        "awq": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True},
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False},
        "fp8 block": {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    }.get(kind, {"quant_method": "compressed-tensors", "config_groups": groups})
    (folder / "config.json").write_text(json.dumps(config))


def of_4_bits(kind: str, rows: int, columns: int, group: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    numbers = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(6, 10, (columns // group, rows), generator=generator)
    scales = ((torch.rand(columns // group, rows, generator=generator) + 0.5) * columns**-0.5 / 4.6).half()
    if kind == "awq":
        return {"qweight": packed(numbers, AWQ_ORDER), "qzeros": packed(zeros, AWQ_ORDER), "scales": scales}
    index = (torch.arange(columns) // group).to(torch.int32)
    return {"qweight": packed(numbers.t()).t(), "qzeros": packed(zeros - 1), "scales": scales, "g_idx": index}


def of_8_bits(kind: str, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    down, across = {"fp8 block": (128, 128), "fp8 row": (1, columns)}.get(kind, (rows, columns))
    padded = torch.nn.functional.pad(weight, (0, -columns % across, 0, -rows % down))
    blocks = padded.view(padded.shape[0] // down, down, padded.shape[1] // across, across)
    scales = (blocks.abs().amax((1, 3)) / 448).clamp_min(1e-6)
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns].to(torch.float8_e4m3fn)
    if kind == "fp8 block":
        return {name: values, f"{name}_scale_inv": scales}
    return {name: values, f"{name}_scale": scales if kind == "fp8 row" else scales.view(1)}


# ---- what both say ---------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]
    """Log-probabilities of the tokens, if they were asked for."""
    of_prompt: list[float]
    """Log-probabilities of the prompt's tokens except the first, if they were asked for."""


def answers(engine: Engine, requests: list[Request], chance: random.Random | None = None) -> list[Answer]:
    """Answer requests. With `chance`, they come in waves; without, all at once."""
    found = [Answer([], [], []) for _ in requests]
    waiting = list(requests)
    while waiting or engine.has_work():
        for _ in range(min(len(waiting), len(waiting) if chance is None else chance.choice((0, 1, 3, 20)))):
            engine.add(*waiting.pop(0))
        for output in engine.step() if engine.has_work() else []:
            number = int(output.request_id)
            answer, prompt = found[number], requests[number][1]
            answer.logprobs += [each[t] for each, t in zip(output.all_logprobs, output.token_ids, strict=False)]
            answer.tokens += output.token_ids
            answer.of_prompt += [each[t] for each, t in zip(output.prompt_logprobs, prompt[1:], strict=False)]
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return found


def scores(case: Case, folder: Path, dtype: str, texts: list[list[int]]) -> list[list[float]]:
    """Return the plain runner's log-probabilities of each text's tokens except the first."""
    settings: dict[str, Any] = {
        name: case.settings[name] for name in ("block_size", "kv_cache_dtype", "max_model_len")
    } | {
        "dtype": dtype,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "num_blocks": 600 * 16 // case.settings["block_size"],
        "max_num_batched_tokens": 2 * MAX_MODEL_LEN,
        "chunk_size": 2 * MAX_MODEL_LEN,
        "prefix_caching": False,
    }
    config = InstanceConfig(model_path=str(folder), **settings)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    requests = [(str(number), text, params) for number, text in enumerate(texts)]
    return [each.of_prompt for each in answers(Engine(config, ModelRunner(config)), requests)]


def differences(requests: list[Request], given: list[Answer], exact: list[list[float]]) -> list[float]:
    found = []
    for (_, prompt, params), answer, expected in zip(requests, given, exact, strict=True):
        assert len(answer.tokens) == params.max_tokens
        pairs = list(zip(answer.of_prompt, expected, strict=False))
        if params.logprobs is not None:
            # Of a prompt of one token nothing is scored: so all that is known begins behind its last token.
            pairs += zip(answer.logprobs, expected[len(prompt) - 1 :], strict=True)
        found += [abs(ours - theirs) for ours, theirs in pairs]
    return found


def quantiles(numbers: list[float]) -> list[float]:
    ordered = sorted(numbers) or [0.0]
    return [ordered[int(share * (len(ordered) - 1))] for share in QUANTILES]


def run_case(number: int, ranks: int, folder: Path) -> tuple[str, str]:
    """Run a case. Returns a word for its result, and details."""
    chance = random.Random(f"case {number}")
    case = random_case(chance, ranks)
    write_model(chance, case, folder)
    requests = random_requests(chance, case)
    config = InstanceConfig(model_path=str(folder), **case.settings)
    try:
        runner = make_runner(config)
    except HBServeCoreError as error:
        return "refused", str(error)
    try:
        engine = Engine(config, runner)
        given = [answers(engine, requests, chance) for _ in range(2)]
    finally:
        runner.close()
    texts = [[prompt + answer.tokens for (_, prompt, _), answer in zip(requests, each, strict=True)] for each in given]
    del engine, runner
    gc.collect()
    exact = [scores(case, folder, "float32", each) for each in texts]
    rounded = [scores(case, folder, case.compared_dtype, each) for each in texts]
    noise = [abs(a - b) for one, other in zip(exact, rounded, strict=True) for x, y in zip(one, other, strict=True)
             for a, b in zip(x, y, strict=True)]  # fmt: skip
    ours = [each for answer, right in zip(given, exact, strict=True) for each in differences(requests, answer, right)]
    found, allowed = quantiles(ours), case.allowed(quantiles(noise))
    if len(ours) < FEW:
        is_right = max(ours, default=0.0) <= allowed[-1]
    else:
        is_right = all(each <= most for each, most in zip(found, allowed, strict=False))
    return "same" if is_right else "DIFFERS", f"{len(ours)} differences {found}, allowed {allowed}: {case}"


# ---- many of them ----------------------------------------------------------------------------------------------------


def run_cases(first: int, step: int, count: int, seconds: float, ranks: int) -> Counter[str]:
    ends_s, words = time.monotonic() + seconds, Counter[str]()
    for number in range(first, first + step * count, step):
        if time.monotonic() >= ends_s:
            break
        with tempfile.TemporaryDirectory() as folder:
            try:
                word, more = run_case(number, ranks, Path(folder))
            except Exception:  # whatever it is, it is what this looks for
                word, more = "FAILS", traceback.format_exc()
        words[word] += 1
        if word.isupper():
            print(f"case {number} {word}: {more}", flush=True)
        gc.collect()
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=1 << 30, help="at most so many, in each process")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--processes", type=int, default=1, help="each with its share of the cases")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.processes == 1:
        torch.set_num_threads(1)
        options = arguments.first, arguments.step, arguments.cases, arguments.seconds, arguments.ranks
        print(dict(run_cases(*options)), flush=True)
        return
    shared = ["--seconds", arguments.seconds, "--cases", arguments.cases, "--ranks", arguments.ranks]
    own = [["--first", arguments.first + i, "--step", arguments.processes] for i in range(arguments.processes)]
    started = [subprocess.Popen([sys.executable, __file__, *map(str, [*shared, *each])]) for each in own]
    sys.exit(max(each.wait() for each in started))


if __name__ == "__main__":
    main()

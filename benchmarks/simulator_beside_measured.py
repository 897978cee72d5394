"""The simulator compared with what it simulates: `hbserve serve` with every layout at every rate, by a profile that is
measured first. The output also says how near the chosen layout comes to the best of the measured ones.

    python benchmarks/simulator_beside_measured.py                       # a small random model on 8 cores: 3 minutes
    python benchmarks/simulator_beside_measured.py --model FOLDER --rates 0.5 1 2 --goodput ttft:2000 tpot:300
    python benchmarks/simulator_beside_measured.py --shape config.json --config deployment.yaml --layouts 1P1D,2H \\
        --profile h100-qwen3-8b --rates 8 16 20 24 --input 2048 --output 128 --goodput ttft:300 tpot:15  # two GPUs

--shape is a model's config.json: the weights are invented. Without --rates, the rates are parts of what one prefill
instance computes alone. Without --goodput, a request must have its first token in three times what its prompt takes
alone, and a token each two steps of one sequence. On CPUs each instance has --threads cores, with which it was
measured; the machine needs as many, and some for the server and the load. Nothing else may run meanwhile.
"""

import argparse
import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hbserve.load.args import BenchServeArgs
from hbserve.load.arrivals import arrival_times
from hbserve.load.bench_serve import measure
from hbserve.load.compare import layouts_of, serving
from hbserve.load.report import goals_of, percentile
from hbserve.processes.launcher import instance_environment
from hbserve.simulator import report
from hbserve.simulator.engine_limits import EngineLimits
from hbserve.simulator.profile import Profile, StepLaw, load_profile
from hbserve.simulator.simulation import Deployment, simulate
from hbserve.simulator.workload import SimulatedRequest
from hbserve_scheduler import DeploymentConfig, load_config

SMALL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 512,
    "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "float32",
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
"""Shape of a model of 40 million weights."""
PARTS_OF_ONE = (0.5, 1.0, 1.5)
PROMPTS_TO_FIRST, STEPS_TO_NEXT = 3.0, 2.0
NEVER_TWO_AT_A_TIME = 0.01
"""Rate, in requests a second, at which there are never two requests at a time."""
READY_TIMEOUT_S = 300.0
WARM_UP = 8
"""Number of requests for each instance before the measured ones."""
FIGURES = {
    "req/s": "request_throughput",
    "TTFT p50": "p50_ttft_ms",
    "p90": "p90_ttft_ms",
    "by the scheduler p50": "p50_server_ttft_ms",
    "TPOT p50": "p50_tpot_ms",
    "hand-off p50": "p50_handoff_ms",
}
"""Figures that are compared. A client's time to the first token includes the front end, which is not modelled; the
scheduler's does not."""
ALONE = 6
"""Number of requests that come one after the other. If these differ already, the profile is the cause."""


@dataclass(frozen=True)
class Load:
    """Requests that come at a rate. Loads have different seeds: prompts of one must not be in a prefix cache for the
    next."""

    rate: float
    count: int
    seed: int


def main() -> None:
    arguments = parsed_arguments()
    logging.getLogger("hbserve_scheduler").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        config = deployment_of(arguments, Path(name))
        profiles = [load_profile(each) for each in arguments.profile]
        if not profiles:
            profiles = [measured_profile(arguments, config, Path(name))]
        arguments.rates = arguments.rates or usual_rates(arguments, profiles[0])
        arguments.goodput = arguments.goodput or usual_goals(arguments, profiles[0])
        print(f"goals: {' '.join(arguments.goodput)}", flush=True)
        found = asyncio.run(measure_all(arguments, config, profiles))
    say_choices(arguments, found)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with weights and a tokenizer")
    parser.add_argument("--shape", type=Path, help="a config.json")
    parser.add_argument("--config", type=Path, help="a deployment's file, for all but its model and instances")
    parser.add_argument("--threads", type=int, default=2, help="of an instance on the CPU")
    parser.add_argument("--profile", nargs="*", default=[], help="those that are there, in place of measuring")
    parser.add_argument("--save-profile", type=Path, help="where to keep what was measured")
    parser.add_argument("--layouts", default="1P3D,2P2D,3P1D")
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--goodput", nargs="+", metavar="METRIC:MS")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--input", type=int, default=256)
    parser.add_argument("--output", type=int, default=32)
    return parser.parse_args()


# ---- what is measured, and by which profile --------------------------------------------------------------------------


def deployment_of(arguments: argparse.Namespace, folder: Path) -> DeploymentConfig:
    config = load_config(arguments.config) if arguments.config else DeploymentConfig()
    model, engine = {"path": str(arguments.model), "load_format": "safetensors"}, {"num_threads": arguments.threads}
    if arguments.model is None:
        model = {"path": str(model_of_shape(arguments.shape, folder / "model")), "load_format": "dummy"}
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, **model),
        engine=msgspec.structs.replace(config.engine, **engine),
    )


def model_of_shape(shape: Path | None, folder: Path) -> Path:
    """Make a folder with a config.json, and a tokenizer with as many words."""
    folder.mkdir()
    if shape is None:
        (folder / "config.json").write_text(json.dumps(SMALL))
    else:
        shutil.copy(shape, folder / "config.json")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<0>", eos_token="<1>").save_pretrained(folder)
    return folder


def measured_profile(arguments: argparse.Namespace, config: DeploymentConfig, folder: Path) -> Profile:
    """Measure the profile of one instance, with the threads that it has beside others."""
    settings, file = config.engine_settings(), arguments.save_profile or folder / "profile.json"
    half = max(1, arguments.input // 2)
    lengths = ",".join(str(each) for each in sorted({16, half, arguments.input, 2 * arguments.input}))
    contexts = f"{arguments.input},{2 * arguments.input}"
    command = [
        sys.executable, "-m", "hbserve", "profile", "--model", str(config.model.path), "--device", str(settings.device),
        "--prompt-lens", lengths, "--contexts", contexts, "--batch-sizes", "1,2,4,8,16", "-o", str(file),
        "--kv-transfer-backend", config.kv_transfer.backend,
    ]  # fmt: skip
    if settings.load_format == "dummy":
        command.append("--random-weights")
    subprocess.run(command, check=True, env=instance_environment(arguments.threads))
    profile = load_profile(str(file))
    print(msgspec.json.encode(profile).decode(), flush=True)
    return profile


def usual_rates(arguments: argparse.Namespace, profile: Profile) -> list[float]:
    alone_s = StepLaw(profile).step_s(arguments.input, arguments.input**2 / 2, 0)
    return [float(f"{part / alone_s:.2g}") for part in PARTS_OF_ONE]


def usual_goals(arguments: argparse.Namespace, profile: Profile) -> list[str]:
    law = StepLaw(profile)
    first_s = PROMPTS_TO_FIRST * law.step_s(arguments.input, arguments.input**2 / 2, 0)
    next_s = STEPS_TO_NEXT * law.decode_steps_s(1, 1, arguments.input)
    return [f"ttft:{1e3 * first_s:.0f}", f"tpot:{1e3 * next_s:.1f}"]


# ---- measured and simulated ------------------------------------------------------------------------------------------


async def measure_all(
    arguments: argparse.Namespace, config: DeploymentConfig, profiles: Sequence[Profile]
) -> dict[tuple[str, float], list[float]]:
    """Measure all layouts at all rates. Returns goodput by layout and rate: measured, and simulated by each profile."""
    found = {}
    for name, roles in layouts_of(arguments.layouts).items():
        async for load, measured in measure_layout(arguments, config, roles):
            simulated = [
                await asyncio.to_thread(simulated_figures, arguments, config, each, roles, load) for each in profiles
            ]
            for profile, figures in zip(profiles, simulated, strict=True):
                rate = f"{load.rate:6g}" if load.rate else " alone"
                print(f"{rate} {name:5}{' '.join(beside(measured, figures, load))}  {profile.name}")
            sys.stdout.flush()
            found[name, load.rate] = [each["request_goodput"] for each in (measured, *simulated)]
    return found


async def measure_layout(
    arguments: argparse.Namespace, config: DeploymentConfig, roles: Sequence[str]
) -> AsyncIterator[tuple[Load, dict[str, Any]]]:
    loads = [Load(rate, round(rate * arguments.seconds), seed) for seed, rate in enumerate(arguments.rates, 2)]
    async with serving(config, roles) as server:
        warm_up = Load(max(arguments.rates), WARM_UP * len(roles), 0)
        await server.during(measure(sent(arguments, server.url, warm_up)))
        for load in (Load(0.0, ALONE, 1), *loads):
            figures, found, _ = await server.during(measure(sent(arguments, server.url, load)))
            by_server = [each.server["time_to_first_token_ms"] for each in found.outcomes if each.server]
            figures["p50_server_ttft_ms"] = percentile(by_server, 50)
            if load.rate and figures["client_is_bottleneck"]:
                print(f"{load.rate:6g} the load was itself late: {figures['client_lag_p99_ms']:.1f} ms", flush=True)
            yield load, figures


def sent(arguments: argparse.Namespace, url: str, load: Load) -> BenchServeArgs:
    pace = {"request_rate": load.rate} if load.rate else {"max_concurrency": 1}
    return BenchServeArgs(
        base_url=url, num_prompts=load.count, random_input_len=arguments.input, random_output_len=arguments.output,
        **pace, seed=load.seed, ignore_eos=True, ready_check_timeout_sec=READY_TIMEOUT_S,
        goodput=arguments.goodput, metric_percentiles="50,90", disable_tqdm=True,
    )  # fmt: skip


def simulated_figures(
    arguments: argparse.Namespace, config: DeploymentConfig, profile: Profile, roles: Sequence[Any], load: Load
) -> dict[str, Any]:
    """Simulate a load with exactly its arrival times."""
    times = arrival_times(load.count, load.rate or NEVER_TWO_AT_A_TIME, seed=load.seed)
    requests = [SimulatedRequest(at_s, arguments.input, arguments.output) for at_s in times]
    limits = EngineLimits.of(config.engine_settings())
    deployment = Deployment(profile, tuple(roles), scheduler=config.scheduler, limits=limits)
    figures = report.figures(simulate(deployment, requests), goals_of(arguments.goodput))
    return figures | {"p50_server_ttft_ms": figures["p50_ttft_ms"]}


def beside(measured: dict[str, Any], simulated: dict[str, Any], load: Load) -> Iterator[str]:
    """Format each figure as measured, as simulated, and as the ratio of the second to the first."""
    for title, name in FIGURES.items():
        real, model = measured[name], simulated[name]
        if real and (load.rate or name != "request_throughput"):
            yield f"| {title} {real:.4g} {model:.4g} ({model / real:.2f})"


def say_choices(arguments: argparse.Namespace, found: dict[tuple[str, float], list[float]]) -> None:
    """Print which layout each profile would have taken at each rate, and how much of the best goodput that reaches."""
    layouts = list(layouts_of(arguments.layouts))
    print("goodput, req/s: measured, then simulated")
    for rate in arguments.rates:
        best = max(found[each, rate][0] for each in layouts)
        rows = [f"{each} " + " ".join(f"{goodput:.2f}" for goodput in found[each, rate]) for each in layouts]
        for i in range(1, len(found[layouts[0], rate])):
            taken = max(layouts, key=lambda each: found[each, rate][i])
            rows.append(f"takes {taken}: {found[taken, rate][0] / best if best else 1.0:.2f} of the best, bar 0.95")
        print(f"{rate:6g} " + " | ".join(rows))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

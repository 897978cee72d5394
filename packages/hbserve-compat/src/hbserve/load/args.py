"""Options of `hbserve bench serve`, with the names, defaults and meanings of `vllm bench serve`; and of `hbserve bench
compare`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from hbserve.load.prompts import MOST_REQUESTS, MOST_TOKENS


class Backend(StrEnum):
    OPENAI = "openai"
    VLLM = "vllm"
    OPENAI_CHAT = "openai-chat"


class Dataset(StrEnum):
    RANDOM = "random"
    SHAREGPT = "sharegpt"
    MOONCAKE = "mooncake"
    TIMED_TRACE = "timed_trace"
    BURSTGPT = "burstgpt"
    PREFIX_REPETITION = "prefix_repetition"


class RampUp(StrEnum):
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


Rate = Annotated[float, Option(min=0, help="Requests a second; inf is all at once.")]
Rps = Annotated[float | None, Option(min=0)]
Length = Annotated[int, Option(min=1, max=MOST_TOKENS)]
Count = Annotated[int, Option(min=0, max=MOST_TOKENS)]


@dataclass(frozen=True)
class BenchServeArgs:
    """Of `hbserve bench serve`."""

    more: Annotated[list[str] | None, Argument(metavar="[METRIC:MS]...", help="Further values of --goodput.")] = None
    backend: Annotated[Backend, Option(help="openai is /v1/completions, openai-chat /v1/chat/completions.")] = (
        Backend.OPENAI
    )
    base_url: Annotated[str | None, Option(help="Of the server; else --host and --port.")] = None
    host: str = "127.0.0.1"
    port: Annotated[int, Option(min=1, max=65535)] = 8000
    endpoint: Annotated[str | None, Option(help="Another path than the backend's.")] = None
    header: Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="May be repeated.")] = None
    insecure: Annotated[bool, Option("--insecure", help="Believe any certificate.")] = False
    model: Annotated[str | None, Option(help="The name that requests say; else the server's first.")] = None
    served_model_name: Annotated[str | None, Option(help="As --model.")] = None
    tokenizer: Annotated[Path | None, Option(help="A model folder; else the one that the server names, if here.")] = (
        None
    )
    dataset_name: Dataset = Dataset.RANDOM
    dataset_path: Annotated[Path | None, Option(help="The file of a dataset that has one.")] = None
    num_prompts: Annotated[int | None, Option(min=1, max=MOST_REQUESTS, help="1000, or all of a trace.")] = None
    seed: int = 0
    input_len: Annotated[int | None, Option(min=1, max=MOST_TOKENS, help="In place of the dataset's own option.")] = (
        None
    )
    output_len: Annotated[int | None, Option(min=1, max=MOST_TOKENS, help="In place of the dataset's own option.")] = (
        None
    )
    random_input_len: Length = 1024
    random_output_len: Length = 128
    random_range_ratio: Annotated[float, Option(min=0, max=0.99, help="Lengths are up to so much off.")] = 0.0
    random_prefix_len: Count = 0
    sharegpt_output_len: Annotated[
        int | None, Option(min=1, max=MOST_TOKENS, help="Else the length of the answer there.")
    ] = None
    prefix_repetition_prefix_len: Length = 256
    prefix_repetition_suffix_len: Length = 256
    prefix_repetition_num_prefixes: Length = 10
    prefix_repetition_output_len: Length = 128
    timed_trace_chunk_hash_size: Annotated[
        int | None, Option(min=1, max=MOST_TOKENS, help="Tokens of a block; 512 in Mooncake's.")
    ] = None
    timed_trace_sec_multiplier: Annotated[float | None, Option(min=0, help="Of timestamps; 0.001 in Mooncake's.")] = (
        None
    )
    self_timed: Annotated[bool | None, Option(help="Send when the dataset says; as traces do by default.")] = None
    request_rate: Rate = float("inf")
    burstiness: Annotated[float, Option(min=0.001, help="1 is a Poisson process, less is burstier.")] = 1.0
    ramp_up_strategy: RampUp | None = None
    ramp_up_start_rps: Rps = None
    ramp_up_end_rps: Rps = None
    max_concurrency: Annotated[int | None, Option(min=1, help="Requests at a time.")] = None
    num_warmups: Annotated[int, Option(min=0, help="Requests before the load.")] = 0
    ready_check_timeout_sec: Annotated[float, Option(min=0, help="How long to wait for the server.")] = 0.0
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Each answer has the length that was asked for.")] = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    extra_body: Annotated[str | None, Option(metavar="JSON", help="Further fields of each request.")] = None
    request_id_prefix: Annotated[str, Option(help="Of X-Request-Id.")] = "bench-"
    goodput: Annotated[
        list[str] | None, Option(metavar="METRIC:MS", help="What requests are to keep: ttft, tpot, e2el.")
    ] = None
    percentile_metrics: str = "ttft,tpot,itl,e2el,handoff"
    metric_percentiles: str = "99"
    disable_tqdm: Annotated[bool, Option("--disable-tqdm", help="No progress bar.")] = False
    label: str | None = None
    save_result: Annotated[bool, Option("--save-result", help="Write a JSON file.")] = False
    save_detailed: Annotated[bool, Option("--save-detailed", help="With each request in it.")] = False
    append_result: Annotated[bool, Option("--append-result", help="A line after those that are there.")] = False
    metadata: Annotated[list[str] | None, Option(metavar="NAME=VALUE", help="Kept in the file; may be repeated.")] = (
        None
    )
    result_dir: Path | None = None
    result_filename: str | None = None
    plot: Annotated[Path | None, Option(help="Write a picture: .svg or .png.")] = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.base_url or f"http://{host}:{self.port}").rstrip("/").removesuffix("/v1")

    @property
    def is_chat(self) -> bool:
        return self.backend is Backend.OPENAI_CHAT

    @property
    def path(self) -> str:
        return self.endpoint or ("/v1/chat/completions" if self.is_chat else "/v1/completions")


@dataclass(frozen=True)
class CompareArgs:
    """Of `hbserve bench compare`."""

    goodput: Annotated[list[str], Option(metavar="METRIC:MS", help="ttft, tpot or e2el; may be repeated.")]
    rates: Annotated[str, Option(metavar="1,2,4,…", help="Requests a second.")]
    config: Annotated[Path | None, Option(help="A deployment's file, for all but its instances.")] = None
    model: Annotated[Path | None, Option(help="A Hugging Face model folder; without it, the demo model.")] = None
    layouts: Annotated[
        str,
        Option(metavar="4H,1P3D,2P2D,…", help="How many hybrid, or prefill and decode instances; a device for each."),
    ] = "2H,1P1D"
    input_len: Length = 1024
    output_len: Length = 128
    num_prompts: Annotated[int, Option(min=1, max=MOST_REQUESTS, help="Of each load.")] = 200
    ready_timeout_s: Annotated[float, Option("--ready-timeout", metavar="SECONDS", help="Until a layout serves.")] = (
        600.0
    )
    plot: Annotated[Path | None, Option(help="Write a picture: .svg or .png.")] = None
    json: Annotated[Path | None, Option(help="A file for all figures.")] = None
    seed: int = 0

"""Options of `hbserve bench serve`, with the names, defaults and meanings of `vllm bench serve`; and of `hbserve bench
compare`."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from hbserve.load.prompts import MOST_REQUESTS, MOST_TOKENS
from hbserve.options import file_option, number_option


class Backend(StrEnum):
    OPENAI = "openai"
    VLLM = "vllm"
    OPENAI_CHAT = "openai-chat"


class Dataset(StrEnum):
    RANDOM = "random"
    SHAREGPT = "sharegpt"
    CUSTOM = "custom"
    MOONCAKE = "mooncake"
    TIMED_TRACE = "timed_trace"
    BURSTGPT = "burstgpt"
    PREFIX_REPETITION = "prefix_repetition"


class RampUp(StrEnum):
    LINEAR = "linear"
    EXPONENTIAL = "exponential"


LEAST_RATE = 0.001
Rate = Annotated[
    float,
    number_option("Mean number of requests sent per second; inf sends them all at once.", least=LEAST_RATE, most=None),
]
Burstiness = Annotated[
    float,
    number_option(
        "Regularity of arrivals: 1 is a Poisson process, less is burstier, more evener.", least=0.001, most=None
    ),
]


def tokens_option(what: str, *, least: int = 1) -> Any:
    """Make a command-line option whose value is a number of tokens."""
    return Option(min=least, max=MOST_TOKENS, metavar="TOKENS", help=what)


def _sampling(what: str) -> Any:
    return Option(help=f"Sampling parameter of each request: {what}. Not sent by default: the server decides.")


@dataclass(frozen=True)
class BenchServeArgs:
    """Arguments of `hbserve bench serve`."""

    more: Annotated[list[str] | None, Argument(metavar="[METRIC:MS]...", help="More values of --goodput.")] = None
    backend: Annotated[
        Backend,
        Option(help="API: openai and vllm are /v1/completions, openai-chat is /v1/chat/completions."),
    ] = Backend.OPENAI
    base_url: Annotated[
        str | None, Option(help="URL of the server, such as https://host:8000. By default --host and --port over http.")
    ] = None
    host: Annotated[str, Option(help="Host of the server; unused with --base-url.")] = "127.0.0.1"
    port: Annotated[int, Option(min=1, max=65535, help="Port of the server; unused with --base-url.")] = 8000
    endpoint: Annotated[str | None, Option(help="Path to send requests to, instead of the one of --backend.")] = None
    header: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="HTTP header to add to each request; may be repeated.")
    ] = None
    insecure: Annotated[bool, Option("--insecure", help="Do not verify the server's TLS certificate.")] = False
    model: Annotated[
        str | None, Option(help="Model name to put into requests. By default the first one that the server lists.")
    ] = None
    served_model_name: Annotated[str | None, Option(help="The same as --model, and goes before it.")] = None
    tokenizer: Annotated[
        Path | None,
        Option(help="Model folder with the tokenizer. By default the folder that the server names, if it is here."),
    ] = None
    dataset_name: Annotated[
        Dataset, Option(help="Where prompts come from; all but random and prefix_repetition need --dataset-path.")
    ] = Dataset.RANDOM
    dataset_path: Annotated[Path | None, file_option("File of the dataset; may be packed by gzip.")] = None
    num_prompts: Annotated[
        int | None,
        Option(min=1, max=MOST_REQUESTS, help="Number of requests to send. By default 1000, or all of a trace."),
    ] = None
    seed: Annotated[int, Option(help="Seed of prompts and arrival times: the same seed gives the same load.")] = 0
    input_len: Annotated[
        int | None, tokens_option("Length of prompts; overrides the option of the dataset, such as --random-input-len.")
    ] = None
    output_len: Annotated[
        int | None,
        tokens_option("Length of answers; overrides the option of the dataset, such as --random-output-len."),
    ] = None
    random_input_len: Annotated[int, tokens_option("random: length of prompts, without their common prefix.")] = 1024
    random_output_len: Annotated[int, tokens_option("random: most tokens of an answer.")] = 128
    random_range_ratio: Annotated[
        float,
        number_option(
            "random: lengths vary by this share, up and down; 0: all have the same length.", least=0, most=0.99
        ),
    ] = 0.0
    random_prefix_len: Annotated[
        int, tokens_option("random: length of a prefix that all prompts share, before --random-input-len.", least=0)
    ] = 0
    sharegpt_output_len: Annotated[
        int | None,
        tokens_option("sharegpt: most tokens of an answer. By default the length of the answer in the file."),
    ] = None
    custom_output_len: Annotated[
        int, tokens_option("custom: most tokens of an answer; -1: as output_tokens of each line says.", least=-1)
    ] = 256
    skip_chat_template: Annotated[
        bool,
        Option("--skip-chat-template", help="custom: send prompts as they are, without the model's chat template."),
    ] = False
    disable_shuffle: Annotated[
        bool, Option("--disable-shuffle", help="custom: keep the order of the file. By default --seed shuffles it.")
    ] = False
    no_oversample: Annotated[
        bool,
        Option("--no-oversample", help="custom: send no prompt twice, even if the file has fewer than --num-prompts."),
    ] = False
    prefix_repetition_prefix_len: Annotated[int, tokens_option("prefix_repetition: length of each shared prefix.")] = (
        256
    )
    prefix_repetition_suffix_len: Annotated[int, tokens_option("prefix_repetition: tokens after the prefix.")] = 256
    prefix_repetition_num_prefixes: Annotated[
        int, Option(min=1, max=MOST_TOKENS, help="prefix_repetition: number of different prefixes.")
    ] = 10
    prefix_repetition_output_len: Annotated[int, tokens_option("prefix_repetition: most tokens of an answer.")] = 128
    timed_trace_chunk_hash_size: Annotated[
        int | None, tokens_option("timed_trace: prompt tokens for each of hash_ids. By default 16; mooncake: 512.")
    ] = None
    timed_trace_sec_multiplier: Annotated[
        float | None,
        number_option("timed_trace: seconds in a unit of timestamp. By default 1; mooncake: 0.001.", least=0),
    ] = None
    self_timed: Annotated[
        bool | None,
        Option(help="Send when the dataset says, or at --request-rate. By default traces alone send when they say."),
    ] = None
    request_rate: Rate = float("inf")
    burstiness: Burstiness = 1.0
    ramp_up_strategy: Annotated[
        RampUp | None, Option(help="Change the rate during the load, from --ramp-up-start-rps to --ramp-up-end-rps.")
    ] = None
    ramp_up_start_rps: Annotated[
        float | None, number_option("Requests per second when a ramp begins.", least=LEAST_RATE)
    ] = None
    ramp_up_end_rps: Annotated[
        float | None, number_option("Requests per second when a ramp ends.", least=LEAST_RATE)
    ] = None
    max_concurrency: Annotated[
        int | None,
        Option(
            min=1, max=MOST_REQUESTS, help="Most requests in flight at a time; others wait here. By default no limit."
        ),
    ] = None
    num_warmups: Annotated[
        int, Option(min=0, max=MOST_REQUESTS, help="Requests to send, and not to measure, before the load.")
    ] = 0
    ready_check_timeout_sec: Annotated[
        float, number_option("Seconds to wait for a server that is still starting; 0: it must be there.", least=0)
    ] = 0.0
    ignore_eos: Annotated[
        bool, Option("--ignore-eos", help="Make each answer as long as asked for: end-of-sequence does not end it.")
    ] = False
    temperature: Annotated[float | None, _sampling("0 is greedy")] = None
    top_p: Annotated[float | None, _sampling("probability mass to sample from")] = None
    top_k: Annotated[int | None, _sampling("number of tokens to sample from")] = None
    min_p: Annotated[float | None, _sampling("least probability, relative to the likeliest token")] = None
    frequency_penalty: Annotated[float | None, _sampling("-2 to 2, per repetition of a token")] = None
    presence_penalty: Annotated[float | None, _sampling("-2 to 2, for tokens that were there")] = None
    repetition_penalty: Annotated[float | None, _sampling("a factor, 1 is none")] = None
    extra_body: Annotated[
        str | None, Option(metavar="JSON", help="JSON object whose fields are added to the body of each request.")
    ] = None
    request_id_prefix: Annotated[
        str, Option(help="Beginning of the X-Request-Id of each request; its number follows.")
    ] = "bench-"
    goodput: Annotated[
        list[str] | None,
        Option(
            metavar="METRIC:MS",
            help="Goal for ttft, tpot or e2el, in milliseconds; goodput counts the requests that meet all goals.",
        ),
    ] = None
    percentile_metrics: Annotated[
        str, Option(metavar="METRIC,…", help="Latencies to report: some of ttft, tpot, itl, e2el and handoff.")
    ] = "ttft,tpot,itl,e2el,handoff"
    metric_percentiles: Annotated[
        str, Option(metavar="P,…", help="Percentiles to report of each, 0 to 100, beside mean and median.")
    ] = "99"
    disable_tqdm: Annotated[bool, Option("--disable-tqdm", help="Show no progress bar.")] = False
    label: Annotated[str | None, Option(help="Name of this run, kept in the result file.")] = None
    save_result: Annotated[bool, Option("--save-result", help="Write the figures to a JSON file.")] = False
    save_detailed: Annotated[
        bool, Option("--save-detailed", help="Write the latencies and the text of each request to it too.")
    ] = False
    append_result: Annotated[
        bool, Option("--append-result", help="Add the figures to the file as one more line, instead of replacing it.")
    ] = False
    metadata: Annotated[
        list[str] | None, Option(metavar="NAME=VALUE", help="Further field of the result file; may be repeated.")
    ] = None
    result_dir: Annotated[Path | None, Option(help="Folder of the result file. By default the current one.")] = None
    result_filename: Annotated[
        str | None, Option(help="Name of the result file. By default made of backend, rate, model and time.")
    ] = None
    plot: Annotated[Path | None, Option(help="Write a picture of the load to this file, .svg or .png.")] = None

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (
            (f"http://{host}:{self.port}" if self.base_url is None else self.base_url).rstrip("/").removesuffix("/v1")
        )

    @property
    def is_chat(self) -> bool:
        return self.backend is Backend.OPENAI_CHAT

    @property
    def path(self) -> str:
        usual = "/v1/chat/completions" if self.is_chat else "/v1/completions"
        return usual if self.endpoint is None else self.endpoint


@dataclass(frozen=True)
class CompareArgs:
    """Arguments of `hbserve bench compare`."""

    goodput: Annotated[
        list[str],
        Option(metavar="METRIC:MS", help="Goal for ttft, tpot or e2el, in milliseconds; may be repeated."),
    ]
    rates: Annotated[str, Option(metavar="1,2,4,…", help="Requests per second to try, one load each.")]
    config: Annotated[
        Path | None,
        file_option("YAML file of a deployment, for the settings of all layouts; its instances are not used."),
    ] = None
    model: Annotated[Path | None, Option(help="Hugging Face model folder. By default the demo model.")] = None
    layouts: Annotated[
        str,
        Option(
            metavar="4H,1P3D,2P2D,…",
            help="Layouts to compare: numbers of hybrid (H), or of prefill (P) and decode (D) instances. "
            "Each instance has a device of its own.",
        ),
    ] = "2H,1P1D"
    input_len: Annotated[int, tokens_option("Length of prompts, in tokens.")] = 1024
    output_len: Annotated[int, tokens_option("Length of answers, in tokens.")] = 128
    num_prompts: Annotated[int, Option(min=1, max=MOST_REQUESTS, help="Number of requests of each load.")] = 200
    ready_timeout_s: Annotated[
        float,
        number_option("How long a layout may take until it serves.", "--ready-timeout", least=1, metavar="SECONDS"),
    ] = 600.0
    plot: Annotated[Path | None, Option(help="Write a picture of goodput over rate to this file, .svg or .png.")] = None
    json: Annotated[Path | None, Option(help="Write all figures to this JSON file.")] = None
    seed: Annotated[int, Option(help="Seed of prompts and arrival times.")] = 0

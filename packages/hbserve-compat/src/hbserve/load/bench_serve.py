"""`hbserve bench serve`: puts a load on a server with OpenAI's API, and measures what its clients experience."""

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from hbserve.client.http_stream import HttpClient
from hbserve.client.server_url import parse_url, require_header, require_path
from hbserve.load import arrivals, prompts
from hbserve.load.args import BenchServeArgs, Dataset
from hbserve.load.asking import Outcome, ask
from hbserve.load.generator import Load, send_load
from hbserve.load.prompts import Prompt, Vocabulary
from hbserve.load.report import METRICS, Wanted, complaint, details, figures, goals_of, lines
from hbserve.options import numbers
from hbserve.output_file import require_writable, write_results
from hbserve.plotting import require_plotting
from hbserve.progress import progress_bar
from hbserve.text.tokenizer import encode, load_tokenizer
from hbserve_rpc import InvalidRequest, PeerLost, RemoteError, RequestTimeout, own_process
from hbserve_rpc.plain_values import shown

RETRY_S = 1.0
USUAL_COUNT = 1000
MOST_ERRORS = 10
"""Most different error messages that are printed."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


async def bench_serve(args: BenchServeArgs) -> dict[str, Any]:
    """Send a load, print its report, and write the files that were asked for. Returns the content of the JSON file.

    After a cancellation, the report covers the requests that have ended, and the file has `was_cut`. The cancellation
    is then raised again. While prompts are made, a signal ends the process at once. Must run in the main thread.

    Raises:
        RemoteError: not one request was answered; the file is written all the same. Also raises what `measure` does.
    """
    result, load, wanted = await measure(args, own_process.ending_at_once())
    if load.was_cut:
        result["was_cut"] = True
        sys.stderr.write(f"cut short: of {result['num_prompts']} requests {len(load.outcomes)} have ended; of these:\n")
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines(result, wanted))
    finally:  # although nobody may read the report any more
        _write(args, result, load, wanted)
    for each in list(dict.fromkeys(each.error for each in load.outcomes if each.error))[:MOST_ERRORS]:
        sys.stderr.write(f"error: {each}\n")
    if problem := complaint(load):
        sys.stderr.write(f"warning: {problem}: these figures are about it as much as about the server\n")
    if load.was_cut:
        raise asyncio.CancelledError
    if load.outcomes and not result["completed"]:
        raise RemoteError(f"all of {len(load.outcomes)} requests have failed: there is nothing that was measured")
    return result


async def measure(
    args: BenchServeArgs, preparing: AbstractContextManager[object] | None = None
) -> tuple[dict[str, Any], Load, Wanted]:
    """Send a load. Returns its figures, the result of each request, and what the report is to contain. If a
    cancellation cut the load short, the caller must raise it again.

    preparing: context in which a tokenizer is imported and prompts are made, for which the event loop waits.

    Raises:
        InvalidRequest: the options contradict each other, or a dataset cannot be read.
        RequestTimeout: there was no server in time.
        RemoteError: the server answers the first request with an error.
    """
    wanted, body, headers = _wanted(args), _body(args), _headers(args)
    _require_possible(args)
    client = HttpClient(args.url, headers, verify=not args.insecure)
    try:
        model, root = await _find_model(client, args.ready_check_timeout_sec)
        body = {"model": args.served_model_name or args.model or model, **body}
        folder = args.tokenizer or Path(root)
        with preparing or nullcontext():
            found, tokenizer = _prompts(args, folder)
            times = _times(args, found)
            bodies = [_request(args, each, tokenizer, body) for each in found]
        await _warm_up(client, args, bodies[: max(1, args.num_warmups)])
        load = await _send(client, args, found, bodies, times)
    finally:
        client.close()
    _count_tokens(load, tokenizer)
    return _head(args, body["model"], folder, len(found)) | figures(load, wanted), load, wanted


def _require_possible(args: BenchServeArgs) -> None:
    """Check what can be checked before the load begins, so that minutes of measuring are not lost. Raises
    InvalidRequest, OSError, and what `require_plotting` raises."""
    parse_url("--host" if args.base_url is None else "--base-url", args.url)
    require_path("--endpoint", args.path)
    require_header("--request-id-prefix", "X-Request-Id", args.request_id_prefix)
    for name in (*SAMPLING, "timed_trace_sec_multiplier", "ramp_up_start_rps", "ramp_up_end_rps"):
        if not math.isfinite(getattr(args, name) or 0):
            raise InvalidRequest(f"--{name.replace('_', '-')}={getattr(args, name)}: expected a finite number")
    ramp_rates = args.ramp_up_start_rps or 0.0, args.ramp_up_end_rps or 0.0
    if args.ramp_up_strategy is not None and (min(ramp_rates) <= 0 or math.isfinite(args.request_rate)):
        problem = "needs --ramp-up-start-rps and --ramp-up-end-rps, above 0, and no --request-rate"
        raise InvalidRequest(f"--ramp-up-strategy: {problem}")
    if args.ramp_up_strategy is None and any(ramp_rates):
        raise InvalidRequest("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy")
    if args.request_rate <= 0:
        raise InvalidRequest(f"--request-rate={args.request_rate:g}: expected more than 0")
    if (args.dataset_path is None) != (args.dataset_name in (Dataset.RANDOM, Dataset.PREFIX_REPETITION)):
        needs = "has no file" if args.dataset_path else "needs a file"
        raise InvalidRequest(f"--dataset-path: --dataset-name {args.dataset_name.value} {needs}")
    if args.custom_output_len == 0:
        raise InvalidRequest("--custom-output-len=0: expected 1 or more, or -1 for output_tokens of each line")
    _pairs("--metadata", args.metadata, "=")
    for name in ("model", "served_model_name"):
        if getattr(args, name) == "":
            raise InvalidRequest(f"--{name.replace('_', '-')}='': expected a name")
    if args.tokenizer is not None and not os.path.isdir(os.path.expanduser(args.tokenizer)):
        raise InvalidRequest(_no_tokenizer(args.tokenizer))
    if args.plot is not None:
        require_plotting(args.plot)
    _require_result_file(args)


def _require_result_file(args: BenchServeArgs) -> None:
    if not (args.save_result or args.append_result):
        return
    folder = args.result_dir or Path()
    if not os.path.isdir(folder):  # it is made together with the file, as by vLLM's command
        above = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        require_writable("--result-dir", above / "x.json")
        if len(Path(args.result_filename or "x.json").parts) == 1:
            return
    require_writable("--result-filename", folder / (args.result_filename or "x.json"))


# ---- what is asked -----------------------------------------------------------------------------------------------


def _pairs(option: str, values: list[str] | None, between: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for each in values or []:
        name, found, value = each.partition(between)
        if not found or not name:
            raise InvalidRequest(f"{option}={shown(each)}: expected NAME{between}VALUE")
        if name in pairs:
            raise InvalidRequest(f"{option}={shown(each)}: {name} has a value already")
        pairs[name] = value
    return pairs


def _wanted(args: BenchServeArgs) -> Wanted:
    goals_s = goals_of([*(args.goodput or []), *(args.more or [])])
    percentiles = numbers("--metric-percentiles", args.metric_percentiles, float, least=0, most=100)
    metrics = [each.strip() for each in args.percentile_metrics.split(",")]
    if unknown := set(metrics) - METRICS.keys():
        raise InvalidRequest(f"--percentile-metrics={shown(min(unknown))}: expected some of {', '.join(METRICS)}")
    if len({*metrics}) < len(metrics):
        raise InvalidRequest(f"--percentile-metrics={args.percentile_metrics}: expected each of them once")
    return Wanted(metrics, percentiles, goals_s, args.max_concurrency is not None)


def _headers(args: BenchServeArgs) -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("HBSERVE_API_KEY")
    if key:
        require_header("OPENAI_API_KEY or HBSERVE_API_KEY", "Authorization", key)
    own = _pairs("--header", args.header, "=")
    for name, value in own.items():
        require_header("--header", name, value)
    return ({"Authorization": f"Bearer {key}"} if key else {}) | own


def _body(args: BenchServeArgs) -> dict[str, Any]:
    """Return the fields that are the same in every request."""
    given = "{}" if args.extra_body is None else args.extra_body
    try:
        extra = msgspec.json.decode(given.encode(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise InvalidRequest(f"--extra-body={shown(given)}: expected a JSON object: {error}") from None
    sampling = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    ignoring = {"ignore_eos": True} if args.ignore_eos else {}
    return {"stream": True, "stream_options": {"include_usage": True}, **sampling, **ignoring, **extra}


def _no_tokenizer(folder: Path) -> str:
    return f"--tokenizer: prompts are made of tokens, and {shown(str(folder))} is not a folder with a tokenizer"


def _prompts(args: BenchServeArgs, folder: Path) -> tuple[list[Prompt], Any]:
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    if tokenizer is None:
        raise InvalidRequest(_no_tokenizer(folder))
    vocabulary, count, seed = Vocabulary.of(tokenizer), args.num_prompts or USUAL_COUNT, args.seed
    match args.dataset_name:
        case Dataset.RANDOM:
            lengths = args.input_len or args.random_input_len, args.output_len or args.random_output_len
            spread, prefix = args.random_range_ratio, args.random_prefix_len
            found = prompts.random_prompts(vocabulary, count, *lengths, spread=spread, prefix_len=prefix, seed=seed)
        case Dataset.PREFIX_REPETITION:
            found = prompts.prefix_repetition(
                vocabulary,
                count,
                prefix_len=args.prefix_repetition_prefix_len,
                suffix_len=args.input_len or args.prefix_repetition_suffix_len,
                num_prefixes=args.prefix_repetition_num_prefixes,
                output_len=args.output_len or args.prefix_repetition_output_len,
                seed=seed,
            )
        case _:
            found = _prompts_of_file(args, tokenizer, vocabulary)
    return found, tokenizer


def _prompts_of_file(args: BenchServeArgs, tokenizer: Any, vocabulary: Vocabulary) -> list[Prompt]:
    path, count = args.dataset_path, args.num_prompts or USUAL_COUNT
    assert path is not None, "_require_possible"
    if args.dataset_name is Dataset.SHAREGPT:
        output_len = args.output_len or args.sharegpt_output_len
        return prompts.sharegpt(path, tokenizer, count, output_len=output_len, seed=args.seed)
    if args.dataset_name is Dataset.CUSTOM:
        return prompts.custom(
            path,
            tokenizer,
            count,
            output_len=args.output_len or (None if args.custom_output_len == -1 else args.custom_output_len),
            shuffle_seed=None if args.disable_shuffle else args.seed,
            repeats=not args.no_oversample,
            templated=not (args.skip_chat_template or args.is_chat),  # in a chat, the server applies the template
        )
    if args.dataset_name is Dataset.BURSTGPT:
        return prompts.burstgpt(path, vocabulary, count, seed=args.seed)
    is_mooncake = args.dataset_name is Dataset.MOONCAKE
    block_size = args.timed_trace_chunk_hash_size or (prompts.MOONCAKE_BLOCK if is_mooncake else 16)
    unit_s = args.timed_trace_sec_multiplier
    if unit_s is None:
        unit_s = 1e-3 if is_mooncake else 1.0
    return prompts.timed_trace(path, vocabulary, args.num_prompts, block_size=block_size, unit_s=unit_s)


def _request(args: BenchServeArgs, prompt: Prompt, tokenizer: Any, body: dict[str, Any]) -> dict[str, Any]:
    if not args.is_chat:
        return {"prompt": prompt.token_ids, "max_tokens": prompt.output_len, **body}
    text = tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_completion_tokens": prompt.output_len, **body}


def _times(args: BenchServeArgs, found: list[Prompt]) -> list[float]:
    is_trace = args.dataset_name in (Dataset.MOONCAKE, Dataset.TIMED_TRACE)
    if is_trace if args.self_timed is None else args.self_timed:
        times = [each.at_s for each in found if each.at_s is not None]
        if len(times) != len(found):
            raise InvalidRequest(
                f"--self-timed: --dataset-name {args.dataset_name.value} does not say when requests came"
            )
        return times
    return arrivals.arrival_times(
        len(found),
        args.request_rate,
        burstiness=args.burstiness,
        ramp=args.ramp_up_strategy and args.ramp_up_strategy.value,  # type: ignore[arg-type]  # a Literal of the same
        ramp_rates=(args.ramp_up_start_rps or 0.0, args.ramp_up_end_rps or 0.0),
        seed=args.seed,
    )


# ---- the server --------------------------------------------------------------------------------------------------


class _Model(msgspec.Struct):
    id: str
    root: str | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def _find_model(client: HttpClient, timeout_s: float) -> tuple[str, str]:
    """Wait for the server. Returns the name and the folder of its first model. Raises RequestTimeout, RemoteError."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            status, text, _ = await client.request("GET", "/v1/models")
        except PeerLost as error:
            if time.monotonic() > deadline_s:
                raise RequestTimeout(
                    f"no server within {timeout_s:g} s: {error}" if timeout_s else str(error)
                ) from None
            await asyncio.sleep(RETRY_S)
            continue
        if status == 503 and time.monotonic() < deadline_s:  # it is loading
            await asyncio.sleep(RETRY_S)
            continue
        if status != 200:
            cure = "; OPENAI_API_KEY or HBSERVE_API_KEY has the one to send" if status == 401 else ""
            raise RemoteError(f"GET /v1/models: HTTP {status}: {text[:300].decode(errors='replace')}{cure}")
        try:
            first = msgspec.json.decode(text, type=_Models).data[0]
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError) as error:
            what = shown(text[:60].decode(errors="replace"))
            raise RemoteError(f"GET /v1/models: expected a list of models, as OpenAI's API has it: {what}") from error
        return first.id, first.root or first.id


async def _warm_up(client: HttpClient, args: BenchServeArgs, bodies: list[dict[str, Any]]) -> None:
    """Send the warm-up requests. Raises RemoteError if one is answered with an error, as the whole load would be."""
    for body in bodies:
        outcome = Outcome(0)
        await ask(client, args.path, body, outcome)
        if outcome.error:
            raise RemoteError(f"the first request: {outcome.error}")


async def _send(
    client: HttpClient, args: BenchServeArgs, found: list[Prompt], bodies: list[dict[str, Any]], times: list[float]
) -> Load:
    outcomes = [Outcome(len(each.token_ids)) for each in found]
    with progress_bar(len(found), is_shown=not args.disable_tqdm, title="Requests") as bar:

        async def send(i: int) -> None:
            request_id = f"{args.request_id_prefix}{i}"
            await ask(client, args.path, bodies[i], outcomes[i], request_id)

        on_end: Callable[[], object] = bar.update
        return await send_load(outcomes, send, times, max_concurrency=args.max_concurrency, on_end=on_end)


def _count_tokens(load: Load, tokenizer: Any) -> None:
    """Count the tokens of the texts of answers for which the server reported no number, as vLLM's command does."""
    untold = [each for each in load.outcomes if each.is_ok and not each.output_tokens]
    for each in untold:
        each.output_tokens = len(encode(tokenizer, each.text, add_special_tokens=False))
    if untold:
        sys.stderr.write(f"warning: {len(untold)} answers had no usage: the tokens of their text are counted here\n")


# ---- what comes of it --------------------------------------------------------------------------------------------


def _head(args: BenchServeArgs, model: str, folder: Path, count: int) -> dict[str, Any]:
    head: dict[str, Any] = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": args.backend.value,
        "backend": args.backend.value,
        "label": args.label,
        "model_id": model,
        "tokenizer_id": str(folder),
        "num_prompts": count,
        **_pairs("--metadata", args.metadata, "="),
        "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
    }
    if args.ramp_up_strategy is not None:
        head["ramp_up_strategy"] = args.ramp_up_strategy.value
        head |= {"ramp_up_start_rps": args.ramp_up_start_rps, "ramp_up_end_rps": args.ramp_up_end_rps}
    return head


def _write(args: BenchServeArgs, result: dict[str, Any], load: Load, wanted: Wanted) -> None:
    if args.save_detailed:
        result |= details(load)
    if args.save_result or args.append_result:
        concurrency = f"-concurrency{args.max_concurrency}" if args.max_concurrency else ""
        model = Path(result["model_id"]).name
        label = (args.label or args.backend.value).replace("/", "-")
        usual = f"{label}-{args.request_rate}qps{concurrency}-{model}-{result['date']}.json"
        path = (args.result_dir or Path()) / (args.result_filename or usual)
        with suppress(OSError):  # the writing tells why there is no folder, and prints the results
            path.parent.mkdir(parents=True, exist_ok=True)
        write_results(path, json.dumps(result) + "\n", append=args.append_result)
    if args.plot is not None:
        from hbserve.load.plots import plot_load

        title = f"{result['model_id']}: {result['completed']} requests, {result['output_throughput']:.0f} tok/s"
        plot_load(args.plot, load, wanted.goals_s, title)

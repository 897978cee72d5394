"""`hbserve generate`: answers prompts on stdout, with a summary on stderr."""

import asyncio
import io
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbserve.commands.command import shown_at_terminal
from hbserve.models.demo_model import find_model_folder
from hbserve.processes.start_notice import telling_at_terminal
from hbserve.progress import progress_bar
from hbserve.remote import remote_scheduler
from hbserve.results import GenerationResult, Timings
from hbserve.text.prompts import naming, read_prompts, some_tokens
from hbserve.text.text_request import Scheduler, TextRequest, answer_all, check_all
from hbserve.text.tokenizer import encode_message, load_tokenizer, require_tokenizer_of
from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import FinishReason
from hbserve_scheduler import ConfigError, load_config

End = tuple[Timings, FinishReason]
Begun = tuple[Scheduler, Any, list[list[int]]]
"""The scheduler to ask, the model's tokenizer, and the token ids of the prompts."""


@dataclass(frozen=True)
class GenerateArgs:
    """The command's arguments."""

    prompts: list[str]
    system: str | None
    model: Path | None
    config: Path | None
    sampling: dict[str, Any]
    """Keywords of SamplingParams."""
    kv_transfer_backend: str | None
    connect: str | None
    keys: Path | None
    log_level: str


async def generate_answers(args: GenerateArgs) -> None:
    """Answer the prompts. Raises, if possible, whatever is wrong before anything is started."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character shows its number
        sys.stdout.reconfigure(errors="backslashreplace")
    params = SamplingParams(**args.sampling)
    texts = [str(each) for each in read_prompts(args.prompts)]
    begun = _connected(args, texts) if args.connect is not None else _started(args, texts)
    async with begun as (scheduler, tokenizer, prompts):
        if len(prompts) == 1:
            request = TextRequest(scheduler, tokenizer, prompts[0], params)
            ends, lengths = [await _stream(request)], [len(request.choices[0].detokenizer.token_ids)]
        else:
            results = await _together(scheduler, tokenizer, prompts, params)
            for text, result in zip(texts, results, strict=True):
                sys.stdout.write(shown_at_terminal(f"> {text}\n{result['text']}\n\n"))
            ends = [(result, result["finish_reason"]) for result in results]
            lengths = [len(result["token_ids"]) for result in results]
    reasons = [why_ended(reason, length, params.max_tokens) for (_, reason), length in zip(ends, lengths, strict=True)]
    sys.stderr.write(f"{summary([timings for timings, _ in ends], sum(lengths))} | {counted(reasons)}\n")


async def _stream(request: TextRequest) -> End:
    end: tuple[Timings | None, FinishReason | None] = None, None
    has_begun = False
    try:
        async for delta in request:
            sys.stdout.write(shown_at_terminal(delta["text"]))
            sys.stdout.flush()
            has_begun = has_begun or bool(delta["text"])
            end = delta["timings"], delta["finish_reason"]
    except Exception:  # its message needs a line of its own
        sys.stdout.write("\n" * has_begun)
        raise
    sys.stdout.write("\n")
    timings, reason = end
    assert timings is not None, "the last delta has both"
    assert reason is not None
    return timings, reason


async def _together(
    scheduler: Scheduler, tokenizer: Any, prompts: list[list[int]], params: SamplingParams
) -> list[GenerationResult]:
    each = [params] * len(prompts)
    shapes = check_all(scheduler, prompts, each)
    with progress_bar(len(prompts)) as bar:
        return await answer_all(scheduler, tokenizer, prompts, each, shapes, bar.update)


def why_ended(reason: FinishReason, num_tokens: int, max_tokens: int) -> str:
    """Say in a user's words why an answer ended, so that no answer is cut silently."""
    if reason != "length":
        return "stopped" if reason == "stop" else "aborted"
    return "cut at --max-tokens" if num_tokens >= max_tokens else "cut at the longest sequence that is served"


def counted(reasons: list[str]) -> str:
    """List each reason once, with its count if there are several answers."""
    counts = Counter(reasons)
    return ", ".join(f"{count} {reason}" if len(reasons) > 1 else reason for reason, count in counts.items())


def summary(timings: list[Timings], num_tokens: int) -> str:
    """Summarise requests in one line: with several requests, means of the times and sums of the rest."""
    ttft_ms = 1e3 * sum(each["ttft_s"] for each in timings) / len(timings)
    handoffs_s = [each["handoff_s"] for each in timings if each["handoff_s"]] or [0.0]
    handoff_ms = 1e3 * sum(handoffs_s) / len(handoffs_s)
    tpot_ms = 1e3 * sum(each["tpot_s"] for each in timings) / len(timings)
    num_bytes = sum(each["kv_bytes"] for each in timings)
    transfer_s = sum(each["kv_transfer_time_s"] for each in timings)
    rate = f"{num_bytes / transfer_s / 1e9:.2f} GB/s" if transfer_s else "-"
    mean = "mean " if len(timings) > 1 else ""
    return (
        f"{mean}TTFT {ttft_ms:.0f} ms | {mean}hand-off {handoff_ms:.1f} ms | {mean}TPOT {tpot_ms:.1f} ms | "
        f"{num_tokens} tokens | KV moved {num_bytes / 2**20:.2f} MiB | transfer {transfer_s * 1e3:.1f} ms, {rate}"
    )


def _encoded(tokenizer: Any, texts: list[str], system: str | None) -> list[list[int]]:
    """Encode the prompts, by the chat template if the model has one.

    Raises:
        InvalidRequest: a prompt has no token, or the chat template refuses it or cannot be read. Names the prompt.
    """
    prompts = []
    for place, text in enumerate(texts):
        with naming(place, len(texts)):
            prompts.append(some_tokens(encode_message(tokenizer, text, system)))
    return prompts


@asynccontextmanager
async def _started(args: GenerateArgs, texts: list[str]) -> AsyncIterator[Begun]:
    from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

    config = PdDisaggConfig.from_deployment(load_config(args.config)) if args.config else PdDisaggConfig()
    if args.model is not None:
        config.model_path = args.model
    if args.kv_transfer_backend is not None:
        config.kv_transfer_backend = args.kv_transfer_backend
    config.model_path = await find_model_folder(config.model_path)
    require_tokenizer_of(config.model_path)
    llm = DisaggregatedLLM(config, log_level=args.log_level)
    prompts: list[list[int]] = []
    async with telling_at_terminal(llm.waiting_for):
        await llm.start(lambda tokenizer: prompts.extend(_encoded(tokenizer, texts, args.system)))
    try:
        yield llm.scheduler, llm.tokenizer, prompts
    finally:
        await llm.stop()


@asynccontextmanager
async def _connected(args: GenerateArgs, texts: list[str]) -> AsyncIterator[Begun]:
    for name in ("config", "kv_transfer_backend"):
        if getattr(args, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}={getattr(args, name)}: not with --connect, whose deployment sets it"
            )
    async with remote_scheduler(args.connect or "", args.keys) as (scheduler, info):
        if not info.ready:
            sys.stderr.write(f"not all instances of the scheduler at {scheduler.address} are ready; its log says why\n")
        if args.model is None and not info.model_path:  # its file may still have none where others chose the model
            sys.stderr.write(
                "the scheduler names no model; the demo model's tokenizer is taken, --model takes another\n"
            )
        folder = await folder_here(args.model, info.model_path)
        require_tokenizer_of(folder)
        # In a thread, because this imports transformers, which takes seconds.
        tokenizer = await asyncio.to_thread(load_tokenizer, folder)
        yield scheduler, tokenizer, await asyncio.to_thread(_encoded, tokenizer, texts, args.system)


async def folder_here(given: Path | None, told: str) -> Path:
    """Return the folder of the model whose tokenizer is used: `given`, or else `told`.

    Args:
        given: the user's --model.
        told: the scheduler's path or hub id of the model; "" is the demo model.

    Raises:
        ConfigError: this host does not have the model that the scheduler named.
        FileNotFoundError: this host does not have the model that was given.
    """
    try:
        return await find_model_folder(given or told or None)
    except FileNotFoundError as error:
        if given is not None:
            raise
        raise ConfigError(
            f"the deployment serves {told!r}, whose tokenizer is needed on this host: {error}; "
            "if it is in another folder here, say so with --model"
        ) from None

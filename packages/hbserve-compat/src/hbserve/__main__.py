"""The command line: `hbserve generate | chat | serve | instance | scheduler | bench`.

What a command needs is imported when it runs: the scheduler's process never sees torch.
"""

import asyncio
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hbserve_rpc import own_process
from hbserve_rpc.plain_values import shown


def _begin() -> None:
    """Before every command: libraries ask for the current folder when they are imported, and fail without a word of
    what is wrong."""
    own_process.set_up()
    try:
        os.getcwd()
    except FileNotFoundError:
        typer.echo("error: the current folder was deleted: change to one that exists", err=True)
        raise typer.Exit(1) from None


app = typer.Typer(
    name="hbserve",
    help="Language models with prefill and decode on separate instances.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    callback=_begin,
    rich_markup_mode=None,
)


class LogLevel(StrEnum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class InstanceRole(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file of the deployment.")]
ModelOption = Annotated[Path | None, typer.Option(help="A Hugging Face model folder; without it, the demo model.")]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False)]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One prompt is streamed; several are answered together.")],
    model: ModelOption = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a deployment on this host.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    kv_transfer_backend: Annotated[str | None, typer.Option(help="nccl, mooncake, ipc, auto, or your own.")] = None,
    connect: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Use the scheduler that runs there.")] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Answer prompts. Starts a scheduler, a prefill and a decode instance here, unless --connect is given."""
    from hbserve.generate import GenerateArgs, generate_answers

    args = GenerateArgs(prompts, model, config, max_tokens, temperature, kv_transfer_backend, connect, log_level.value)
    _run(generate_answers(args), log_level)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{shown(text)}: expected a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{shown(text)}: expected a JSON object")
    return found


@app.command()
def serve(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML file of the deployment; without it, one pair.")] = None,
    model: ModelOption = None,
    host: Annotated[str | None, typer.Option(help="Where the OpenAI server listens; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="8000; 0 lets the system choose.")] = None,
    uds: Annotated[str | None, typer.Option(help="A Unix domain socket instead.")] = None,
    api_servers: Annotated[int | None, typer.Option(help="Processes that serve the port; 1.")] = None,
    served_model_names: Annotated[
        list[str] | None, typer.Option("--served-model-name", help="May be repeated.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Clients must send it; or set HBSERVE_API_KEY.")] = None,
    api_key_file: Annotated[str | None, typer.Option(help="A key on each line; read again when it changes.")] = None,
    cors_origins: Annotated[list[str] | None, typer.Option("--cors-origin", help="Whose pages may ask.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="For HTTPS, with --ssl-certfile.")] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="For HTTPS, with --ssl-keyfile.")] = None,
    root_path: Annotated[str | None, typer.Option(help="Where a proxy shows the server.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A Jinja file, or its text.")] = None,
    default_chat_template_kwargs: Annotated[Any, typer.Option(metavar="JSON", parser=_json_object)] = None,
    first_byte_timeout_s: Annotated[float | None, typer.Option("--first-byte-timeout", metavar="SECONDS")] = None,
    drain_timeout_s: Annotated[float | None, typer.Option("--drain-timeout", metavar="SECONDS")] = None,
    max_body_size: Annotated[str | None, typer.Option(help="Of a request, such as 16MiB.")] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Serve OpenAI's API, and run the scheduler and every instance of a deployment on this host."""
    from hbserve.serve import ServeArgs, serve_all

    others = {"config", "model", "log_level"}
    server = {name: value for name, value in context.params.items() if name not in others and value not in (None, [])}
    _run(serve_all(ServeArgs(config, model, log_level.value, server)), log_level)


@app.command()
def chat(
    url: Annotated[str | None, typer.Option(help="A server's; without it, one pair is started here.")] = None,
    api_key: Annotated[str | None, typer.Option(help="For --url; or set HBSERVE_API_KEY.")] = None,
    model: ModelOption = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a deployment on this host.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, and not the program."""
    from hbserve.chat import ChatArgs
    from hbserve.chat import chat as talk

    _run(talk(ChatArgs(url, api_key, model, config, max_tokens, temperature, log_level.value)), log_level)


@app.command()
def instance(
    config: ConfigOption,
    instance_id: Annotated[str, typer.Option(help="Which of the file's gpu_instances; with --role, its own.")],
    role: Annotated[InstanceRole | None, typer.Option(help="Of an instance that is not in the file.")] = None,
    host: Annotated[str | None, typer.Option(help="With --role, where it is reached; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="With --role; 0 lets the system choose.")] = None,
    register: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="Of a scheduler that is to use it. May be repeated.")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run one instance of a deployment."""
    from hbserve.serve import InstanceArgs, serve_instance

    chosen: Any = None if role is None else role.value
    args = InstanceArgs(config, instance_id, chosen, host, port, register or [], log_level.value)
    _run(serve_instance(args), log_level)


@app.command()
def scheduler(config: ConfigOption, log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Run the scheduler of a deployment. Needs no torch."""
    from hbserve_scheduler.__main__ import serve_config

    _run(serve_config(config), log_level)


ConnectOption = Annotated[str, typer.Option(metavar="HOST:PORT", help="Where its scheduler's RPC is.")]


@app.command()
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Of an instance, which says itself what it is.")],
    connect: ConnectOption,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Have a running deployment use an instance, also one that was told to drain or to leave."""
    from hbserve import members

    _run(members.join(connect, address), log_level)


@app.command()
def drain(
    instance_id: Annotated[str, typer.Argument(metavar="ID")],
    connect: ConnectOption,
    leave: Annotated[bool, typer.Option("--leave", help="Forget it when it has nothing left.")] = False,
    within_s: Annotated[
        float | None,
        typer.Option("--within", metavar="SECONDS", help="Then move what it has elsewhere; with --leave."),
    ] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Give an instance no new requests, and wait until it has finished those that it has."""
    from hbserve import members

    _run(members.drain(members.DrainArgs(connect, instance_id, leave, within_s)), log_level)


@app.command()
def reload(connect: ConnectOption, log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Have a scheduler read its file again: instances that are new join, those that are gone leave."""
    from hbserve import members

    _run(members.reload(connect), log_level)


@app.command()
def stats(
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where its scheduler's RPC is.")],
    json: Annotated[bool, typer.Option("--json", help="All figures, for programs.")] = False,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Show the figures of a running deployment."""
    from hbserve.stats import StatsArgs, show_stats

    _run(show_stats(StatsArgs(connect, json)), log_level)


@app.command()
def trace(
    connect: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where its scheduler's RPC is.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Gzipped JSON, which Perfetto opens.")] = Path(
        "trace.json.gz"
    ),
    request_id: Annotated[str, typer.Option("--request", metavar="ID", help="This request alone.")] = "",
    last_s: Annotated[float, typer.Option("--last", metavar="SECONDS", help="How far back.")] = 3600.0,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Write a timeline of the requests of a running deployment."""
    from hbserve.trace import TraceArgs, write_trace

    _run(write_trace(TraceArgs(connect, request_id, last_s, output)), log_level)


bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Workload(StrEnum):
    MIXED = "mixed"
    SINGLE = "single"
    PREFILL = "prefill"
    DECODE = "decode"


@bench.command()
def engine(
    model: ModelOption = None,
    workload: Annotated[list[Workload] | None, typer.Option(help="May be repeated; without it, all four.")] = None,
    scale: Annotated[
        float | None, typer.Option(min=0, help="Size of the workloads; 1 on a GPU, and 1/32 elsewhere.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="A decode step's time by batch size instead.")] = False,
    batch_sizes: Annotated[
        str | None, typer.Option(metavar="1,2,…", help="With --sweep; up to 256 on a GPU, up to 32 elsewhere.")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="64,512,…", help="With --sweep: prompt lengths; 512 on a GPU, 64 elsewhere.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="With --sweep: a file for one JSON object a row.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="auto is the model's own.")] = Dtype.AUTO,
    random_weights: Annotated[bool, typer.Option(help="Read only the model's config.json.")] = False,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Ranks; on CUDA, GPUs side by side.")] = 1,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """One engine alone, on nano-vllm's workload, one stream, prompts only, and decodes only; or by batch size."""
    from hbserve.bench import EngineUnderTest, bench_engine, sweep_engine

    _refuse_options_of_the_other_kind(sweep, [workload, scale], [batch_sizes, contexts, json])
    sizes, lengths = _numbers("--batch-sizes", batch_sizes), _numbers("--contexts", contexts)
    if scale is not None and not math.isfinite(scale):
        raise typer.BadParameter(f"{scale}: expected a number from 0 on", param_hint="--scale")
    chosen = EngineUnderTest(model, device, dtype.value, random_weights, tensor_parallel_size)
    with _explaining(log_level):
        if sweep:
            sweep_engine(chosen, sizes, lengths, json)
        else:
            bench_engine(chosen, [each.value for each in workload or Workload], scale)


def _refuse_options_of_the_other_kind(sweep: bool, of_workloads: list[Any], of_sweep: list[Any]) -> None:
    if sweep and any(given is not None for given in of_workloads):
        raise typer.BadParameter("--workload and --scale are not for --sweep")
    if not sweep and any(given is not None for given in of_sweep):
        raise typer.BadParameter("--batch-sizes, --contexts and --json need --sweep")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Ascending, without repetitions."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", part) and int(part) >= 1 for part in parts):
        problem = f"{shown(text)}: expected numbers from 1 to {10**9 - 1}, with commas between"
        raise typer.BadParameter(problem, param_hint=option)
    return tuple(sorted({int(part) for part in parts}))


def _run(job: Coroutine[Any, Any, None], log_level: LogLevel) -> None:
    with _explaining(log_level):
        asyncio.run(_until_signalled(job))


@contextmanager
def _explaining(log_level: LogLevel) -> Iterator[None]:
    """Around the whole of a command. A problem that has a name is one line on stderr."""
    logging.basicConfig(level=log_level.value, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it is explained why it cannot be written
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except _Signalled as ended:
        for number in own_process.ending_signals():  # nothing is left to do but to end: no more of them is of use
            signal.signal(number, signal.SIG_IGN)
        raise typer.Exit(128 + ended.number) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        raise typer.Exit(141) from None
    except Exception as error:
        if log_level is LogLevel.DEBUG:
            raise
        if not _is_explained(error):
            logging.getLogger(__name__).exception("unexpected error; please report it")
        typer.echo(f"error: {_one_line(str(error))}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None
    finally:
        _forget_what_nobody_takes()


def _forget_what_nobody_takes() -> None:
    """Output that cannot be written: Python would try again when it ends, and say so in its own words."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _one_line(text: str) -> str:
    """What others say may have several lines, and the names of files anything: a terminal must not obey it."""
    joined = " ".join(text.split())
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in joined)


class _Signalled(BaseException):
    """A signal has ended the command."""

    def __init__(self, number: int) -> None:
        self.number = number


async def _until_signalled(job: Coroutine[Any, Any, None]) -> None:
    """A signal ends a command in order; another one, while it ends, at once. Commands that serve have handlers of their
    own."""
    task = asyncio.current_task()
    assert task is not None
    received: list[signal.Signals] = []

    def end(number: signal.Signals) -> None:
        if received:  # the event loop will have ended before its processes have, of which asyncio would complain
            logging.getLogger("asyncio").setLevel(logging.ERROR)
        received.append(number)
        task.cancel()

    with own_process.on_ending_signals(end):
        try:
            await job
        except asyncio.CancelledError:
            if not received:
                raise
            raise _Signalled(received[0]) from None


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for users: errors of this project, and of the operating system."""
    return isinstance(error, OSError) or type(error).__module__.startswith("hbserve")


def main() -> None:
    app()


if __name__ == "__main__":
    main()

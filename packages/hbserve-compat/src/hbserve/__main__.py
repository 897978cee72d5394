"""The command line: `hbserve generate | chat | serve | instance | scheduler | scale | stats | top | trace | bench`.

Each command imports what it needs when it runs, so that the scheduler's process never loads torch.
"""

import json
import os
import sys
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from hbserve.commands.bench import bench
from hbserve.commands.command import (
    KeysOption,
    LogLevel,
    LogLevelOption,
    explaining,
    forget_what_nobody_takes,
    run,
)
from hbserve.commands.keys import Rotation, write_keys
from hbserve.commands.planning import add_to
from hbserve.commands.running import running
from hbserve.options import file_option
from hbserve_rpc import own_process
from hbserve_rpc.plain_values import shown


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hbserve {version('hbserve-compat')}")
        raise typer.Exit


def _begin(
    is_version_wanted: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Set up the process before any command, and refuse a deleted current folder: libraries ask for that folder when
    they are imported, and their errors do not say what is wrong."""
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
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
)


ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face model folder, an id in the local cache, or a GGUF file; without it, the demo model.",
    ),
]
ConfigOption = Annotated[Path, file_option("YAML file of the deployment.")]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        help="A Hugging Face model folder, an id in the local cache, or a GGUF file; without it, the demo model."
    ),
]
MaxTokensOption = Annotated[int, typer.Option(help="Most tokens of each answer.")]
TemperatureOption = Annotated[float, typer.Option(help="Randomness of answers: 0 always takes the likeliest token.")]
TopPOption = Annotated[
    float | None, typer.Option(help="Sample among the likeliest tokens of this total probability. By default 1: all.")
]
SeedOption = Annotated[int | None, typer.Option(help="The same seed gives the same answer. By default answers differ.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. May be repeated.")]
SystemOption = Annotated[str | None, typer.Option(help="System message, before the first prompt.")]


@app.command()
def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="One prompt is streamed; several are answered together. - reads one from stdin."),
    ] = None,
    more_prompts: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="The same, as an option.")] = None,
    system: SystemOption = None,
    model: ModelOption = None,
    config: Annotated[Path | None, file_option("YAML file of a deployment on this host.")] = None,
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    kv_transfer_backend: Annotated[str | None, typer.Option(help="nccl, mooncake, ipc, auto, or your own.")] = None,
    connect: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Use the scheduler that runs there.")] = None,
    keys: KeysOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Answer prompts. Starts a scheduler, a prefill and a decode instance here, unless --connect is given."""
    from hbserve.commands.generate import GenerateArgs, generate_answers

    all_prompts = [_typed_or_read(each) for each in [*(prompts or []), *(more_prompts or [])]]
    if not all_prompts:
        raise typer.BadParameter("expected at least one, or - to read it from stdin", param_hint="PROMPTS")
    args = GenerateArgs(
        all_prompts, system, model, config, _sampling(context), kv_transfer_backend, connect, keys, log_level.value
    )
    run(generate_answers(args), log_level)


def _typed_or_read(prompt: str) -> str:
    """Return a prompt, or the text of stdin for `-`. Runs outside of an event loop, so that Ctrl-C ends the reading."""
    if prompt != "-":
        return prompt
    text = "" if sys.stdin is None else sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n")
    if not text:
        raise typer.BadParameter("'-': stdin is empty", param_hint="PROMPTS")
    return text


def _sampling(context: typer.Context) -> dict[str, Any]:
    """Return the keywords of SamplingParams that were given, or that have a default in the command."""
    names = ("max_tokens", "temperature", "top_p", "seed", "stop")
    return {name: context.params[name] for name in names if context.params[name] not in (None, [], ())}


def _one_model(argument: str | None, option: Path | None) -> Path | None:
    if argument is not None and option is not None:
        raise typer.BadParameter(f"{argument} and --model {option}: expected one of the two", param_hint="MODEL")
    return option if argument is None else Path(argument)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{shown(text)}: expected a JSON object: {error}") from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{shown(text)}: expected a JSON object")
    return found


ServedHostOption = Annotated[
    str | None, typer.Option(help="Address that the server listens on. By default 127.0.0.1: this host only.")
]
ServedPortOption = Annotated[
    int | None, typer.Option(help="Port of the server. By default 8000; 0 lets the system choose.")
]
UdsOption = Annotated[str | None, typer.Option(help="Path of a Unix domain socket to serve on, instead of a port.")]
ServedModelNamesOption = Annotated[
    list[str] | None,
    typer.Option("--served-model-name", help="Name of the model for requests; may be repeated."),
]
ApiKeyOption = Annotated[
    str | None, typer.Option(help="Key that clients must send. By default HBSERVE_API_KEY, or none.")
]
ApiKeyFileOption = Annotated[
    str | None, typer.Option(help="File with an API key on each line; read again when it changes.")
]
CorsOriginsOption = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", help="Origin of web pages that may call the server; may be repeated."),
]
SslKeyfileOption = Annotated[str | None, typer.Option(help="Private key for HTTPS, a PEM file; with --ssl-certfile.")]
SslCertfileOption = Annotated[str | None, typer.Option(help="Certificate for HTTPS, a PEM file; with --ssl-keyfile.")]
ChatTemplateOption = Annotated[
    str | None, typer.Option(help="Chat template to use, a Jinja file or its text. By default the model's.")
]
DefaultChatTemplateKwargsOption = Annotated[
    Any, typer.Option(metavar="JSON", parser=_json_object, help="Variables of the chat template, for all requests.")
]
GenerationConfigOption = Annotated[
    str | None, typer.Option(help="auto takes the model's defaults for sampling, none does not. By default auto.")
]
FirstByteTimeoutSOption = Annotated[
    float | None,
    typer.Option(
        "--first-byte-timeout",
        metavar="SECONDS",
        help="Begin a stream after so long, even without a token. By default 30.",
    ),
]
DrainTimeoutSOption = Annotated[
    float | None,
    typer.Option(
        "--drain-timeout",
        metavar="SECONDS",
        help="How long answers may still take when the server ends. By default 30.",
    ),
]
SchedulerPortOption = Annotated[
    int | None, typer.Option(help="Port of the scheduler, for --connect of other commands. By default 5550.")
]
RayOption = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Place instances on the nodes of a Ray cluster; auto is this host's."),
]


@app.command()
def serve(
    context: typer.Context,
    named_model: ModelArgument = None,
    config: Annotated[Path | None, file_option("YAML file of the deployment; without it, one pair.")] = None,
    model: ModelOption = None,
    host: ServedHostOption = None,
    port: ServedPortOption = None,
    uds: UdsOption = None,
    api_servers: Annotated[int | None, typer.Option(help="Number of processes that answer HTTP. By default 1.")] = None,
    served_model_names: ServedModelNamesOption = None,
    api_key: ApiKeyOption = None,
    api_key_file: ApiKeyFileOption = None,
    cors_origins: CorsOriginsOption = None,
    ssl_keyfile: SslKeyfileOption = None,
    ssl_certfile: SslCertfileOption = None,
    root_path: Annotated[str | None, typer.Option(help="Path under which a proxy serves it.")] = None,
    chat_template: ChatTemplateOption = None,
    default_chat_template_kwargs: DefaultChatTemplateKwargsOption = None,
    generation_config: GenerationConfigOption = None,
    first_byte_timeout_s: FirstByteTimeoutSOption = None,
    drain_timeout_s: DrainTimeoutSOption = None,
    max_body_size: Annotated[str | None, typer.Option(help="Largest body of a request. By default 16MiB.")] = None,
    scheduler_port: SchedulerPortOption = None,
    ray: RayOption = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Serve OpenAI's API, and run the scheduler and every instance of a deployment on this host."""
    from hbserve.commands.serve import ServeArgs, serve_all

    others = {"named_model", "config", "model", "scheduler_port", "ray", "log_level"}
    server = {
        name: value for name, value in context.params.items() if name not in others and value not in (None, [], ())
    }
    args = ServeArgs(config, _one_model(named_model, model), log_level.value, server, ray, scheduler_port)
    run(serve_all(args), log_level, is_service=True)


@app.command()
def chat(
    context: typer.Context,
    named_model: ModelArgument = None,
    url: Annotated[str | None, typer.Option(help="URL of a server; without it, one pair is started here.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Its API key, with --url; or set HBSERVE_API_KEY.")] = None,
    system: SystemOption = None,
    model: ModelOption = None,
    config: Annotated[Path | None, file_option("YAML file of a deployment on this host.")] = None,
    max_tokens: MaxTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Chat with a model. Ctrl-C stops an answer, not the program; /clear forgets what was said."""
    from hbserve.commands.chat import ChatArgs
    from hbserve.commands.chat import chat as talk

    chosen = _one_model(named_model, model)
    run(talk(ChatArgs(url, api_key, system, chosen, config, _sampling(context), log_level.value)), log_level)


class InstanceType(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    HYBRID = "hybrid"


@app.command()
def instance(
    config: ConfigOption,
    instance_id: Annotated[str, typer.Option(help="Which of the file's gpu_instances; or a new name.")],
    instance_type: Annotated[
        InstanceType | None, typer.Option(help="Role of the instance. Needed for a new name.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where it serves, and where others reach it.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port that it serves on; 0: any.")] = None,
    register: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A scheduler that is to use it. May be repeated.")
    ] = None,
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run one instance of a deployment."""
    from hbserve.commands.serve import InstanceArgs, serve_instance

    own = {"instance_type": instance_type and instance_type.value, "host": host, "port": port}
    given = {name: value for name, value in own.items() if value is not None}
    args = InstanceArgs(config, instance_id, log_level.value, given, register or [])
    run(serve_instance(args), log_level, is_service=True)


@app.command()
def scheduler(config: ConfigOption, log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Run the scheduler of a deployment. Needs no torch."""
    from hbserve_scheduler.__main__ import serve_config

    run(serve_config(config), log_level, is_service=True)


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Folder of the key files.")],
    rotate: Annotated[Rotation | None, typer.Option(help="One step of changing keys while everything runs.")] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Make or change the keys with which the processes of a deployment authenticate each other."""
    with explaining(log_level):
        write_keys(folder, rotate)


@app.command()
def check(config: ConfigOption, log_level: LogLevelOption = LogLevel.WARNING) -> None:
    """Check a deployment on this host before anything starts: addresses, limits, clock, GPUs, NCCL's path."""
    from hbserve.check.deployment import CheckArgs, check_deployment

    run(check_deployment(CheckArgs(config)), log_level)


add_to(app)
app.add_typer(running)
app.add_typer(bench, name="bench")


def main() -> None:
    try:
        app()
    except OSError as error:  # output that is written before a command runs, such as --help, could not be written
        typer.echo(f"error: {error.filename or 'stdout'}: {error.strerror}", err=True)
        raise SystemExit(1) from None
    finally:
        forget_what_nobody_takes()


if __name__ == "__main__":
    main()

"""The command line: `hbserve generate | serve | instance | scheduler`.

What a command needs is imported when it runs: the scheduler's process never sees torch.
"""

import asyncio
import logging
from collections.abc import Coroutine
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="hbserve", help="Language models with prefill and decode on separate instances.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip


class LogLevel(StrEnum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file of the deployment.")]
LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False)]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One prompt is streamed; several are answered together.")],
    model: Annotated[Path | None, typer.Option(help="A Hugging Face model folder; without it, the demo model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of a deployment on this host.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    kv_transfer_backend: Annotated[str | None, typer.Option(help="nccl, mooncake, ipc, auto, or your own.")] = None,
    connect: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Use the scheduler that runs there.")] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Answer prompts. Starts a scheduler, a prefill and a decode instance here, unless --connect is given."""
    from hbserve.generate import Wanted, generate_answers

    wanted = Wanted(prompts, model, config, max_tokens, temperature, kv_transfer_backend, connect, log_level.value)
    _run(generate_answers(wanted), log_level)


@app.command()
def serve(config: ConfigOption, log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Run the scheduler and every instance of a deployment on this host."""
    from hbserve.serve import serve_all

    _run(serve_all(config, log_level.value), log_level)


@app.command()
def instance(
    config: ConfigOption,
    instance_id: Annotated[str, typer.Option(help="Which of the file's gpu_instances.")],
    log_level: LogLevelOption = LogLevel.INFO,
) -> None:
    """Run one instance of a deployment."""
    from hbserve.serve import serve_instance

    _run(serve_instance(config, instance_id, log_level.value), log_level)


@app.command()
def scheduler(config: ConfigOption, log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Run the scheduler of a deployment. Needs no torch."""
    from hbserve_scheduler.__main__ import serve_config

    _run(serve_config(config), log_level)


def _run(job: Coroutine[Any, Any, None], log_level: LogLevel) -> None:
    """Run a command to its end. A problem that has a name is one line on stderr."""
    logging.basicConfig(level=log_level.value, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(job)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        raise typer.Exit(141) from None
    except Exception as error:
        if log_level is LogLevel.DEBUG:
            raise
        if not _is_explained(error):
            logging.getLogger(__name__).exception("unexpected error; please report it")
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from None


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for users: errors of this project, and of the operating system."""
    return isinstance(error, OSError) or type(error).__module__.startswith("hbserve")


def main() -> None:
    app()


if __name__ == "__main__":
    main()

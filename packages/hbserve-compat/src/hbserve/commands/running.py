"""Commands for a running deployment: its members, its figures, and timelines of its requests.

Each command imports what it needs when it runs, as in `hbserve.__main__`.
"""

from pathlib import Path
from typing import Annotated

import typer

from hbserve.commands.command import KeysOption, LogLevel, LogLevelOption, run
from hbserve.options import number_option

running = typer.Typer()
ConnectOption = Annotated[str, typer.Option(metavar="HOST:PORT", help="Its scheduler's RPC address.")]
HERE = "127.0.0.1:5550"
"""Default RPC address of the scheduler of `hbserve serve` and `hbserve scheduler`; `scheduler.port` changes it."""


@running.command()
def join(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="An instance, which reports its name and role.")],
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Add an instance to a running deployment, or take back one that was told to drain or leave."""
    from hbserve.commands import members

    run(members.join(connect, keys, address), log_level)


@running.command()
def drain(
    instance_id: Annotated[
        str, typer.Argument(metavar="ID", help="Name of the instance, as `hbserve stats` shows it.")
    ],
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    leave: Annotated[
        bool, typer.Option("--leave", help="Remove it from the deployment when it has nothing left.")
    ] = False,
    within_s: Annotated[
        float | None,
        number_option("Then move its requests elsewhere and forget it.", "--within", least=0, metavar="SECONDS"),
    ] = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Give an instance no new requests, and wait until it has finished those that it has."""
    from hbserve.commands import members

    run(members.drain(members.DrainArgs(connect, keys, instance_id, leave, within_s)), log_level)


@running.command()
def flip(
    instance_id: Annotated[
        str, typer.Argument(metavar="ID", help="Name of the instance, as `hbserve stats` shows it.")
    ],
    role: Annotated[str, typer.Argument(metavar="ROLE", help="The role that it is to have: prefill or decode.")],
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Switch an instance to the other role: drains it first, and restarts nothing."""
    from hbserve.commands import members

    run(members.flip(connect, keys, instance_id, role), log_level)


@running.command()
def scale(
    wanted: Annotated[list[str], typer.Argument(metavar="ROLE=NUMBER...", help="For example prefill=3 decode=2.")],
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Set the number of instances of a role behind `hbserve serve`: adds some, or drains and ends some."""
    from hbserve.commands import members

    run(members.scale(connect, keys, wanted), log_level)


@running.command()
def reload(
    connect: ConnectOption = HERE, keys: KeysOption = None, log_level: LogLevelOption = LogLevel.WARNING
) -> None:
    """Have a scheduler reread its file: new instances join, removed ones leave."""
    from hbserve.commands import members

    run(members.reload(connect, keys), log_level)


@running.command()
def stats(
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Show the figures of a running deployment."""
    from hbserve.monitoring.stats import StatsArgs, show_stats

    run(show_stats(StatsArgs(connect, keys, json)), log_level)


@running.command()
def top(
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    once: Annotated[bool, typer.Option("--once", help="Watch for one second, print, and exit.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --once: print all figures as JSON.")] = False,
    log_level: LogLevelOption = LogLevel.ERROR,
) -> None:
    """Watch a running deployment: instances, links, latencies, and the last requests."""
    from hbserve.monitoring.top import TopArgs, show_top

    run(show_top(TopArgs(connect, keys, once, json)), log_level)


@running.command()
def trace(
    connect: ConnectOption = HERE,
    keys: KeysOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Gzipped JSON, to open in Perfetto.")] = Path(
        "trace.json.gz"
    ),
    request_id: Annotated[str, typer.Option("--request", metavar="ID", help="Only the request with this id.")] = "",
    last_s: Annotated[
        float,
        number_option("How far back it goes, in seconds. By default an hour.", "--last", least=0, metavar="SECONDS"),
    ] = 3600.0,
    log_level: LogLevelOption = LogLevel.WARNING,
) -> None:
    """Write a timeline of the requests of a running deployment."""
    from hbserve.monitoring.trace import TraceArgs, write_trace

    run(write_trace(TraceArgs(connect, keys, request_id, last_s, output)), log_level)

"""Kinds of options that several commands have: numbers, lists of them, and files that are read."""

import errno
import math
import os
import stat
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import typer

from hbserve_rpc import InvalidRequest
from hbserve_rpc.plain_values import shown

N = TypeVar("N", int, float)
MOST = 10**9
"""Highest value of a number with no other limit: in milliseconds 12 days, and in seconds 30 years."""
MOST_RANKS = 1024
"""Most GPUs that a model may be split over."""


class Dtype(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def number_option(what: str, *names: str, least: float, most: float | None = MOST, metavar: str | None = None) -> Any:
    """Make a command-line option whose value is a number. `most`: None allows inf too."""
    return typer.Option(*names, min=least, max=most, metavar=metavar, callback=_no_nan, help=what)


def ranks_option(what: str) -> Any:
    """Make a command-line option whose value is a number of GPUs."""
    return typer.Option(min=1, max=MOST_RANKS, help=what)


def file_option(what: str) -> Any:
    """Make a command-line option whose value is a file that is read. It may be a pipe."""
    return typer.Option(callback=_readable, help=what)


def numbers(option: str, text: str, kind: type[N], *, least: float, most: float) -> tuple[N, ...]:
    """Parse an option's numbers, which commas separate. Returns them ascending.

    Raises:
        InvalidRequest: there is none, one is out of range, or one is given twice.
    """
    found: tuple[N, ...] = ()
    with suppress(ValueError):  # refused below
        found = tuple(sorted(kind(each) for each in text.split(",")))
    if not found or not all(least <= each <= most for each in found) or len({*found}) < len(found):
        problem = f"expected numbers from {least:.12g} to {most:.12g}, separated by commas, each of them once"
        raise InvalidRequest(f"{option}={shown(text)}: {problem}")
    return found


def why_unreadable(path: Path) -> str | None:
    """Return why a file cannot be read; None if it can, as a pipe can. A device may have no end."""
    try:
        kind = path.stat().st_mode
    except (OSError, ValueError) as error:  # a ValueError: it has a null character
        return getattr(error, "strerror", None) or str(error)
    if stat.S_ISDIR(kind):
        return os.strerror(errno.EISDIR)
    if stat.S_ISCHR(kind) or stat.S_ISBLK(kind):
        return "is a device; expected a file"
    return None if os.access(path, os.R_OK) else os.strerror(errno.EACCES)


def _no_nan(value: float | None) -> float | None:
    """Refuse nan, which is neither below nor above a limit."""
    if value is not None and math.isnan(value):
        raise typer.BadParameter(f"{value} is not a number.")
    return value


def _readable(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse what cannot be read, before any work. Returns the path with the user's home in place of ~."""
    if value is None:
        return None
    path = Path(os.path.expanduser(value))
    if why := why_unreadable(path):
        typer.echo(f"error: {param.opts[-1]}={shown(str(value))}: {why}", err=True)
        raise typer.Exit(2)
    return path

"""The common part of all commands of the command line: how they run, how they end, and how they report errors."""

import asyncio
import errno
import inspect
import logging
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hbserve_rpc import own_process
from hbserve_rpc.plain_values import one_line
from hbserve_rpc.stderr_log import log_to_stderr


class LogLevel(StrEnum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


LogLevelOption = Annotated[LogLevel, typer.Option("--log-level", case_sensitive=False)]
KeysOption = Annotated[
    Path | None,
    typer.Option("--keys", envvar="HBSERVE_KEYS", help="Folder with client.key, if the scheduler uses keys."),
]


def taking(args: type[Any], job: Callable[..., None]) -> Callable[..., None]:
    """Make a command that calls `job(args, log_level)`, with the fields of the dataclass `args` and --log-level as its
    options. For commands with too many options for a signature."""
    hints = get_type_hints(args, include_extras=True)

    def command(*, log_level: LogLevel, **values: Any) -> None:
        job(args(**values), log_level)

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            field.name,
            keyword,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(args)
    ]
    of_log = inspect.Parameter("log_level", keyword, default=LogLevel.WARNING, annotation=LogLevelOption)
    command.__signature__ = inspect.Signature([*parameters, of_log])  # type: ignore[attr-defined]  # for typer
    command.__annotations__ = {each.name: each.annotation for each in [*parameters, of_log]}
    command.__doc__ = job.__doc__
    return command


def run(job: Coroutine[Any, Any, None], log_level: LogLevel, *, is_service: bool = False) -> None:
    """Run a command. A service has no answer to write, and may therefore run without a stdout."""
    try:
        with explaining(log_level, is_service=is_service):
            asyncio.run(own_process.until_signalled(job))
    finally:
        job.close()


@contextmanager
def explaining(log_level: LogLevel, *, is_service: bool = False) -> Iterator[None]:
    """Wrap a whole command: set up its log, and end it with one line on stderr for an error that explains itself."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `hbserve.entry`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log_to_stderr(log_level.value)
    try:
        if sys.stdout is None and not is_service:
            raise OSError("stdout is closed: the answers have nowhere to go")
        with own_process.keeping_interrupts():
            yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that a failure to write is explained below
    except KeyboardInterrupt:
        raise typer.Exit(128 + signal.SIGINT) from None
    except own_process.Signalled as ended:
        for number in own_process.ending_signals():  # the process is ending already: ignore any further ones
            signal.signal(number, signal.SIG_IGN)
        raise typer.Exit(128 + ended.number) from None
    except BrokenPipeError:  # the reader of our output, such as `head`, has ended
        raise typer.Exit(141) from None
    except Exception as error:
        if log_level is LogLevel.DEBUG:
            raise
        if not _is_explained(error):
            logging.getLogger(__name__).exception("unexpected error; please report it")
        typer.echo(f"error: {one_line(own_process.with_file_limit(_in_words(error)))}", err=True)
        raise typer.Exit(2 if _is_about_input(error) else 1) from None
    finally:
        forget_what_nobody_takes()


def forget_what_nobody_takes() -> None:
    """Discard output that cannot be written. Otherwise Python would try again at its end, and print its own error."""
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shown_at_terminal(text: str) -> str:
    """Return a model's text for stdout. A terminal gets escapes for characters that it would obey, which may come from
    somebody else's server; a file or pipe gets them as they are."""
    if sys.stdout.isatty():
        return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)
    return text


def _in_words(error: Exception) -> str:
    """Return an error's message. An OSError becomes "file: reason"; its own text begins with the error's number."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        most, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if most != resource.RLIM_INFINITY:  # else it is the file system's limit
            cure = f"this process may write files of {most} bytes; raise `ulimit -f`"
            return f"{error.filename or 'a file'}: {error.strerror}: {cure}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in own_process.NO_FILE_LEFT:
        return str(error.strerror)
    return str(error)


def _is_about_input(error: Exception) -> bool:
    """Whether an error is about what the command was given: a value, or a file that is missing or may not be used. Not
    about what happened at its work, such as a port in use or a full disk."""
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP):
        return error.filename is not None  # else it is not about a file
    return isinstance(error, (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError))


def _is_explained(error: Exception) -> bool:
    """Whether the message was written for users, as those of this project and of the operating system were."""
    return isinstance(error, OSError) or type(error).__module__.startswith("hbserve")

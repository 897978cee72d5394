"""The command line's own parser, for commands in documents, which it must accept."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer

from hbserve.__main__ import app


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the parameters that these arguments of `hbserve` give to a command, without running it.

    Raises what the parser raises for an option or a command that does not exist: SystemExit, or its own error.
    """
    command: Any = typer.main.get_command(app)
    context: Any = None
    rest = list(arguments)
    while hasattr(command, "commands"):
        context = command.make_context(command.name, rest, parent=context)
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context.invoked_subcommand = name
    # The files of a document are not on this machine.
    with (
        patch("hbserve.options.why_unreadable", return_value=None),
        command.make_context(command.name, rest, parent=context) as own,
    ):
        return dict(own.params)


def commands_of(document: Path) -> Iterator[list[str]]:
    """Yield the arguments of each `hbserve` in the shell blocks of a Markdown file, whatever starts it."""
    in_block, held = False, ""
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            in_block = line.startswith(("```bash", "```sh", "```console"))
        elif in_block:
            held += line.removesuffix("\\") + " "
            if not line.endswith("\\") and not _is_in_quotes(held):
                yield from _hbserve_in(held)
                held = ""


def _is_in_quotes(line: str) -> bool:
    """Whether a line ends within quotes, so that the next line belongs to it."""
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return True
    return False


_BEFORE = {"uv", "run", "--no-sync", "exec"}
"""Words that may come before `hbserve` where it is the program, besides settings of the environment."""


def _hbserve_in(line: str) -> Iterator[list[str]]:
    segment: list[str] = []
    for word in [*shlex.split(line.replace("…", "..."), comments=True), ";"]:
        if word not in ("&&", "||", ";", "|", "&"):
            segment.append(word)
            continue
        before = [each for each in segment if each in _BEFORE or "=" in each]
        program, arguments = segment[len(before) :][:1], segment[len(before) + 1 :]
        if segment[: len(before)] == before and program and Path(program[0]).name == "hbserve":
            yield arguments
        segment = []

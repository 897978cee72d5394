"""`--help` is enough for a user who has read nothing else."""

from collections.abc import Iterator
from typing import Any

from typer.main import get_command

from hbserve.__main__ import app

FEWEST_WORDS = 4
KNOWN_ANYWHERE = {"log_level", "version", "help"}


def commands(command: Any, name: str = "hbserve") -> Iterator[tuple[str, Any]]:
    yield name, command
    for child, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{name} {child}")


def test_every_option_says_what_it_does():
    terse = [
        f"{name} {each.opts[0]}: {each.help}"
        for name, command in commands(get_command(app))
        for each in command.params
        if each.name not in KNOWN_ANYWHERE and len((each.help or "").split()) < FEWEST_WORDS
    ]
    assert not terse, "\n".join(terse)

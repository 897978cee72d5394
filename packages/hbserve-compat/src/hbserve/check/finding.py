"""A finding of `hbserve check`: one line about one thing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAIL"]
"""FAIL: the deployment will not work. note: it will, but somebody should know."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, and what was found."""

    verdict: Verdict
    subject: str
    text: str


def table(findings: Iterable[Finding]) -> str:
    """A line for each, in columns."""
    several = list(findings)
    width = max((len(each.subject) for each in several), default=0)
    return "".join(f"{each.verdict:4}  {each.subject:{width}}  {each.text}\n" for each in several)

"""A finding of `hbserve check`: one line about one thing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "note", "FAIL"]
"""FAIL: the deployment will not work. note: it will work, but the operator should know something."""


@dataclass(frozen=True)
class Finding:
    """A thing that was checked, and the result."""

    verdict: Verdict
    subject: str
    text: str


def table(findings: Iterable[Finding]) -> str:
    """One line for each finding, in columns."""
    several = list(findings)
    width = max((len(each.subject) for each in several), default=0)
    return "".join(f"{each.verdict:4}  {each.subject:{width}}  {each.text}\n" for each in several)

"""The live view as text for terminals: tables, sparklines, and waterfalls of requests."""

from collections.abc import Iterable, Iterator, Sequence

from hbserve.monitoring.live_view import LinkView, RequestView, View

SPARKS = "▁▂▃▄▅▆▇█"
MARKS = {"queue": "·", "reserve": "-", "prefill": "█", "kv": "▒", "decode": "━", "preempted": "~", "failed": "x"}
"""Marks of a waterfall's segments."""
ID_WIDTH = 24
Part = tuple[str, str]
"""The name of a segment, and the characters that draw it."""


def overview(view: View) -> str:
    return (
        f"requests: {view.running} running, {view.waiting} waiting; {view.completed} completed, {view.failed} failed, "
        f"{view.aborted} aborted, {view.rejected} rejected; {view.retries} retries\n"
        f"{view.requests_per_s:.1f} requests/s, {view.tokens_per_s:.0f} tokens/s"
        + "".join(f"; {count} held up by {cause}" for cause, count in view.delayed.items())
    )


def instance_table(view: View) -> str:
    rows = [("instance", "role", "status", "running", "waiting", "tokens/s", "KV blocks")]
    for each in view.instances:
        blocks = ", ".join(f"{count} {state}" for state, count in each.blocks.items() if count)
        numbers = (str(each.running), str(each.waiting), f"{each.tokens_per_s:.0f}")
        rows.append((plain(each.instance_id), each.role, each.status, *numbers, blocks or "-"))
    return "\n".join(_aligned(rows))


def link_matrix(view: View) -> str:
    """Draw a table with a row for each prefill instance, and a column for each decode instance."""
    if not view.links:
        return "no links: no prefill instance has a decode instance to send to"
    decodes = sorted({each.decode for each in view.links})
    found = {(each.prefill, each.decode): each for each in view.links}
    rows = [("KV from \\ to", *map(plain, decodes))]
    for prefill in sorted({each.prefill for each in view.links}):
        rows.append((plain(prefill), *(_cell(found.get((prefill, decode))) for decode in decodes)))
    return "\n".join(_aligned(rows))


def _cell(link: LinkView | None) -> str:
    if link is None or (link.is_up is None and not link.outcomes):
        return "."
    state = {True: "up", False: "DOWN", None: "gone"}[link.is_up]
    rate = "" if link.gb_per_s is None else f" {link.gb_per_s:.3g} GB/s"
    active = f" {link.active} moving" if link.active else ""
    failed = f" {link.outcomes['failed']} failed" if link.outcomes.get("failed") else ""
    return state + rate + active + failed


def sparkline(values: Sequence[float | None], width: int) -> str:
    """Draw the last `width` values, scaled from 0 to the largest of them. Unknown values are spaces."""
    shown = values[-width:]
    top = max((each for each in shown if each is not None), default=0.0)
    marks = [" " if each is None else SPARKS[round(each / top * (len(SPARKS) - 1)) if top else 0] for each in shown]
    return "".join(marks).rjust(width)


def duration(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{1e3 * value_s:.3g} ms" if value_s < 1 else f"{value_s:.3g} s"


def request_title(request: RequestView) -> str:
    tokens = f"{request.num_prompt_tokens} + {request.num_output_tokens}"
    name = plain(request.request_id)
    name = name if len(name) <= ID_WIDTH else name[: ID_WIDTH - 1] + "…"
    return f"{name:{ID_WIDTH}} {tokens:>13} {duration(request.e2e_s):>9}"


def request_end(request: RequestView) -> str:
    held_up = f"; {request.held_up}" if request.held_up else ""
    return plain(f"{request.instances}: {request.end}{held_up}")


def waterfall(request: RequestView, whole_s: float, width: int) -> Iterator[Part]:
    """Draw the segments on a line of `width` characters for `whole_s` seconds. A segment that begins and ends within
    one character is left out."""
    for each in request.segments:
        begin, end = (round(at_s / whole_s * width) if whole_s > 0 else 0 for at_s in (each.begin_s, each.end_s))
        if end > begin:
            yield each.name, MARKS[each.name] * (end - begin)


def text_of(view: View) -> str:
    """Draw the whole view, without colours."""
    parts = [overview(view), *(f"{name}: {_both(view, name)}" for name in view.latencies), ""]
    parts += [instance_table(view), "", link_matrix(view), ""]
    whole_s = max((each.e2e_s for each in view.requests), default=0.0)
    for each in view.requests:
        marks = "".join(part for _, part in waterfall(each, whole_s, 40))
        parts.append(f"{request_title(each)} {marks:40} {request_end(each)}")
    return "\n".join(part.rstrip() for part in parts)


def _both(view: View, name: str) -> str:
    found = view.latencies[name]
    return f"p50 {duration(found.p50_s)}, p95 {duration(found.p95_s)}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    several = list(rows)
    widths = [max(map(len, column)) for column in zip(*several, strict=True)]
    return ["  ".join(each.ljust(width) for each, width in zip(row, widths, strict=True)).rstrip() for row in several]


def plain(text: str) -> str:
    """Replace characters that are not printable in a name that others chose, so that the terminal obeys none."""
    return "".join(each if each.isprintable() else "?" for each in text)

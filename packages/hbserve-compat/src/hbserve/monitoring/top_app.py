"""The live view of `hbserve top`, as a textual application. Needs the extra `top`."""

import time
from collections import deque
from pathlib import Path
from typing import ClassVar, Protocol

from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Footer, OptionList, Static

from hbserve.monitoring.live_text import (
    MARKS,
    duration,
    instance_table,
    link_matrix,
    overview,
    plain,
    request_end,
    request_title,
    sparkline,
    waterfall,
)
from hbserve.monitoring.live_view import View
from hbserve.output_file import writing
from hbserve_rpc import HBServeRpcError

HISTORY = 120
"""How many looks a sparkline remembers."""
SPARK_WIDTH, BAR_WIDTH, SHORTEST_BAR = 60, 40, 12
COLOURS = {
    "queue": "yellow",
    "reserve": "magenta",
    "prefill": "dodgerblue",
    "kv": "cyan",
    "decode": "green",
    "preempted": "red",
    "failed": "orangered",
}


class Source(Protocol):
    """A deployment that the application shows."""

    address: str

    async def look(self) -> View: ...

    async def drain(self, instance_id: str) -> None: ...

    async def trace(self) -> bytes: ...


class Choice(ModalScreen[str | None]):
    """A dialog that asks which instance to drain; Escape chooses none."""

    BINDINGS: ClassVar = [("escape", "dismiss(None)", "None")]
    CSS = """
    Choice { align: center middle; }
    Choice OptionList { width: 50; height: auto; max-height: 20; border: round $accent; }
    """

    def __init__(self, instance_ids: list[str]) -> None:
        super().__init__()
        self._instance_ids = instance_ids

    def compose(self) -> ComposeResult:
        options = OptionList(*(Content(f"drain {plain(each)}") for each in self._instance_ids))
        options.border_title = "gets no new requests"
        yield options

    def on_option_list_option_selected(self, chosen: OptionList.OptionSelected) -> None:
        self.dismiss(self._instance_ids[chosen.option_index])


class TopApp(App[None]):
    """One screen, refreshed every second. The key q ends it."""

    TITLE = "hbserve top"
    BINDINGS: ClassVar = [
        ("q", "quit", "Quit"),
        ("p", "pause", "Pause"),
        ("t", "save_trace", "Save a trace"),
        ("d", "drain", "Drain"),
    ]
    CSS = """
    Static { margin: 0 1 1 1; width: auto; }
    #overview { text-style: bold; }
    #problem { color: $error; display: none; }
    """

    def __init__(self, source: Source, *, interval_s: float = 1.0, folder: Path | None = None) -> None:
        """Show `source`. `folder` is where traces are saved; None is the current one."""
        super().__init__()
        self._source = source
        self._interval_s = interval_s
        self._folder = folder or Path()
        self._is_paused = False
        self._instance_ids: list[str] = []
        self._history: dict[str, deque[float | None]] = {}

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            for name in ("problem", "overview", "sparks", "instances", "links", "requests"):
                yield Static(id=name)
        yield Footer()

    async def on_mount(self) -> None:
        self.set_interval(self._interval_s, self.look)
        self.call_after_refresh(self.look)

    async def look(self) -> None:
        """Fetch the figures once, and show them. If the scheduler does not answer, say so and keep the last view."""
        if self._is_paused:
            return
        problem = self.query_one("#problem", Static)
        try:
            view = await self._source.look()
        except (HBServeRpcError, TimeoutError) as error:
            problem.update(Content(f"{self._source.address} does not answer: {error}"))
            problem.display = True
            return
        problem.display = False
        self._show(view)

    def _show(self, view: View) -> None:
        self._instance_ids = [each.instance_id for each in view.instances]
        self.query_one("#overview", Static).update(Content(overview(view)))
        self.query_one("#sparks", Static).update(self._sparks(view))
        self.query_one("#instances", Static).update(Content(instance_table(view)))
        self.query_one("#links", Static).update(Content(link_matrix(view)))
        self.query_one("#requests", Static).update(_requests(view, self.size.width - 2))

    def _sparks(self, view: View) -> Content:
        now: list[tuple[str, float | None, str]] = [
            ("tokens/s", view.tokens_per_s, f"{view.tokens_per_s:.0f}"),
            ("queue", view.waiting, str(view.waiting)),
        ]
        for name, title in (("ttft", "TTFT p95"), ("itl", "ITL p95"), ("handoff", "hand-off p95")):
            value_s = view.latencies[name].p95_s
            now.append((title, value_s, duration(value_s)))
        lines = []
        for title, value, shown in now:
            history = self._history.setdefault(title, deque(maxlen=HISTORY))
            history.append(value)
            lines.append(Content.assemble(f"{title:13}{shown:>10} ", (sparkline(list(history), SPARK_WIDTH), "green")))
        return Content("\n").join(lines)

    def action_pause(self) -> None:
        self._is_paused = not self._is_paused
        self.notify("paused: p goes on" if self._is_paused else "goes on")

    def action_drain(self) -> None:
        self.push_screen(Choice(self._instance_ids), self._drain)

    async def _drain(self, instance_id: str | None) -> None:
        if instance_id is None:
            return
        try:
            await self._source.drain(instance_id)
        except (HBServeRpcError, TimeoutError) as error:
            self.notify(f"{instance_id} is not drained: {error}", severity="error", markup=False)
            return
        self.notify(f"{instance_id} gets no new requests", markup=False)
        await self.look()

    async def action_save_trace(self) -> None:
        path = self._folder / f"trace-{time.strftime('%Y%m%d-%H%M%S')}.json.gz"
        try:
            trace = await self._source.trace()
            with writing(path):
                path.write_bytes(trace)
        except (HBServeRpcError, OSError, TimeoutError) as error:
            self.notify(f"no trace: {error}", severity="error", markup=False)
            return
        self.notify(f"{path}: ui.perfetto.dev opens it", markup=False)


def _requests(view: View, width: int) -> Content:
    """Draw the last requests, each with its waterfall, and a legend of the colours. The texts beside the waterfalls
    determine how long these can be."""
    whole_s = max((each.e2e_s for each in view.requests), default=0.0)
    rows = [(each, request_title(each), request_end(each)) for each in view.requests]
    room = width - max((len(title) + len(end) + 2 for _, title, end in rows), default=0)
    bar_width = min(BAR_WIDTH, max(SHORTEST_BAR, room))
    lines = []
    for each, title, end in rows:
        bar = list(waterfall(each, whole_s, bar_width))
        space = " " * (bar_width - sum(len(marks) for _, marks in bar))
        coloured = [(marks, COLOURS[name]) for name, marks in bar]
        lines.append(Content.assemble(title, " ", *coloured, space, " ", end))
    legend = [(f"{MARKS[name]} {name}  ", colour) for name, colour in COLOURS.items()]
    return Content("\n").join([*lines, Content.assemble(*legend)])

"""`hbserve top`: shows a running deployment live in a terminal, or once, as text or JSON for programs."""

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hbserve.monitoring.live_text import text_of
from hbserve.monitoring.live_view import Watched
from hbserve.monitoring.trace import render_trace
from hbserve.remote import remote_scheduler
from hbserve_scheduler import ConfigError, RemoteScheduler

INTERVAL_S = 1.0
TRACE_S = 60.0
"""How far back a saved trace goes."""


@dataclass(frozen=True)
class TopArgs:
    """The command's arguments."""

    connect: str
    keys: Path | None
    once: bool
    json: bool


class WatchedRemote(Watched):
    """The deployment of a scheduler in another process."""

    def __init__(self, scheduler: RemoteScheduler) -> None:
        super().__init__(scheduler)
        self.address = scheduler.address
        self._scheduler = scheduler

    async def drain(self, instance_id: str) -> None:
        """Give an instance no new requests; it answers those that it has. Raises the scheduler's own errors."""
        await self._scheduler.drain(instance_id)

    async def trace(self) -> bytes:
        """Return the timeline of the last TRACE_S seconds, as `hbserve trace` writes it."""
        return await asyncio.to_thread(render_trace, await self._scheduler.fetch_records(TRACE_S))


async def show_top(args: TopArgs) -> None:
    """Show the live view, or print it once. Raises ConfigError, NotReady, and the scheduler's own errors."""
    if args.json and not args.once:
        raise ConfigError("--json needs --once")
    async with remote_scheduler(args.connect, args.keys) as (scheduler, _):
        watched = WatchedRemote(scheduler)
        if not args.once:
            await _live(watched)
            return
        await watched.look()
        await asyncio.sleep(INTERVAL_S)  # rates cover the time between two looks
        view = await watched.look()
    text = msgspec.json.format(msgspec.json.encode(view)).decode() if args.json else text_of(view)
    sys.stdout.write(f"{text}\n")


async def _live(watched: WatchedRemote) -> None:
    try:
        from hbserve.monitoring.top_app import TopApp
    except ImportError as error:
        raise ConfigError(f"hbserve top needs pip install 'hbserve-compat[top]' ({error}); --once does not") from None
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):  # textual uses both
        raise ConfigError("hbserve top needs a terminal, for its keys and its picture; --once prints one view")
    await TopApp(watched).run_async()

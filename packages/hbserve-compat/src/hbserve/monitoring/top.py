"""`hbserve top`: a running deployment, live in a terminal; once, as text or JSON, for programs."""

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
"""A trace that is saved has the requests of so long."""


@dataclass(frozen=True)
class TopArgs:
    """The command's arguments."""

    connect: str
    keys: Path | None
    once: bool
    json: bool


class WatchedRemote(Watched):
    """The deployment of a scheduler elsewhere."""

    def __init__(self, scheduler: RemoteScheduler) -> None:
        super().__init__(scheduler)
        self.address = scheduler.address
        self._scheduler = scheduler

    async def drain(self, instance_id: str) -> None:
        """Give it no new requests; it answers those that it has. Raises what the scheduler says."""
        await self._scheduler.drain(instance_id)

    async def trace(self) -> bytes:
        """The timeline of the last TRACE_S seconds, as `hbserve trace` writes it."""
        return await asyncio.to_thread(render_trace, await self._scheduler.fetch_records(TRACE_S))


async def show_top(args: TopArgs) -> None:
    """Raises ConfigError, NotReady, and what the scheduler says."""
    if args.json and not args.once:
        raise ConfigError("--json needs --once")
    async with remote_scheduler(args.connect, args.keys) as (scheduler, _):
        watched = WatchedRemote(scheduler)
        if not args.once:
            await _live(watched)
            return
        await watched.look()
        await asyncio.sleep(INTERVAL_S)  # rates are of the time between two looks
        view = await watched.look()
    text = msgspec.json.format(msgspec.json.encode(view)).decode() if args.json else text_of(view)
    sys.stdout.write(f"{text}\n")


async def _live(watched: WatchedRemote) -> None:
    try:
        from hbserve.monitoring.top_app import TopApp
    except ImportError as error:
        raise ConfigError(f"hbserve top needs pip install 'hbserve-compat[top]' ({error}); --once does not") from None
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):  # textual's ends
        raise ConfigError("hbserve top needs a terminal, for its keys and its picture; --once prints one view")
    await TopApp(watched).run_async()

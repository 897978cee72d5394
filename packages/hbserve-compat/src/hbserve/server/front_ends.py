"""The OpenAI server of one deployment as several processes, which share its port: see front_end_process.py.

    this process: membership, queue bounds, figures of all           front_end_process, one of several
    CpuScheduler, for clients of the RPC ◀── figures of all ─────── FrontEnd, CpuScheduler
         └───────────── RPC ──────────▶ instances ◀────────── RPC ──────────┘
         └─ figures, aborts ──────────────────────────────────▶ its SchedulerServer

No token passes through this process. Each of the others chooses instances by what it has given them itself and by what
they report; the reservation on a decode instance decides.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from hbserve.child_process import ChildProcess
from hbserve.server.front_end import READY_TIMEOUT_S, FrontEnd
from hbserve.server.http_server import held_for_others
from hbserve_rpc import format_address, parse_address
from hbserve_rpc.address import is_wildcard
from hbserve_rpc.messages import Role, SchedulerStats
from hbserve_scheduler import InstanceFailed, SchedulerConfig, SchedulerServer
from hbserve_scheduler.config import ServerSection

logger = logging.getLogger(__name__)

MODULE = "hbserve.server.front_end_process"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before one that has ended is started again: doubled each time, until it has served for STEADY_S."""
STEADY_S = 60.0
MOST_FAILURES = 8
"""One after the other, of one process; then it is not started again."""
SLOWER_THAN_DRAIN_S = 5.0


class FrontEndSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the OpenAI server, as it is told on stdin."""

    name: str
    server: ServerSection
    scheduler: SchedulerConfig
    model_name: str
    model_folder: str
    instances: list[tuple[str, Role, str]]
    """Id, role and address."""
    parent: str
    """Address of the SchedulerServer that has the figures of all."""
    log_level: str


class FrontEnds(FrontEnd):
    """Answers 503 itself until its processes serve. One that ends is started again; the others serve on."""

    def __init__(self, settings: ServerSection, log_level: str, on_death: Callable[[str, str], None]) -> None:
        """on_death: called with a name and a reason when the last process has ended and is not started again.

        Raises what FrontEnd raises.
        """
        super().__init__(settings)
        first = self._http.port_holder
        self._held = held_for_others(first)
        self._settings = msgspec.structs.replace(settings, port=first.getsockname()[1])
        self._log_level = log_level
        self._on_death = on_death
        self._url = self._http.url
        self._name = ""
        self._folder: Path
        self._server: SchedulerServer
        self._processes: dict[str, ChildProcess] = {}
        self._began_s: dict[str, float] = {}
        self._failures = {f"api-server-{number}": 0 for number in range(settings.api_servers)}
        """By name, one after the other."""
        self._restarts: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return self._url

    @property
    def model_name(self) -> str:
        return (self._settings.served_model_names or [self._name])[0]

    async def begin(
        self,
        name: str,
        folder: Path,
        server: SchedulerServer,
        fetch_stats: Callable[[], Awaitable[SchedulerStats]] | None = None,
    ) -> None:
        """Start the processes, and wait until each serves.

        Raises:
            InstanceFailed: one did not start; has its reason.
            NotReady.
        """
        self._name, self._folder, self._server = name, folder, server
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(server.scheduler.wait_ready(READY_TIMEOUT_S))
                for each in self._failures:
                    group.create_task(self._start_process(each))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        await self._http.stop()

    async def _start_process(self, name: str) -> None:
        settings = msgspec.json.encode(self._settings_of(name))
        process = ChildProcess(name, MODULE, settings, os.environ, self._replace, start_timeout_s=READY_TIMEOUT_S)
        self._processes[name] = process
        await process.start()
        self._began_s[name] = time.monotonic()
        await self._server.siblings.add(name, process.address)

    def _settings_of(self, name: str) -> FrontEndSettings:
        config = self._server.scheduler.config
        host, port = parse_address(self._server.address)
        if is_wildcard(host):
            host = "::1" if ":" in host else "127.0.0.1"
        handles = self._server.scheduler.fleet.handles.values()
        return FrontEndSettings(
            name=name,
            server=self._settings,
            # Its own RPC is for this process.
            scheduler=msgspec.structs.replace(config.shared_among(len(self._failures)), host="127.0.0.1", port=0),
            model_name=self._name,
            model_folder=str(self._folder),
            instances=[(each.instance_id, each.role, each.address) for each in handles],
            parent=format_address(host, port),
            log_level=self._log_level,
        )

    def _replace(self, name: str, why: str) -> None:
        restart = asyncio.create_task(self._start_again(name, why))
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _start_again(self, name: str, why: str) -> None:
        await self._server.siblings.remove(name)
        if time.monotonic() - self._began_s[name] > STEADY_S:
            self._failures[name] = 0
        while True:
            await self._processes.pop(name).stop()
            self._failures[name] += 1
            if self._failures[name] > MOST_FAILURES:
                logger.error("%s: %s; it is not started again, after %d failures", name, why, MOST_FAILURES)
                if not self._processes:
                    self._on_death(name, why)
                return
            pause_s = min(FIRST_PAUSE_S * 2 ** (self._failures[name] - 1), LONGEST_PAUSE_S)
            logger.error("%s: %s; it is started again in %.1f s", name, why, pause_s)
            await asyncio.sleep(pause_s)
            try:
                await self._start_process(name)
                return
            except InstanceFailed as error:
                why = str(error)

    async def drain(self) -> None:
        """Have each process end when its answers have; cancelled, at once."""
        await self._end_restarts()
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s + SLOWER_THAN_DRAIN_S):
                await asyncio.gather(*(process.drain() for process in self._processes.values()))
        except TimeoutError:
            logger.warning("answers are still on their way after %g s", self._settings.drain_timeout_s)
        finally:
            await self._stop_processes()

    async def stop(self) -> None:
        await self._end_restarts()
        await self._stop_processes()
        await super().stop()
        self._held.close()

    async def _end_restarts(self) -> None:
        for restart in self._restarts:
            restart.cancel()
        await asyncio.gather(*self._restarts, return_exceptions=True)

    async def _stop_processes(self) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes.values()))

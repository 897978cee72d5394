"""The OpenAI server of one deployment as several processes that share its address; see front_end_process.py.

    this process: membership, queue bounds, figures of all           front_end_process, one of several
    CpuScheduler, for clients of the RPC ◀── figures of all ─────── FrontEnd, CpuScheduler
         └───────────── RPC ──────────▶ instances ◀────────── RPC ──────────┘
         └─ figures, aborts ──────────────────────────────────▶ its SchedulerServer

No token passes through this process. Each of the others chooses instances by the requests that it has given them itself
and by what they report; the reservation on a decode instance decides.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from hbserve.processes.child_process import ChildProcess, ChildProcesses
from hbserve.server.front_end import READY_TIMEOUT_S, FrontEnd
from hbserve.server.http.http_server import held_for_others, remove_path
from hbserve_rpc import Keys, format_address
from hbserve_rpc.address import is_wildcard
from hbserve_rpc.messages import Role
from hbserve_scheduler import SchedulerConfig, SchedulerServer
from hbserve_scheduler.config import ServerSection
from hbserve_scheduler.siblings import Siblings

logger = logging.getLogger(__name__)

MODULE = "hbserve.server.front_end_process"
SLOWER_THAN_DRAIN_S = 5.0


class FrontEndSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of one process of the OpenAI server, which it reads from stdin."""

    name: str
    server: ServerSection
    listening_fd: int | None
    """The socket of `server.uds`, which all processes share. None: each has a socket of its own on the same port."""
    scheduler: SchedulerConfig
    model_name: str
    model_folder: str
    instances: list[tuple[str, Role, str]]
    """Id, role and address of each instance."""
    keys: Keys | None
    """A scheduler's keys, for the links to the instances. None: they need none."""
    parent: str
    """Address of the SchedulerServer that has the figures of all processes."""
    parent_has_keys: bool
    """Whether the parent serves only clients with keys, and sends its own keys to this process."""
    log_level: str


class FrontEndProcess(ChildProcess):
    """One process of the OpenAI server. As long as it serves, it is a sibling of this process's scheduler."""

    def __init__(
        self,
        name: str,
        settings: Callable[[], bytes],
        siblings: Siblings,
        on_start: Callable[[], Awaitable[None]],
        pass_fds: Sequence[int],
        on_death: Callable[[str, str], None],
    ) -> None:
        """`on_start` is awaited as soon as the process serves."""
        timeout_s = READY_TIMEOUT_S
        super().__init__(name, MODULE, settings, os.environ, on_death, start_timeout_s=timeout_s, pass_fds=pass_fds)
        self._siblings = siblings
        self._on_start = on_start

    async def start(self) -> None:
        """Start the process, and make it a sibling when it serves. Raises InstanceFailed."""
        await super().start()
        await self._on_start()
        await self._siblings.add(self.name, self.address)


class FrontEnds(FrontEnd):
    """The OpenAI server as several processes. This one answers 503 itself until the first of them serves, so that a
    client that was told that the server is healthy gets its answers, from any of them. A process that ends is started
    again, while the others go on."""

    def __init__(self, settings: ServerSection, log_level: str, on_death: Callable[[str, str], None]) -> None:
        """Bind the address. `on_death` is called with a name and a reason when the last process was given up.

        Raises what FrontEnd raises.
        """
        super().__init__(settings)
        first = self._http.bound_socket
        self._held = held_for_others(first)
        self._listening_fd = None if settings.uds is None else self._held.fileno()
        port = settings.port if settings.uds is not None else first.getsockname()[1]
        self._settings = msgspec.structs.replace(settings, port=port)
        self._log_level = log_level
        self._on_death = on_death
        self._url = self._http.url
        self._name = ""
        self._processes: ChildProcesses[FrontEndProcess] | None = None
        self._num_left = settings.api_servers

    @property
    def url(self) -> str:
        return self._url

    @property
    def model_name(self) -> str:
        return (self._settings.served_model_names or [self._name])[0]

    async def begin(self, name: str, folder: Path, server: SchedulerServer) -> None:
        """Start the processes, and wait until each serves.

        Raises:
            InstanceFailed: a process did not start; has its reason.
        """
        self._name = name
        names = [f"api-server-{number}" for number in range(self._settings.api_servers)]
        settings = {each: partial(self._settings_of, each, name, folder, server) for each in names}
        others = server.siblings, self._hand_over, [] if self._listening_fd is None else [self._listening_fd]
        make = [partial(FrontEndProcess, each, settings[each], *others) for each in names]
        removing: set[asyncio.Task[None]] = set()

        def forget(name: str, why: str) -> None:
            task = asyncio.create_task(server.siblings.remove(name))
            removing.add(task)
            task.add_done_callback(removing.discard)

        self._processes = ChildProcesses(make, forget)
        # First: one that has served may die while others are still loading.
        self._processes.restart_the_dead(self._on_given_up)
        await self._processes.start()

    async def _hand_over(self) -> None:
        await self._http.drain()
        await self._http.stop()

    def _on_given_up(self, name: str, why: str) -> None:
        logger.error("%s: %s", name, why)
        self._num_left -= 1
        if not self._num_left:
            self._on_death(name, why)

    def _settings_of(self, own_name: str, name: str, folder: Path, server: SchedulerServer) -> bytes:
        config = server.scheduler.config.shared_among(self._settings.api_servers)
        host, port = config.host, int(server.address.rpartition(":")[2])
        if is_wildcard(host):
            host = "::1" if ":" in host else "127.0.0.1"
        settings = FrontEndSettings(
            name=own_name,
            server=self._settings,
            listening_fd=self._listening_fd,
            # Only this process uses the RPC of that scheduler.
            scheduler=msgspec.structs.replace(config, host="127.0.0.1", port=0, health_port=None),
            model_name=name,
            model_folder=str(folder),
            instances=[(each.instance_id, each.role, each.address) for each in server.members.members()],
            keys=server.scheduler.keys,
            parent_has_keys=server.keys is not None,
            parent=format_address(host, port),
            log_level=self._log_level,
        )
        return msgspec.json.encode(settings)

    async def drain(self) -> None:
        """Let each process end when its answers have ended. If this is cancelled, they end at once."""
        if self._processes is None:
            return
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s + SLOWER_THAN_DRAIN_S):
                await self._processes.drain()
        except TimeoutError:
            logger.warning("answers are still on their way after %g s", self._settings.drain_timeout_s)
        finally:
            await self._processes.stop()

    async def stop(self) -> None:
        if self._processes is not None:
            await self._processes.stop()
        await super().stop()
        self._held.close()
        remove_path(self._settings)

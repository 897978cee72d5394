"""The HTTP server: its socket, which is bound before anything else starts, and uvicorn behind it."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from hbserve.server.http.connection import Connection
from hbserve_rpc import AddressInUse, format_address
from hbserve_rpc.address import is_wildcard
from hbserve_rpc.listening_socket import ListeningSocket
from hbserve_scheduler import ConfigError
from hbserve_scheduler.config import ServerSection

logger = logging.getLogger(__name__)
logging.getLogger("uvicorn").setLevel(logging.WARNING)  # we report its start and end ourselves

KEEP_ALIVE_S = 120
"""How long an idle connection is kept. It is longer than in proxies, so that these close first: otherwise a request may
meet a connection that is being closed. Also the limit for a client that sends nothing more of an incomplete request."""
BACKLOG = 2048
MOST_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a Unix domain socket: the system's `sun_path`, without the zero at its end."""
FILES_LEFT = 16
"""Number of open files that are kept for other purposes than clients' connections: a scheduler's links, or files that a
request reads."""
LAST_WORDS_S = 0.5
"""How long clients may take to read their answers when the server stops."""
STALL_TIMEOUT_S = 60.0
"""A client that reads nothing for so long, although data waits for it, loses its connection."""


class _Uvicorn(uvicorn.Server):
    """Uvicorn without its signal handlers, because `hbserve serve` has its own."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepts = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepts.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """Serves an application from `start` to `stop`."""

    def __init__(self, settings: ServerSection, app: ASGIApp, *, shared: socket.socket | None = None) -> None:
        """Bind the address, unless `shared` is given, a socket of an address that several processes share.

        Raises:
            AddressInUse: another process has the address.
            ConfigError: the address cannot be bound here, or the certificate and its key cannot be used.
        """
        self._settings = settings
        self._app = app
        _check_certificate(settings)
        self._socket = ListeningSocket(_bound(settings), **_refusal(settings)) if shared is None else shared
        self._server: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """URL of the server for clients on this machine."""
        scheme = "http" if self._settings.ssl_certfile is None else "https"
        if self._settings.uds is not None:
            return f"{scheme}+unix://{self._settings.uds}"
        host, port = self.bound_socket.getsockname()[:2]
        if is_wildcard(host):
            host = "::1" if ":" in host else "127.0.0.1"
        return f"{scheme}://{format_address(host, port)}{self._settings.root_path.rstrip('/')}"

    @property
    def bound_socket(self) -> socket.socket:
        """The socket at which connections are accepted."""
        return self._socket

    async def start(self) -> None:
        """Accept connections from now on."""
        config = uvicorn.Config(
            self._app,
            loop="none",
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            root_path=self._settings.root_path.rstrip("/"),
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
            ssl_keyfile=self._settings.ssl_keyfile,
            ssl_certfile=self._settings.ssl_certfile,
        )
        self._server = _Uvicorn(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await self._server.accepts.wait()
        self._watching = asyncio.create_task(self._watch_stalled(self._server))

    async def _watch_stalled(self, server: _Uvicorn) -> None:
        """End connections whose clients read or send nothing for too long. What waits for one such client is bounded,
        but there may be ever more of them."""
        since_s: dict[uvicorn.server.Protocols, tuple[int, float]] = {}
        while True:
            await asyncio.sleep(STALL_TIMEOUT_S / 4)
            now_s, before = time.monotonic(), since_s
            since_s = {}
            for connection in list(server.server_state.connections):
                num_bytes = connection.transport.get_write_buffer_size()
                stands = before.get(connection, (0, now_s))
                if num_bytes and num_bytes != stands[0]:
                    stands = num_bytes, now_s
                if num_bytes and now_s - stands[1] > STALL_TIMEOUT_S:
                    logger.info("a client has read nothing for %.0f s; its connection ends", now_s - stands[1])
                    connection.transport.abort()
                elif num_bytes:
                    since_s[connection] = stands
                elif isinstance(connection, Connection) and not connection.is_whole:
                    self._end_silent(connection, now_s)

    @staticmethod
    def _end_silent(connection: Connection, now_s: float) -> None:
        """End a connection that has sent nothing of a request for too long. uvicorn itself waits for ever for the first
        request of a connection, and for the rest of any request."""
        silent_s = now_s - connection.heard_s
        if silent_s > KEEP_ALIVE_S:
            logger.info("a client has sent nothing for %.0f s of a request; its connection ends", silent_s)
            connection.transport.abort()

    @property
    def num_answering(self) -> int:
        """Number of requests whose answers have not ended."""
        return 0 if self._server is None else len(self._server.server_state.tasks)

    async def drain(self) -> None:
        """Wait until every answer has ended, for `drain_timeout_s` at most."""
        if self._server is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout_s):
                while answering := list(self._server.server_state.tasks):
                    await asyncio.wait(answering)

    async def stop(self) -> None:
        """End every answer and connection."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            self._server.force_exit = True
            for task in list(self._server.server_state.tasks):
                task.cancel()
            await asyncio.gather(*self._server.server_state.tasks, return_exceptions=True)
            # From Python 3.12 on, the server ends when all connections have ended. Some never would: an answer that was
            # cancelled before it began leaves its client waiting, and a client may read nothing.
            await asyncio.wait([self._serving], timeout=LAST_WORDS_S)
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await self._serving
        self._socket.close()
        if self._settings.api_servers == 1:
            remove_path(self._settings)


def _check_certificate(settings: ServerSection) -> None:
    if settings.ssl_certfile is None or settings.ssl_keyfile is None:
        return
    for key, path in (("ssl_certfile", settings.ssl_certfile), ("ssl_keyfile", settings.ssl_keyfile)):
        try:
            Path(path).open("rb").close()  # because ssl's error does not say which of the two files it means
        except OSError as error:
            raise ConfigError(f"server.{key}={path!r}: {error.strerror}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ValueError) as error:
        problem = f"{settings.ssl_certfile!r} with server.ssl_keyfile={settings.ssl_keyfile!r}: {error}"
        raise ConfigError(f"server.ssl_certfile={problem}") from None


def _bound(settings: ServerSection) -> socket.socket:
    if settings.uds is not None:
        return _bound_to_path(Path(settings.uds))
    address = format_address(settings.host, settings.port)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        return _undelayed(socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"{address} is in use: give another server.port or --port, or 0 to let the system choose"
            raise AddressInUse(problem) from None
        # Only the system's message: create_server adds the address to it, as a tuple.
        why = (error.strerror or str(error)).partition(" (while attempting")[0]
        raise ConfigError(f"server.host={settings.host!r}: {address} cannot be bound: {why}") from None


def _refusal(settings: ServerSection) -> dict[str, Any]:
    """Return how a ListeningSocket refuses connections for which too few open files are left."""
    return {"is_plain": settings.ssl_certfile is None, "files_left": FILES_LEFT}


class _SharedSocket(ListeningSocket):
    """A listening socket of several processes. Every connection wakes all of them, and one of them gets it.

    A process that has accepted a connection leaves the next ones to the others. Otherwise the one that wakes first
    would get them all, however busy it is. It takes connections again after as many iterations of its event loop as
    there are processes, if the others have left them too.
    """

    def __init__(self, fd: int, num_processes: int, **refusal: Any) -> None:
        super().__init__(fd, **refusal)
        self._num_processes = num_processes
        self._num_left_alone = 0

    def accept(self) -> tuple[socket.socket, Any]:
        if self._num_left_alone:
            self._num_left_alone -= 1
            raise BlockingIOError
        accepted = super().accept()
        self._num_left_alone = self._num_processes  # one is used up at once: asyncio asks for more in this iteration
        return accepted


def shared_with_others(settings: ServerSection, listening_fd: int | None) -> socket.socket:
    """Return a socket of an address that `api_servers` processes share: another one on its port, or the one on its
    path, which is open as `listening_fd`."""
    if listening_fd is not None:
        return _SharedSocket(listening_fd, settings.api_servers, **_refusal(settings))
    sharing = _undelayed(_sharing_port(settings.host, settings.port, reuses_address=True))
    return ListeningSocket(sharing, **_refusal(settings))


def _sharing_port(host: str, port: int, *, reuses_address: bool) -> socket.socket:
    """Make a socket on a port that several sockets share. The system gives each connection to one of those that listen.

    With `reuses_address`, closed connections, which the system remembers for a minute if this side has ended them, do
    not keep the next server from the port. A socket that only holds the port must not have it: then another server
    could listen there.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuses_address)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if found.family == socket.AF_INET6:
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    found.bind((host, port))
    return found


def _undelayed(listening: socket.socket) -> socket.socket:
    """Set TCP_NODELAY for a socket's connections, as asyncio does if it binds the address itself. Without it, an
    answer's first token would wait until the client acknowledges the head, which Linux delays by 40 ms."""
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def held_for_others(first: socket.socket) -> socket.socket:
    """Hold the address of `first`, which was bound exclusively, for processes that are to share it.

    On a port, the returned socket gets no connections. On a path it listens, and connections wait in it.
    """
    if first.family == socket.AF_UNIX:
        return socket.socket(fileno=os.dup(first.fileno()))
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return _sharing_port(*first.getsockname()[:2], reuses_address=False)


def remove_path(settings: ServerSection) -> None:
    """Remove the path of a Unix domain socket that is no longer served."""
    if settings.uds is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(settings.uds)


def _bound_to_path(path: Path) -> socket.socket:
    """Bind a Unix domain socket. Replaces a socket file at which no process listens any more."""
    if (num_bytes := len(os.fsencode(path))) > MOST_PATH_BYTES:
        problem = f"{num_bytes} bytes; a Unix domain socket's path may have {MOST_PATH_BYTES}: give a shorter one"
        raise ConfigError(f"server.uds={str(path)!r}: {problem}")
    found = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode) and found.connect_ex(os.fspath(path)) != 0:
            path.unlink()
        found.close()
        found = socket.socket(socket.AF_UNIX)
        found.bind(os.fspath(path))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            how = "in use" if path.is_socket() else "there, and is no socket"
            raise AddressInUse(f"{path} is {how}: give another server.uds or --uds") from None
        raise ConfigError(f"server.uds={str(path)!r}: cannot be bound: {error.strerror or error}") from None
    return found

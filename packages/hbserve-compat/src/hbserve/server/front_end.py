"""The OpenAI server of one deployment: the HTTP server and its service, from the socket to the end."""

import asyncio
import logging
import shlex
import socket
from pathlib import Path

from hbserve.monitoring.live_view import Deployment
from hbserve.server.app import make_app
from hbserve.server.http.api_keys import are_asked_for
from hbserve.server.http.http_server import HttpServer
from hbserve.server.service import Service
from hbserve.server.spans import spans_from_environment
from hbserve.text.tokenizer import load_tokenizer
from hbserve_scheduler import SchedulerServer
from hbserve_scheduler.config import ServerSection

logger = logging.getLogger(__name__)

READY_TIMEOUT_S = 600.0
"""How long all instances together may take to load the model."""


class FrontEnd:
    """The OpenAI server in one process. It answers 503 from `start` on, requests from `begin` on, and after `drain`
    only those that have begun."""

    def __init__(
        self, settings: ServerSection, *, shared: socket.socket | None = None, whole: Deployment | None = None
    ) -> None:
        """Bind the address, unless `shared` is given.

        Args:
            shared: a socket of an address that several processes share.
            whole: source of the whole deployment's figures. None: the server that is given to `begin`.

        Raises:
            AddressInUse: another process has the address.
            ConfigError: a file that the settings name cannot be used, or the address cannot be bound.
        """
        self._service = Service(settings)
        self._whole = whole
        self._http = HttpServer(settings, make_app(self._service), shared=shared)

    @property
    def url(self) -> str:
        return self._http.url

    @property
    def curl(self) -> str:
        """The curl command of a request, without its path. KEY stands for an API key, if one is needed."""
        uds = self._service.settings.uds
        command = "curl -H 'Authorization: Bearer KEY'" if are_asked_for(self._service.settings) else "curl"
        if uds is None:
            return f"{command} {self.url}"
        scheme, _, _ = self.url.partition("+")
        return f"{command} --unix-socket {shlex.quote(uds)} {scheme}://localhost"

    @property
    def _http_address(self) -> tuple[str, int] | None:
        """Host and port of the server; None if it serves on a Unix domain socket."""
        settings = self._service.settings
        port = settings.port or (0 if settings.uds is not None else self._http.bound_socket.getsockname()[1])
        return None if settings.uds is not None else (settings.host, port)

    @property
    def model_name(self) -> str:
        """First name of the served model. Raises ApiError before `begin`."""
        return self._service.require_model().names[0]

    async def start(self) -> None:
        await self._http.start()

    async def begin(self, name: str, folder: Path, server: SchedulerServer) -> None:
        """Serve the model of a folder by a server's scheduler, from when its instances are ready.

        Raises:
            BrokenTokenizer, ConfigError, InstanceFailed, NotReady.
        """
        self._service.spans = spans_from_environment(self._http_address)
        # In a thread: importing transformers takes long, and heartbeats must go on meanwhile.
        tokenizer = await asyncio.to_thread(load_tokenizer, folder)
        await server.scheduler.wait_ready(READY_TIMEOUT_S)
        self._service.begin(name, folder, server.scheduler, tokenizer, self._whole or server)

    async def drain(self) -> None:
        """Refuse new requests, and wait until those that have begun are answered, at most `drain_timeout_s`."""
        self._service.draining = True
        if self._http.num_answering:
            logger.info("%d answers are still on their way; a second signal ends them", self._http.num_answering)
        await self._http.drain()

    async def stop(self) -> None:
        await self._http.stop()
        self._service.close()

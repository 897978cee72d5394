"""The OpenAI server of one deployment, from its socket to its end."""

import logging
from pathlib import Path
from typing import Any

from hbserve.server.app import make_app
from hbserve.server.http_server import HttpServer
from hbserve.server.service import Service, ServingScheduler
from hbserve_scheduler.config import ServerSection

logger = logging.getLogger(__name__)


class FrontEnd:
    """Answers 503 from `start` on, requests from `begin` on, and after `drain` only those that have begun."""

    def __init__(self, settings: ServerSection) -> None:
        """Binds the address.

        Raises:
            AddressInUse: it belongs to another process.
            ConfigError: a file that the settings name cannot be used, or the address cannot be bound.
        """
        self._service = Service(settings)
        self._http = HttpServer(settings, make_app(self._service))

    @property
    def url(self) -> str:
        return self._http.url

    @property
    def model_name(self) -> str:
        """Raises ApiError: it has not begun."""
        return self._service.require_model().names[0]

    async def start(self) -> None:
        await self._http.start()

    def begin(self, name: str, folder: Path, scheduler: ServingScheduler, tokenizer: Any) -> None:
        """Serve the model that is in a folder, by a scheduler whose instances are ready."""
        self._service.begin(name, folder, scheduler, tokenizer)

    async def drain(self) -> None:
        """Refuse requests, and wait until those that are answered have their answers, or `drain_timeout_s` are over."""
        self._service.draining = True
        if self._http.num_answering:
            logger.info("%d answers are still on their way; a second signal ends them", self._http.num_answering)
        await self._http.drain()

    async def stop(self) -> None:
        await self._http.stop()
        self._service.close()

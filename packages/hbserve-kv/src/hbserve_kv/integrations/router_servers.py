"""The servers that a router asks: which of them are there, and how many requests each has."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Collection, Sequence

from hbserve_kv.integrations.router_http import CannotConnect, Connections
from hbserve_rpc.address import MAX_PORT

logger = logging.getLogger(__name__)

MISSES = 2
"""Number of missed checks after which a server is taken for dead. If it refuses connections, it is at once."""


class ServerLost(Exception):
    """Raised when a server went away, or froze, while it was asked."""

    def __init__(self, server: "Server", why: str) -> None:
        super().__init__(f"{server.url} {why}")
        self.server = server


class Server:
    """One vLLM server, given by its URL. That of a prefill server may be followed by `,KV_PORT` or
    `,KV_PORT,TP_SIZE`."""

    def __init__(self, url: str) -> None:
        """Raises ValueError, which shows the expected form."""
        given, *numbers = url.split(",")
        self.url = given.rstrip("/")
        try:
            if len(numbers) > 2 or not all(number.isdecimal() and int(number) for number in numbers):
                raise ValueError("its port or its number of ranks is not a number")
            if numbers and int(numbers[0]) > MAX_PORT:
                raise ValueError("there is no such port")
            self.connections = Connections(self.url)
        except ValueError:
            form = "http://HOST:PORT, with ,KV_PORT or ,KV_PORT,TP_SIZE behind it or not"
            raise ValueError(f"{url!r}: expected {form}") from None
        self.host = self.connections.host
        self.kv_port, self.tp_size = (*map(int, numbers), 0, 0)[:2]
        """Port of the server's connector, and number of its ranks. A port of 0 is unknown; with a size of 0 there are
        as many ranks as on the decode server."""
        self.num_requests = 0
        self.is_alive = False
        self._is_told_lost = False
        self._num_missed = 0
        self._check_now = asyncio.Event()
        self._asking: set[asyncio.Timeout] = set()

    @contextlib.asynccontextmanager
    async def asked(self) -> AsyncIterator[None]:
        """Count a request as under way at this server, within the context.

        Raises:
            ServerLost: the server has gone, or does not answer checks.
        """
        self.num_requests += 1
        try:
            async with asyncio.timeout(None) as asking:
                self._asking.add(asking)
                try:
                    yield
                except ConnectionError as error:
                    if isinstance(error, CannotConnect):
                        self.lost(str(error))
                    self._check_now.set()  # perhaps only this connection has ended
                    raise ServerLost(self, f"has gone: {error}") from error
                finally:
                    self._asking.discard(asking)
        except TimeoutError:
            raise ServerLost(self, "no longer answers") from None
        finally:
            self.num_requests -= 1

    def lost(self, why: str) -> None:
        """Note that the server is lost. Until it answers a check it is not asked any more, and requests that are under
        way there end."""
        if not self._is_told_lost:
            logger.warning("%s is %s: %s", self.url, "lost" if self.is_alive else "not there", why)
        self.is_alive, self._is_told_lost = False, True
        now_s = asyncio.get_running_loop().time()
        for asking in self._asking:
            if not asking.expired():
                asking.reschedule(now_s)

    def found(self) -> None:
        if not self.is_alive:
            logger.info("%s is there", self.url)
        self.is_alive, self._is_told_lost, self._num_missed = True, False, 0

    def missed(self, why: str) -> None:
        self._num_missed += 1
        if self._num_missed >= MISSES:
            self.lost(why)

    async def check(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self.connections.ask("GET", "/health")
                answer.close()  # so that the next check has to connect anew
            if answer.status == 200:
                self.found()
            else:
                self.missed(f"/health says {answer.status}")
        except TimeoutError:
            self.missed("/health does not answer")
        except CannotConnect as error:
            self.lost(str(error))
        except ConnectionError as error:  # a kept connection may end at this moment
            self.missed(str(error))
            self._check_now.set()

    async def check_for_ever(self, interval_s: float) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await self._check_now.wait()
            self._check_now.clear()
            await self.check(2 * interval_s)


def least_busy(servers: Sequence[Server], without: Collection[Server] = ()) -> Server | None:
    """Return the server with the fewest requests, of those that are there; one of `without` only if there is no other;
    None if no server is there."""
    alive = [server for server in servers if server.is_alive]
    return min(
        [each for each in alive if each not in without] or alive, key=lambda each: each.num_requests, default=None
    )

"""A small router for vLLM with prefill and decode on separate servers, for those who have no router:

    python -m hbserve_kv.integrations.router --prefill http://10.0.0.1:8100,7100 --decode http://10.0.0.2:8200

It serves OpenAI's completions and chat completions. It asks a prefill server and then a decode server, or both at once
if it knows the port of the prefill server's connector, and passes on what the decode server answers, as it comes. Each
attempt has a transfer id of its own. If the prefill server refuses a request, the client gets that answer. A server
that is lost before the client has got anything is replaced by another one.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any

import msgspec

from hbserve_kv.errors import BackendUnavailable

try:
    from aiohttp import web
    from aiohttp.http import HttpProcessingError
except ImportError as error:
    raise BackendUnavailable("the router needs aiohttp: pip install 'hbserve-kv[router]'") from error

from hbserve_kv.integrations.router_http import MOST_HEAD_BYTES, Answer
from hbserve_kv.integrations.router_servers import Server, ServerLost, least_busy
from hbserve_rpc.address import MAX_PORT
from hbserve_rpc.own_process import allow_many_files
from hbserve_rpc.plain_values import one_line
from hbserve_rpc.stderr_log import log_to_stderr

logger = logging.getLogger(__name__)

ATTEMPTS = 3
MOST_BODY_BYTES = 64 << 20
GENERATING = ("/v1/completions", "/v1/chat/completions")
OF_ONE_HOP = {
    b"accept-encoding",
    b"connection",
    b"content-length",
    b"expect",
    b"host",
    b"keep-alive",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}
"""Headers that are not passed on."""
NOT_OF_REQUESTS = OF_ONE_HOP | {b"content-encoding"}
"""Headers of a request that are not passed on: aiohttp has decompressed what a client has compressed."""
FAILED = b"data: [DONE]", b'data: {"error"', b'data: {"object":"error"'
"""Beginnings of a streamed answer if the request has failed: its end, or an error in place of a token."""
BACKLOG = 2048
"""Number of clients that may connect at the same moment; Linux allows `net.core.somaxconn` of them, 4096."""
MOST_UNSENT_BYTES = 1 << 16
"""How much of an answer its client may leave unread before the router stops reading from the server."""


Body = dict[str, Any] | bytes
"""Body of a client's request. The values of an object are msgspec.Raw, as the client has written them: a prompt of
thousands of numbers is passed on without being parsed."""

SEVERAL_PROMPTS = re.compile(rb"\s*\[\s*[^\s\d\]-]")
"""Beginning of a JSON list that is not a list of numbers."""

UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""Errors from decoding bytes that are not JSON, not UTF-8 or nested too deeply."""

_read = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Refused(Exception):
    """An answer that is an error, with its headers, and the servers that may have caused it."""

    def __init__(
        self, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]], *servers: Server, why: str = ""
    ) -> None:
        who = " or ".join(each.url for each in servers)
        super().__init__(why or f"{who} says {status}: {body[:200]!r}")
        self.status, self.body, self.headers, self.servers = status, body, headers, servers

    @classmethod
    def of(cls, answer: Answer, body: bytes, server: Server) -> "Refused":
        return cls(answer.status, body, [each for each in answer.headers if each[0].lower() not in OF_ONE_HOP], server)

    @classmethod
    def saying(cls, status: int, message: str, *servers: Server) -> "Refused":
        kind = "server_error" if status >= 500 else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": status}
        json_type = [(b"Content-Type", b"application/json")]
        return cls(status, json.dumps({"error": error}).encode(), json_type, *servers, why=message)


def prefill_body(body: Mapping[str, Any], transfer_id: str) -> dict[str, Any]:
    """Return the body for the prefill leg: one token, not streamed. `transfer_id` is "" if the decode leg waits for the
    answer of this leg."""
    left_out = ("stream_options", "min_tokens", "max_completion_tokens")
    params = {"do_remote_decode": True, "do_remote_prefill": False} | (
        {"transfer_id": transfer_id} if transfer_id else {}
    )
    kept = {name: value for name, value in body.items() if name not in left_out}
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return kept | {limit: 1, "max_tokens": 1, "stream": False, "kv_transfer_params": params}


def is_one_sequence(body: Mapping[str, Any]) -> bool:
    """Whether a request has one prompt and wants one answer. Other requests would use a transfer id several times, so
    they are decoded where they are prefilled."""
    is_list = SEVERAL_PROMPTS.match(body.get("prompt", b""))
    try:
        n, best_of, use_beam_search = (
            msgspec.json.decode(body.get(name, b"null")) for name in ("n", "best_of", "use_beam_search")
        )
    except UNREADABLE:
        return False  # a server will say what is wrong with the request
    return not is_list and n in (1, None) and best_of in (1, None) and not use_beam_search


class ClientLeft(Exception):
    """Raised when the client has left, so that nobody reads the answer any more."""


class Exchange:
    """One attempt at a client's request."""

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self.response: web.StreamResponse | None = None
        """The response to the client; None until the client has begun to get it."""
        self._is_chunked = False

    @contextlib.asynccontextmanager
    async def _ask(self, server: Server, body: Body) -> AsyncIterator[Answer]:
        """Send the request to a server, with this body, and yield the answer."""
        content = msgspec.json.encode(body) if isinstance(body, dict) else body
        headers = [header for header in self._request.raw_headers if header[0].lower() not in NOT_OF_REQUESTS]
        async with server.asked():
            answer = await server.connections.ask(self._request.method, self._request.path_qs, headers, content)
            try:
                yield answer
            finally:
                answer.release()

    async def prefill(self, server: Server, body: dict[str, Any]) -> dict[str, Any] | None:
        """Ask a prefill server, and return the `kv_transfer_params` for the decode leg. Raises Refused, ServerLost."""
        async with self._ask(server, body) as answer:
            content = await answer.read()
            if answer.status != 200:
                raise Refused.of(answer, content, server)
        try:
            return msgspec.json.decode(content, type=dict[str, Any]).get("kv_transfer_params")
        except UNREADABLE as error:
            raise Refused.saying(502, f"{server.url} did not answer with a JSON object: {error}", server) from error

    async def pass_on(self, server: Server, body: Body, prefill: Server | None = None) -> web.StreamResponse:
        """Pass on what a decode server answers to the client, as it comes. Its KV comes from `prefill`.

        Raises:
            Refused, ServerLost: if `response` is None, the client has got nothing. It gets the head only with the first
                part of the body: if the KV does not come, vLLM has sent a head already, and then ends the stream.
        """
        async with self._ask(server, body) as answer:
            if answer.status >= 500:
                raise Refused.of(answer, await answer.read(), server)
            pieces = answer.pieces(self._write_at_once)
            piece = await anext(pieces, b"")
            if piece.startswith(FAILED):
                suspects, said = [each for each in (prefill, server) if each], one_line(piece.decode(errors="replace"))
                problem = f"{server.url} ended the answer before its first token: {said}"
                raise Refused.saying(502, problem, *suspects)
            response = await self._begin(answer)
            while piece:
                await self._write(response.write(piece))
                piece = await anext(pieces, b"")
            await self._write(response.write_eof())
            return response

    async def _begin(self, answer: Answer) -> web.StreamResponse:
        self.response = response = web.StreamResponse(status=answer.status)
        for name, value in answer.headers:
            if name.lower() not in OF_ONE_HOP:
                response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if length := answer.header(b"content-length"):
            response.content_length = int(length)
        await self._write(response.prepare(self._request))
        self._is_chunked = response.headers.get("Transfer-Encoding") == "chunked"
        return response

    def _write_at_once(self, piece: bytes) -> bool:
        """Write a further part of a chunked answer, without waiting. Returns False, and writes nothing, if the client
        has left or reads too slowly."""
        transport = self._request.transport
        if not self._is_chunked or transport is None or transport.get_write_buffer_size() > MOST_UNSENT_BYTES:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return True

    @staticmethod
    async def _write(writing: Awaitable[object]) -> None:
        """Write to the client. If it has left, raise ClientLeft, which is not an error of the server being read."""
        try:
            await writing
        except ConnectionError as error:
            raise ClientLeft(str(error)) from error

    async def break_off(self, why: str) -> web.StreamResponse:
        """Tell a client that has got a part of an answer that no more comes."""
        assert self.response is not None
        logger.warning("an answer was cut off: %s", why)
        with contextlib.suppress(ConnectionError):
            if self.response.content_type == "text/event-stream":  # as vLLM ends a stream that fails
                await self.response.write(b"data: " + Refused.saying(502, why).body + b"\n\n")
                await self.response.write_eof()
            elif self._request.transport is not None:
                self._request.transport.close()
        return self.response


class Router:
    def __init__(self, prefill: Sequence[Server], decode: Sequence[Server], check_interval_s: float = 1.0) -> None:
        self._prefill, self._decode = prefill, decode
        self._check_interval_s = check_interval_s

    def app(self) -> web.Application:
        limits = {"max_line_size": MOST_HEAD_BYTES, "max_field_size": MOST_HEAD_BYTES}
        app = web.Application(client_max_size=MOST_BODY_BYTES, handler_args=limits)
        app.cleanup_ctx.append(self._run)
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/{path:.*}", self._take)
        return app

    async def _run(self, _: web.Application) -> AsyncIterator[None]:
        servers = [*self._prefill, *self._decode]
        await asyncio.gather(*(each.check(2 * self._check_interval_s) for each in servers))
        checks = [asyncio.create_task(each.check_for_ever(self._check_interval_s)) for each in servers]
        logger.info("asks %d prefill and %d decode servers", len(self._prefill), len(self._decode))
        yield
        for check in checks:
            check.cancel()
        await asyncio.gather(*checks, return_exceptions=True)
        for each in servers:
            each.connections.close()

    async def _health(self, _: web.Request) -> web.Response:
        """Answer 200 while a decode server is there, which is enough, because it can prefill too; 503 otherwise."""
        alive = {
            role: {server.url: server.is_alive for server in servers}
            for role, servers in (("prefill", self._prefill), ("decode", self._decode))
        }
        return web.json_response(alive, status=200 if any(alive["decode"].values()) else 503)

    async def _take(self, request: web.Request) -> web.StreamResponse:
        """Answer a request: one that generates with a prefill and a decode server, any other one with a decode
        server."""
        try:
            content = await request.read()
            generates = request.method == "POST" and request.path in GENERATING
            body: Body = _read(content) if generates else content
        except web.RequestPayloadError as error:
            return _response(Refused.saying(400, f"the body cannot be read: {one_line(str(error))}"))
        except UNREADABLE as error:
            return _response(Refused.saying(400, f"the body is not a JSON object: {error}"))
        return await self._answer(request, body)

    async def _answer(self, request: web.Request, body: Body) -> web.StreamResponse:
        """Make attempts at a request, until one is answered or has begun to be."""
        failed: set[Server] = set()
        refusal = Refused.saying(503, "no decode server is there")
        for _ in range(ATTEMPTS):
            decode = least_busy(self._decode, failed)
            if decode is None:
                break
            prefill = least_busy(self._prefill, failed) if isinstance(body, dict) and is_one_sequence(body) else None
            exchange = Exchange(request)
            try:
                return await self._attempt(exchange, body, prefill, decode)
            except Refused as refused:
                refusal = refused
                if refused.status < 500:
                    break
            except ClientLeft:
                assert exchange.response is not None
                return exchange.response
            except ServerLost as lost:
                if exchange.response is not None:
                    return await exchange.break_off(str(lost))
                refusal = Refused.saying(502, str(lost), lost.server)
            logger.warning("an attempt has failed: %s", refusal)
            failed |= set(refusal.servers)
        return _response(refusal)

    @staticmethod
    async def _attempt(exchange: Exchange, body: Body, prefill: Server | None, decode: Server) -> web.StreamResponse:
        if prefill is None or not isinstance(body, dict):
            return await exchange.pass_on(decode, body)
        if not prefill.kv_port:
            params = await exchange.prefill(prefill, prefill_body(body, ""))
            return await exchange.pass_on(decode, body | ({"kv_transfer_params": params} if params else {}), prefill)
        transfer_id = uuid.uuid4().hex
        params = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_id": transfer_id,
            "remote_host": prefill.host,
            "remote_port": prefill.kv_port,
        } | ({"tp_size": prefill.tp_size} if prefill.tp_size else {})
        first = asyncio.create_task(exchange.prefill(prefill, prefill_body(body, transfer_id)))
        second = asyncio.create_task(exchange.pass_on(decode, body | {"kv_transfer_params": params}, prefill))
        try:
            await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
            if first.done() and exchange.response is None:
                first.result()  # raises if prefill failed: the decode server would wait for KV that never comes
            return await second
        finally:
            first.cancel()
            second.cancel()
            await asyncio.gather(first, second, return_exceptions=True)


def _response(refused: Refused) -> web.Response:
    response = web.Response(status=refused.status, body=refused.body)
    response.headers.popall("Content-Type", None)
    for name, value in refused.headers:
        response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
    return response


def _in_one_line(record: logging.LogRecord) -> bool:
    """Make one line of what aiohttp logs, with a traceback, when a client's request cannot be read."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        record.msg, record.args = f"a client's request cannot be read: {one_line(str(error))}", ()
        record.exc_info = None
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hbserve_kv.integrations.router", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--prefill", action="append", required=True, metavar="URL[,KV_PORT[,TP_SIZE]]")
    parser.add_argument("--decode", action="append", required=True, metavar="URL")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    if not 0 <= options.port <= MAX_PORT:
        parser.error(f"--port {options.port}: expected 0 to {MAX_PORT}")
    log_to_stderr("INFO", "%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("aiohttp.server").addFilter(_in_one_line)
    allow_many_files()
    try:
        router = Router([Server(url) for url in options.prefill], [Server(url) for url in options.decode])
        # A client that leaves ends its request on the servers.
        web.run_app(
            router.app(),
            host=options.host,
            port=options.port,
            backlog=BACKLOG,
            handler_cancellation=True,
            access_log=None,
            print=None,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

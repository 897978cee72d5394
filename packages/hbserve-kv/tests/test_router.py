"""The router for vLLM servers, and servers that answer as theirs do."""

import asyncio
import contextlib
import gzip
import json
import resource
import socket
import sys

import msgspec
import pytest

pytest.importorskip("aiohttp", reason="the router's extra: pip install 'hbserve-kv[router]'")

from aiohttp import ClientPayloadError, ClientSession, web

from hbserve_kv.integrations.router import Router, is_one_sequence, main
from hbserve_kv.integrations.router_servers import Server
from hbserve_rpc.own_process import MOST_FILES

DEADLINE_S = 30
PARAMS = {"do_remote_prefill": True, "transfer_id": "of the prefill server"}


class Vllm:
    """One server. Its answers name it; a decode server's are two pieces, of which the second waits for `goes_on`."""

    def __init__(self, name):
        self.name = name
        self.bodies = []
        self.status = 200
        self.content_type = "text/event-stream"
        self.is_frozen = False
        self.num_failing = 0
        """So many answers end without a token: so does a stream of vLLM's whose KV did not come."""
        self.fails_with = b""
        """What such an answer has in place of a token."""
        self.headers = []
        """Of each request."""
        self.asked, self.goes_on, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.goes_on.set()
        self.answers = asyncio.Event()
        """A prefill server's."""
        self.answers.set()
        self.says = json.dumps({"kv_transfer_params": PARAMS})
        self.url = ""

    async def start(self):
        app = web.Application(handler_args={"max_field_size": 1 << 16})
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{what:.*}", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self):
        await self._runner.cleanup()

    async def _health(self, _):
        while self.is_frozen:
            await asyncio.sleep(0.05)
        return web.Response()

    async def _models(self, _):
        return web.json_response({"data": [self.name]})

    async def _generate(self, request):
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def _answer(self, request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.asked.set()
        if self.status != 200:
            return web.json_response({"error": self.name}, status=self.status, headers={"Retry-After": "3"})
        if body.get("kv_transfer_params", {}).get("do_remote_decode"):
            await self.answers.wait()
            return web.json_response(text=self.says)
        response = web.StreamResponse(headers={"Content-Type": self.content_type, "X-From": self.name})
        await response.prepare(request)
        if self.num_failing:
            self.num_failing -= 1
            await response.write(self.fails_with)
        else:
            await response.write(b'data: {"first": 1}\n\n')
            await self.goes_on.wait()
        await response.write(b"data: [DONE]\n\n")
        return response


class Client:
    def __init__(self, session, url):
        self._session, self._url = session, url

    def ask(self, path="/v1/completions", **body):
        return self._session.post(self._url + path, json={"model": "m", "prompt": "hello", "max_tokens": 9, **body})

    def get(self, path):
        return self._session.get(self._url + path)


@pytest.fixture
async def servers():
    """Starts servers, by name."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):

        async def start(*names):
            found = [Vllm(name) for name in names]
            for each in found:
                await each.start()
                stack.push_async_callback(each.stop)
            return found

        yield start


@pytest.fixture
async def route():
    """Starts a router."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(prefill, decode, kv_port="", check_interval_s=1.0):
            router = Router(
                [Server(each.url + kv_port) for each in prefill],
                [Server(each.url) for each in decode],
                check_interval_s,
            )
            runner = web.AppRunner(router.app(), handler_cancellation=True, shutdown_timeout=0)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            session = await stack.enter_async_context(ClientSession())
            return Client(session, f"http://127.0.0.1:{runner.addresses[0][1]}")

        yield start


async def test_the_prefill_server_is_asked_first_and_the_decode_server_gets_what_it_says(servers, route):
    # Known elsewhere: vLLM #16705.
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    decode.goes_on.clear()
    async with client.ask(stream=True, stream_options={"include_usage": True}, min_tokens=3) as answer:
        assert (answer.status, answer.headers["X-From"]) == (200, "d")
        assert answer.content_type == "text/event-stream"
        assert await answer.content.readline() == b'data: {"first": 1}\n', "it comes before the rest is there"
        decode.goes_on.set()
        assert b"[DONE]" in await answer.content.read()
    (first,), (second,) = prefill.bodies, decode.bodies
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    assert first == {"model": "m", "prompt": "hello", "max_tokens": 1, "stream": False, "kv_transfer_params": params}
    assert (second["max_tokens"], second["min_tokens"], second["kv_transfer_params"]) == (9, 3, PARAMS)


@pytest.mark.parametrize("tp_size", [{}, {"tp_size": 4}], ids=["as many ranks as decode", "so many"])
async def test_both_servers_are_asked_at_once_where_the_connectors_port_is_known(servers, route, tp_size):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode], kv_port=",7100" + (",4" if tp_size else ""))
    prefill.answers.clear()
    async with client.ask("/v1/chat/completions", max_completion_tokens=5) as answer:
        await answer.read()
        await decode.asked.wait()
    prefill.answers.set()
    (first,), (second,) = prefill.bodies, decode.bodies
    assert (first["max_completion_tokens"], second["max_completion_tokens"]) == (1, 5)
    wanted = second["kv_transfer_params"]
    assert wanted.pop("transfer_id") == first["kv_transfer_params"]["transfer_id"]
    assert wanted == {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_host": "127.0.0.1", "remote_port": 7100,
    } | tp_size  # fmt: skip


@pytest.mark.parametrize("kv_port", ["", ",7100"])
async def test_what_the_prefill_server_refuses_is_the_clients_answer(servers, route, kv_port):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode], kv_port)
    prefill.status = 400
    if kv_port:
        decode.goes_on.clear()
        decode._answer = lambda _: decode.goes_on.wait()  # it waits for KV that never comes
    async with client.ask() as answer:
        assert (answer.status, await answer.json()) == (400, {"error": "p"})
        assert answer.headers["Retry-After"] == "3"
        assert answer.headers.getall("Content-Type") == ["application/json; charset=utf-8"]
    if kv_port:
        await decode.left.wait()
    assert not decode.bodies


@pytest.mark.parametrize("says", ["<html>an error of a proxy</html>", '["kv_transfer_params"]', "{", "null"])
async def test_a_prefill_server_that_answers_no_json_object_is_replaced_or_named(servers, route, says):
    prefill, other, decode = await servers("p", "q", "d")
    client = await route([prefill, other], [decode])
    prefill.says = says
    async with client.ask() as answer:
        assert answer.status == 200
    assert decode.bodies[-1]["kv_transfer_params"] == PARAMS
    other.says = says
    async with client.ask() as answer:
        message = (await answer.json())["error"]["message"]
        assert (answer.status, "did not answer with a JSON object" in message) == (502, True)


async def test_a_server_that_is_gone_or_fails_is_replaced_before_the_client_has_got_anything(servers, route):
    # Known elsewhere: vllm-ascend #14980.
    prefill, other, decode, last = await servers("p", "q", "d", "e")
    client = await route([prefill, other], [decode, last])
    await prefill.stop()
    decode.status = 500
    for _ in range(4):
        async with client.ask(stream=True) as answer:
            assert answer.status == 200, await answer.text()
            assert (answer.headers["X-From"], b"[DONE]" in await answer.read()) == ("e", True)
    assert len(other.bodies) >= 4


@pytest.mark.parametrize("says", [b"", b'data: {"error": {"message": "no KV", "code": 500}}\n\n'])
@pytest.mark.parametrize("kv_port", ["", ",7100"])
async def test_an_answer_that_ends_without_a_token_is_asked_for_again_with_another_prefill_server(
    servers, route, kv_port, says
):
    prefill, other, decode = await servers("p", "q", "d")
    client = await route([prefill, other], [decode], kv_port)
    decode.num_failing, decode.fails_with = 1, says
    async with client.ask(stream=True) as answer:
        assert answer.status == 200
        assert await answer.content.read() == b'data: {"first": 1}\n\ndata: [DONE]\n\n'
    assert len(decode.bodies) == 2
    assert len(prefill.bodies) == len(other.bodies) == 1


async def test_where_answers_end_without_a_token_another_decode_server_is_asked_too(servers, route):
    prefill, decode, last = await servers("p", "d", "e")
    client = await route([prefill], [decode, last])
    decode.num_failing = 9
    for _ in range(2):
        async with client.ask(stream=True) as answer:
            assert (answer.status, answer.headers["X-From"]) == (200, "e")


async def test_a_client_hears_of_answers_that_all_end_without_a_token(servers, route):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    decode.num_failing, decode.fails_with = 9, b'data: {"error": {"message": "no KV"}}\n\n'
    async with client.ask(stream=True) as answer:
        assert answer.status == 502
        said = (await answer.json())["error"]["message"]
        assert 'before its first token: data: {"error": {"message": "no KV"}}' in said


async def test_without_a_prefill_server_the_decode_server_does_both(servers, route):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    await prefill.stop()
    async with client.ask() as answer:
        assert answer.status == 200
    async with client.get("/health") as answer:
        assert (answer.status, (await answer.json())["decode"]) == (200, {decode.url: True})
    assert "kv_transfer_params" not in decode.bodies[-1]


async def test_without_a_decode_server_the_answer_says_so(servers, route):
    # Known elsewhere: vllm-ascend #12166.
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    await decode.stop()
    async with client.ask() as answer:
        assert answer.status in (502, 503)
        assert "127.0.0.1" in (await answer.json())["error"]["message"]
    async with client.ask() as answer:
        assert (answer.status, (await answer.json())["error"]["message"]) == (503, "no decode server is there")
    async with client.get("/health") as answer:
        assert answer.status == 503


async def test_a_decode_server_that_ends_in_the_middle_of_a_stream_ends_it_with_an_error(servers, route):
    prefill, decode, other = await servers("p", "d", "e")
    client = await route([prefill], [decode])
    decode.goes_on.clear()
    async with client.ask(stream=True) as answer:
        await answer.content.readline()
        await decode.stop()
        rest = await answer.content.read()
    assert b'"code": 502' in rest
    assert b"[DONE]" not in rest
    assert not other.bodies


async def test_an_answer_that_is_cut_off_is_never_taken_for_a_whole_one(servers, route):
    # Known elsewhere: vllm-ascend #9046, #15108.
    prefill, decode = await servers("p", "d")
    decode.content_type = "application/json"
    client = await route([prefill], [decode])
    decode.goes_on.clear()
    async with client.ask() as answer:
        await answer.content.readline()
        await decode.stop()
        with pytest.raises(ClientPayloadError):
            await answer.content.read()


@pytest.mark.parametrize("frozen", ["prefill", "decode"])
async def test_a_server_that_freezes_holds_up_no_request_and_is_asked_again_when_it_goes_on(servers, route, frozen):
    prefill, decode, spare = await servers("p", "d", "s")
    roles = ([prefill, spare], [decode]) if frozen == "prefill" else ([prefill], [decode, spare])
    client = await route(*roles, check_interval_s=0.3)
    victim = prefill if frozen == "prefill" else decode
    victim.is_frozen = True
    victim._answer = lambda _: asyncio.Event().wait()
    async with client.ask() as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()
    assert spare.bodies
    async with client.get("/health") as answer:
        assert (await answer.json())[frozen][victim.url] is False
    victim.is_frozen = False
    while True:
        async with client.get("/health") as answer:
            if (await answer.json())[frozen][victim.url]:
                break
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("kv_port", ["", ",7100"])
async def test_a_client_that_leaves_ends_its_request_on_the_servers(servers, route, kv_port):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode], kv_port)
    decode.goes_on.clear()
    async with client.ask(stream=True) as answer:
        await answer.content.readline()
        answer.close()
    await decode.left.wait()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/other"])
async def test_a_body_that_a_client_has_compressed_is_passed_on_as_it_was_before(servers, route, path):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    body = {"prompt": "hello", "n": 1}
    compressed = {"data": gzip.compress(json.dumps(body).encode()), "headers": {"Content-Encoding": "gzip"}}
    async with client._session.post(client._url + path, **compressed) as answer:
        assert answer.status == 200
    assert decode.bodies[0]["prompt"] == "hello"
    assert "Content-Encoding" not in decode.headers[0]


async def test_a_long_header_is_passed_on(servers, route):
    """Of a token that somebody is known by, or cookies: aiohttp takes 8190 bytes where nothing else is said."""
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    long = {"Authorization": "x" * 20_000}
    async with client._session.post(client._url + "/v1/completions", json={"prompt": "a"}, headers=long) as answer:
        assert answer.status == 200
    assert decode.headers[0]["Authorization"] == prefill.headers[0]["Authorization"] == "x" * 20_000


def test_a_router_takes_many_clients_at_once(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    begun = {}
    monkeypatch.setattr(web, "run_app", lambda app, **settings: begun.update(settings))
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most - 1, hard))
    try:
        main(["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:1"])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert begun["backlog"] == 2048


@pytest.mark.parametrize("body", [{"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1, 2], [3]]}])
async def test_what_is_several_sequences_is_decoded_where_it_is_prefilled(servers, route, body):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    async with client.ask(**body) as answer:
        assert answer.status == 200
    assert not prefill.bodies
    assert decode.bodies[0] == {"model": "m", "prompt": "hello", "max_tokens": 9, **body}


async def test_anything_else_is_asked_of_a_decode_server(servers, route):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    async with client.get("/v1/models") as answer:
        assert (answer.status, await answer.json()) == (200, {"data": ["d"]})
    async with client._session.post(client._url + "/v1/completions", data=b"nonsense") as answer:
        assert answer.status == 400
        assert "not a JSON object" in json.loads(await answer.text())["error"]["message"]


@pytest.mark.parametrize("value", [b"1e999", b"9" * 400, b"[" * 5000 + b"]" * 5000])
async def test_a_body_of_odd_values_is_a_servers_to_answer_or_refused_and_never_the_routers_fault(
    servers, route, value
):
    """`n` is looked at, to see whether a transfer id would be used several times."""
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    body = b'{"prompt": "hello", "n": %b}' % value
    async with client._session.post(client._url + "/v1/completions", data=body) as answer:
        if decode.bodies:
            assert answer.status == 200
        else:
            assert (answer.status, answer.content_type) == (400, "application/json")
    assert not prefill.bodies


def test_what_is_no_utf_8_is_not_taken_for_one_sequence():
    assert not is_one_sequence({"n": msgspec.Raw(b'"\xff"')})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_a_compressed_body_that_cannot_be_read_is_refused(servers, route, path):
    prefill, decode = await servers("p", "d")
    client = await route([prefill], [decode])
    headers = {"Content-Encoding": "gzip"}
    async with client._session.post(client._url + path, data=b"no gzip", headers=headers, compress=False) as answer:
        assert answer.status == 400
        assert "cannot be read" in json.loads(await answer.text())["error"]["message"]


async def test_a_server_that_has_never_been_there_is_told_once(servers, route, caplog):
    (decode,) = await servers("d")
    await decode.stop()
    await route([], [decode], check_interval_s=0.01)
    async with asyncio.timeout(DEADLINE_S):
        while not caplog.records:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
    assert [each.getMessage().partition(" is not there")[0] for each in caplog.records] == [decode.url]


async def test_the_log_does_not_say_that_a_server_has_answered_what_the_router_makes(servers, route, caplog):
    (decode,) = await servers("d")
    client = await route([], [decode])
    decode.num_failing = 9
    async with client.ask(stream=True) as answer:
        assert answer.status == 502
    told = [each.getMessage() for each in caplog.records]
    assert all(each.startswith(f"an attempt has failed: {decode.url} ended") for each in told), told
    assert told


@pytest.mark.parametrize(("request_line", "header"), [(b"GET /\xff", b""), (b"POST /", b"Content-Encoding: gzip\r\n")])
async def test_what_a_client_sends_that_cannot_be_read_is_one_line_of_the_log(request_line, header):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hbserve_kv.integrations.router", "--port", str(port)]
    command += ["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:1"]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while b"asks" not in await process.stderr.readline():
                pass
            reader, writer = await _connection(port)
            writer.write(request_line + b" HTTP/1.1\r\nHost: h\r\nContent-Length: 7\r\n" + header + b"\r\nno gzip")
            assert (await reader.readline()).endswith(b" 400 Bad Request\r\n")
            writer.close()
            process.terminate()
            lines = (await process.stderr.read()).splitlines()
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
    assert lines
    assert all(b"a client's request cannot be read: " in line for line in lines), lines


async def _connection(port):
    while True:
        with contextlib.suppress(ConnectionError):
            return await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("url", ["localhost:8000", "http://", "http://h:1,kv", "http://h:1,70000"])
def test_an_url_that_is_none_is_refused_with_the_form_that_is_expected(url, capsys):
    with pytest.raises(SystemExit):
        main(["--prefill", "http://127.0.0.1:1", "--decode", url])
    assert "expected http://HOST:PORT" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_in_a_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit):
            main(["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:1", "--port", port])
    assert "address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_there_is_not_is_told_in_a_line(port, capsys):
    with pytest.raises(SystemExit):
        main(["--prefill", "http://127.0.0.1:1", "--decode", "http://127.0.0.1:1", "--port", port])
    assert f"--port {port}: expected 0 to 65535" in capsys.readouterr().err

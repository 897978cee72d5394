"""The sockets of the OpenAI server: a Unix domain socket, one with TLS, one behind a proxy, and one that is taken."""

import asyncio
import contextlib
import gc
import json
import os
import resource
import select
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from hbserve_fake_scheduler import FakeServer
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

import hbserve.server.http.connection as connection_module
from hbserve.server.http.http_server import FILES_LEFT, HttpServer, shared_with_others
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import AddressInUse
from hbserve_scheduler import ConfigError
from hbserve_scheduler.config import ServerSection
from hbserve_testing.narrowing import present


async def not_called(*_: Any) -> None:
    """Stand in for the application of a server that is not started."""


@pytest.fixture
def serve(small_model: Callable[[str], Path]) -> Callable[..., Any]:
    @asynccontextmanager
    async def serve(listening_fd: int | None = None, **settings: Any) -> AsyncIterator[HttpServer]:
        server = FakeServer(load_tokenizer(small_model("qwen3")), **({"port": 0} | settings))
        server.answers("a")
        settings_of_server = server.service.settings
        is_shared = settings_of_server.api_servers > 1
        shared = shared_with_others(settings_of_server, listening_fd) if is_shared else None
        http = HttpServer(settings_of_server, server.app, shared=shared)
        await http.start()
        yield http
        await http.stop()

    return serve


async def test_a_unix_socket_is_served_and_removed_and_one_that_nobody_serves_is_replaced(serve, tmp_path):
    path = tmp_path / "socket"
    async with serve(uds=str(path)):
        with pytest.raises(AddressInUse, match="socket is in use"):
            HttpServer(ServerSection(uds=str(path)), not_called)
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) as client:
            assert (await client.get("http://here/health")).status_code == 200
    assert not path.exists()
    left = HttpServer(ServerSection(uds=str(path)), not_called)
    present(left._socket).close()  # as if it had been killed
    assert path.exists()
    async with serve(uds=str(path)):
        pass
    deep = tmp_path / ("a" * 200)
    with pytest.raises(ConfigError, match=rf"^server\.uds='{deep}': \d+ bytes; .* may have 107: give a shorter one$"):
        HttpServer(ServerSection(uds=str(deep)), not_called)
    path.write_text("a file of somebody's")
    with pytest.raises(AddressInUse, match="is there, and is no socket"):
        HttpServer(ServerSection(uds=str(path)), not_called)
    assert path.read_text() == "a file of somebody's"


async def test_each_of_several_that_share_a_unix_socket_has_its_part_of_the_connections_and_one_that_ends_leaves_it(
    serve, tmp_path
):
    path = tmp_path / "socket"
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()
        shared: dict[str, Any] = {"uds": str(path), "api_servers": 2}
        clients = [httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path))) for _ in range(12)]
        async with serve(os.dup(listening.fileno()), **shared) as second:
            async with serve(os.dup(listening.fileno()), **shared) as first:
                for client in clients[:8]:
                    assert (await client.get("http://here/health")).status_code == 200
                counts = [len(each._server.server_state.connections) for each in (first, second)]
                assert counts == [4, 4]
            for client in clients[8:]:  # the other one serves alone what nobody else takes
                assert (await client.get("http://here/health")).status_code == 200
            assert len(second._server.server_state.connections) == 8
        assert path.is_socket(), "it is of whoever has bound it"
        for client in clients:
            await client.aclose()


@pytest.mark.parametrize("api_servers", [1, 2])
async def test_what_is_written_is_sent_at_once(serve, api_servers):
    """Nagle's algorithm would hold the first token of every other answer back for 40 ms."""
    async with serve(api_servers=api_servers) as http, httpx.AsyncClient() as client:
        await client.get(f"{http.url}/health")
        (connection,) = http._server.server_state.connections
        its_socket = connection.transport.get_extra_info("socket")
        assert its_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks_and_its_answer_ends_with_the_connection(serve, stream):
    content = json.dumps({"prompt": "hi", "stream": stream}).encode()
    async with serve() as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
        writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
        head, _, body = (await asyncio.wait_for(reader.read(), 60)).partition(b"\r\n\r\n")
        writer.close()
    assert b"transfer-encoding" not in head
    assert b"connection: keep-alive" not in head  # and was read to its end; older versions of uvicorn do not say so
    assert (b"content-length" in head) != stream
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"\n\ndata: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["text"] == "a"


async def test_a_request_that_has_come_as_the_server_stops_is_not_left_without_an_end(serve):
    async with serve() as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
        writer.write(b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
        http._watching.cancel()
        http._watching = None  # which `stop` would wait for first
        while not http.num_answering:  # not a moment later: its task has not begun
            await asyncio.sleep(0)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 20) == b""
    writer.close()


@pytest.fixture
def key_and_certificate(tmp_path: Path) -> tuple[str, str]:
    """Files of a private key and a certificate of 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, to make a certificate")
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    return key, certificate


async def test_https_is_served_with_a_certificate_and_one_that_cannot_be_used_is_named(serve, key_and_certificate):
    key, certificate = key_and_certificate
    async with serve(ssl_keyfile=key, ssl_certfile=certificate) as http:
        assert http.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=certificate)
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"{http.url}/health")).status_code == 200
    nowhere = str(Path(key).parent / "nowhere")
    with pytest.raises(ConfigError, match=r"^server\.ssl_keyfile='.*/nowhere': No such file or directory$"):
        HttpServer(ServerSection(port=0, ssl_keyfile=nowhere, ssl_certfile=certificate), not_called)
    with pytest.raises(ConfigError, match=r"^server\.ssl_certfile="):
        HttpServer(ServerSection(port=0, ssl_keyfile=certificate, ssl_certfile=certificate), not_called)


async def test_behind_a_proxy_everything_is_under_its_path(serve):
    async with serve(root_path="/models/small", api_key="k") as http:
        assert http.url.endswith("/models/small")
        origin = http.url.removesuffix("/models/small")  # the proxy takes the path away
        headers = {"Authorization": "Bearer k"}
        async with httpx.AsyncClient(base_url=origin) as client:
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401
            body = {"prompt": "hi ", "echo": True}
            answer = await client.post("/v1/completions", json=body, headers=headers)
    assert answer.json()["choices"][0]["text"] == "hi a"


async def test_a_host_that_is_not_here_is_named():
    with pytest.raises(ConfigError, match=r"^server\.host='192\.0\.2\.1': 192\.0\.2\.1:0 cannot be bound: [^()]+$"):
        HttpServer(ServerSection(host="192.0.2.1", port=0), not_called)


async def health_over(connection: socket.socket) -> bytes:
    """Ask for /health, and return the first line of the answer."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(30):
        await loop.sock_sendall(connection, b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
        return (await loop.sock_recv(connection, 1000)).partition(b"\r\n")[0]


async def test_connections_for_which_there_are_not_files_enough_are_refused_at_once_and_told_once(serve, caplog):
    async with serve() as http:
        address = http.bound_socket.getsockname()
        connections = []
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + FILES_LEFT + 10, hard))
        try:
            answers: list[bytes] = []
            while not answers or b"503" not in answers[-1] or answers.count(answers[-1]) < 3:
                connections.append(socket.create_connection(address))
                connections[-1].setblocking(False)
                answers.append(await health_over(connections[-1]))
            assert answers[0] == await health_over(connections[0]) == b"HTTP/1.1 200 OK", "those that are there go on"
            for each in connections:
                each.close()
            async with asyncio.timeout(30):
                while b"200" not in answers[-1]:
                    with socket.create_connection(address) as again:
                        again.setblocking(False)
                        answers.append(await health_over(again))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    (told,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert told == f"connections are refused: this process may open {highest + FILES_LEFT + 10} files (ulimit -n)"


async def test_who_is_refused_for_want_of_files_reads_so_though_its_request_comes_in_parts_afterwards(serve):
    """Many clients send head and body apart; a connection that is broken in between is no answer to them."""
    loop = asyncio.get_running_loop()
    async with serve() as http:
        address = http.bound_socket.getsockname()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # None is free below the highest: a connection gets the lowest number that is free.
        opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(max(map(int, os.listdir("/proc/self/fd"))))]
        highest = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + FILES_LEFT, hard))
        try:
            for _ in range(2 * FILES_LEFT):
                with socket.create_connection(address) as client:
                    client.setblocking(False)
                    async with asyncio.timeout(30):
                        while not select.select([client], [], [], 0)[0]:
                            await asyncio.sleep(0.01)
                        for part in (b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2000\r\n\r\n", bytes(2000)):
                            await loop.sock_sendall(client, part)
                            await asyncio.sleep(0.02)
                        assert (await loop.sock_recv(client, 1000)).startswith(b"HTTP/1.1 503 ")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for each in opened:
                os.close(each)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\n", b"413"),
        (b"POST /v1/nothing HTTP/1.1\r\nconnection: close\r\n", b"404"),
        (b"POST /v1/completions HTTP/1.0\r\n", b"413"),
        (b"POST /v1/completions HTTP/1.1\r\nno header\r\n", b"400"),
    ],
)
async def test_a_client_that_is_refused_while_it_sends_reads_why_when_it_has_sent_all(serve, head, status):
    async with serve(max_body_size=1 << 20) as http:
        _, writer = opened = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
        writer.write(head + b"content-length: 50000000\r\n\r\n")
        for _ in range(50):
            writer.write(bytes(1_000_000))
            await asyncio.wait_for(writer.drain(), 30)  # which raises if the connection is broken
        answer = await asyncio.wait_for(opened[0].read(), 30)
        assert answer.split(b" ", 2)[1] == status
        writer.close()


async def test_a_client_that_is_refused_and_never_ends_is_given_up(serve, monkeypatch):
    monkeypatch.setattr(connection_module, "LINGER_S", 0.2)
    async with serve(max_body_size=1 << 20) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
        writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 50000000\r\n\r\n")
        assert b"413" in await asyncio.wait_for(reader.readline(), 30)
        async with asyncio.timeout(30):
            while http._server.server_state.connections:
                writer.write(bytes(1000))
                await asyncio.sleep(0.01)
        writer.close()


async def half_closed(http: HttpServer, sent: bytes) -> bytes:
    """All that comes for what is sent by a client that then sends no more."""
    reader, writer = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
    writer.write(sent)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()


async def test_a_client_that_ends_its_side_gets_what_costs_nothing_and_is_told_what_it_cannot_have(serve):
    get = b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n"
    body = b'{"prompt": "a"}'
    post = b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    async with serve() as http:
        assert (await half_closed(http, get)).startswith(b"HTTP/1.1 200 OK\r\n")
        assert (await half_closed(http, get + get)).count(b"HTTP/1.1 200 OK\r\n") == 2
        refused = await half_closed(http, post)
        assert refused.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert b"shut down for writing" in refused
        assert await half_closed(http, get[:-4]) == b"", "no request"
        assert not http.num_answering


async def test_a_connection_keeps_nothing_of_the_requests_that_it_has_answered(serve):
    def num_kept() -> int:
        return sum(type(each) is RequestResponseCycle for each in gc.get_objects())

    async with serve() as http, httpx.AsyncClient() as client:
        before = num_kept()
        for _ in range(20):
            url = f"http://127.0.0.1:{http.bound_socket.getsockname()[1]}/health"
            assert (await client.get(url)).status_code == 200
        gc.collect()
        assert num_kept() - before <= 2, "the last one, and one that is about to end"


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_goes_ends_the_request_that_is_computed_though_it_has_sent_another(small_model, streams):
    server = FakeServer(load_tokenizer(small_model("qwen3")), port=0)
    server.scheduler.steps = [[70], asyncio.Event()]
    http = HttpServer(server.service.settings, server.app)
    await http.start()
    body = json.dumps({"prompt": "a", "stream": streams}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", http.bound_socket.getsockname()[1])
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
    writer.write(b"GET /health HTTP/1.1\r\nhost: here\r\n\r\n")
    async with asyncio.timeout(30):
        while not server.scheduler.num_given:
            await asyncio.sleep(0.01)
        writer.close()
        while server.scheduler.num_abandoned < 1:
            await asyncio.sleep(0.01)
        while http.num_answering:
            await asyncio.sleep(0.01)
    await http.stop()

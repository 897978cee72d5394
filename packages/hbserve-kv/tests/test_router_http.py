"""HTTP/1.1 between the router and a server, whose bytes are given here as they come from its socket."""

import asyncio
import contextlib
import errno

import pytest

from hbserve_kv.integrations.router_http import CannotConnect, Connections

DEADLINE_S = 20
CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\nC;name=value\r\n, and \r\n\r\nto\r\n5\r\n all.\r\n0\r\nTrailer: x\r\n\r\n"
)
TEXT = b"hello, and \r\n\r\nto all."
WHOLE = {
    "chunked": (CHUNKED, TEXT),
    "a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
    "no body": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "a length of 0": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
}


@pytest.fixture
async def server():
    """Starts a server that does what is given with each request's writer; returns its connections, and how many it has
    had."""
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):

        async def start(answer):
            seen = []

            async def serve(reader, writer):
                seen.append(writer)
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        head = await reader.readuntil(b"\r\n\r\n")
                        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                        await answer(head + await reader.readexactly(length), writer)
                        await writer.drain()
                writer.close()

            listening = await asyncio.start_server(serve, "127.0.0.1", 0)
            connections = Connections(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/under")

            async def stop():
                connections.close()
                listening.close()
                for writer in seen:
                    writer.transport.abort()
                    with contextlib.suppress(ConnectionError):
                        await writer.wait_closed()

            stack.push_async_callback(stop)
            return connections, seen

        yield start


async def read(connections, method="POST", body=b"{}"):
    answer = await connections.ask(method, "/path?a=b", [(b"X-Name", b"value")], body)
    try:
        return answer.status, await answer.read()
    finally:
        answer.release()


@pytest.mark.parametrize("kind", WHOLE)
async def test_answers_are_read_wherever_their_bytes_are_cut_and_the_connection_is_used_again(server, kind):
    whole, body = WHOLE[kind]
    cuts = iter(range(1, len(whole)))

    async def answer(request, writer):
        assert request.startswith(b"POST /under/path?a=b HTTP/1.1\r\n")
        assert b"X-Name: value\r\n" in request
        assert request.endswith(b"\r\n\r\n{}")
        cut = next(cuts)
        writer.write(whole[:cut])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        writer.write(whole[cut:])

    connections, seen = await server(answer)
    for _ in range(1, len(whole)):
        status, found = await read(connections)
        assert (status // 100, found) == (2, body)
    assert len(seen) == 1


async def test_a_body_without_a_length_ends_with_its_connection(server):
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhello")
        writer.close()

    connections, seen = await server(answer)
    for _ in range(2):
        assert await read(connections) == (200, b"hello")
    assert len(seen) == 2


async def test_the_head_alone_is_an_answer_to_head(server):
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")

    connections, seen = await server(answer)
    for _ in range(2):
        assert await read(connections, method="HEAD") == (200, b"")
    assert len(seen) == 1


@pytest.mark.parametrize("said", [b"Connection: close\r\n", b"connection: Close\r\n"])
async def test_a_connection_that_the_server_closes_is_not_used_again(server, said):
    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n%b\r\nhello" % said)

    connections, seen = await server(answer)
    for _ in range(2):
        assert await read(connections) == (200, b"hello")
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", "not a number"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "ended"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", "ended"),
        (b"HTTP/1.1 200 OK\r\nContent-", "ended"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 17), "does not end"),
        (b"HTTP/1.1 000 No\r\nContent-Length: 0\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "not a header"),
        (b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n", "not a header"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "not known"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * (1 << 17), "does not end"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3000, "ended"),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(server, given, why):
    async def answer(_, writer):
        writer.write(given)
        writer.close()

    connections, _ = await server(answer)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ConnectionError, match=why):
            await read(connections)


async def test_nobody_listening_is_told_from_a_connection_that_ends(server):
    async def answer(_, writer):
        writer.transport.abort()

    connections, _ = await server(answer)
    with pytest.raises(ConnectionError) as ended:
        await read(connections)
    assert not isinstance(ended.value, CannotConnect)
    with pytest.raises(CannotConnect, match="cannot be connected"):
        await read(Connections("http://127.0.0.1:9"))


async def test_a_router_without_a_file_left_does_not_say_that_the_server_is_gone(server, monkeypatch):
    async def fails(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    connections, _ = await server(lambda *_: None)
    monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", fails)
    with pytest.raises(ConnectionError, match="raise `ulimit -n`") as refused:
        await read(connections)
    assert not isinstance(refused.value, CannotConnect)


async def test_pieces_that_come_while_they_are_waited_for_are_given_at_once_and_stay_in_order(server):
    count = 40
    goes_on = asyncio.Semaphore(1)

    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(count):
            await goes_on.acquire()
            writer.write(b"2\r\n%02d\r\n" % number)
        writer.write(b"0\r\n\r\n")

    connections, _ = await server(answer)
    found: list[bytes] = []
    at_once: list[bytes] = []

    def direct(piece):
        goes_on.release()
        if len(at_once) % 3 == 2:  # now and then the client does not read
            at_once.append(b"")
            return False
        at_once.append(piece)
        found.append(piece)
        return True

    asked = await connections.ask("POST", "/")
    async for piece in asked.pieces(direct):
        found.append(piece)
        goes_on.release()
    asked.release()
    assert b"".join(found) == b"".join(b"%02d" % number for number in range(count))
    assert sum(map(bool, at_once)) > count // 3


async def test_a_server_is_not_read_further_while_nobody_takes_what_has_come(server):
    sent = 0

    async def answer(_, writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (256 << 20))
        for _ in range(256):
            writer.write(bytes(1 << 20))
            await writer.drain()
            sent += 1

    connections, _ = await server(answer)
    asked = await connections.ask("POST", "/")
    before = -1
    while sent != before:  # until it does not get on
        before = sent
        await asyncio.sleep(0.3)
    assert sent < 64
    assert len(await asked.read()) == 256 << 20
    asked.release()
    assert sent == 256


async def test_a_server_hears_that_nobody_reads_its_answer_any_more(server):
    left = asyncio.Event()

    async def answer(_, writer):
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b"1\r\nx\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        left.set()

    connections, _ = await server(answer)
    asked = await connections.ask("POST", "/")
    async for _ in asked.pieces():
        break
    asked.release()
    await left.wait()


async def test_what_a_client_that_left_has_not_read_is_never_taken_for_the_next_answer(server):
    answers = iter([b"for the first", b"for another"])

    async def answer(_, writer):
        body = next(answers)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    connections, _ = await server(answer)
    asked = await connections.ask("POST", "/")
    asked.release()
    assert await read(connections) == (200, b"for another")

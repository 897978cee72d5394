"""Sockets of this process, found by what they are connected to."""

import socket
import threading
import time

import pytest

from hbserve_kv.transports.own_sockets import hang_up, listen_only_at, listening_everywhere, look_every


@pytest.mark.parametrize(
    ("family", "address", "named"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "127.0.0.1", "localhost"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
    ],
    ids=["IPv4", "a name", "IPv6", "IPv4 over IPv6"],
)
def test_who_waits_for_an_answer_from_there_gets_none_and_others_wait_on(family, address, named):
    bound = "127.0.0.1" if address.endswith("127.0.0.1") else address
    bound_family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    try:
        servers = [socket.create_server((bound, 0), family=bound_family) for _ in range(2)]
    except OSError as error:
        pytest.skip(f"no {address} here: {error}")
    answers: dict[int, bytes] = {}

    def ask(client: socket.socket, number: int) -> None:
        answers[number] = client.recv(1)

    clients = [socket.socket(family) for _ in servers]
    for client, server in zip(clients, servers, strict=True):
        client.connect((address, server.getsockname()[1]))
    threads = [threading.Thread(target=ask, args=[client, i], daemon=True) for i, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    hang_up(named, servers[0].getsockname()[1])
    threads[0].join(10)
    assert answers == {0: b""}
    with servers[1].accept()[0] as accepted:
        accepted.sendall(b"x")
        threads[1].join(10)
    assert answers == {0: b"", 1: b"x"}
    for each in (*clients, *servers):
        each.close()


def test_how_long_accept_waits_is_set_from_outside():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as other:
        look_every(server.getsockname()[1], 0.05)
        began_s = time.monotonic()
        with pytest.raises(BlockingIOError):
            server.accept()
        assert 0.04 < time.monotonic() - began_s < 5
        assert other.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)


@pytest.mark.parametrize(
    ("bound", "only_at", "others"),
    [
        ("0.0.0.0", ["127.0.0.2"], ["127.0.0.1", "127.0.0.3"]),
        ("0.0.0.0", ["127.0.0.2", "127.0.0.1"], ["127.0.0.3"]),
        pytest.param("::", ["::1"], ["127.0.0.1"], marks=pytest.mark.ipv6),
        pytest.param("::", ["127.0.0.2", "::1"], ["127.0.0.1"], marks=pytest.mark.ipv6),
    ],
)
def test_who_listens_everywhere_can_be_made_to_hear_only_what_comes_to_some_addresses(bound, only_at, others):
    before, family = listening_everywhere(), socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.create_server((bound, 0), family=family, dualstack_ipv6=family == socket.AF_INET6) as server:
        port = server.getsockname()[1]
        try:
            listen_only_at(only_at, listening_everywhere() - before)
        except PermissionError as error:
            pytest.skip(f"this kernel wants CAP_NET_ADMIN for it: {error}")
        for other in others:
            with pytest.raises(TimeoutError):
                socket.create_connection((other, port), 0.1)
        for one in only_at:
            with socket.create_connection((one, port), 20) as client, server.accept()[0] as accepted:
                client.sendall(b"heard")
                assert accepted.recv(5, socket.MSG_WAITALL) == b"heard"

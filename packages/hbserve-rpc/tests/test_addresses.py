"""Addresses as people write them: they work, or are refused in words where they come in."""

import asyncio
import ipaddress
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbserve_rpc import (
    InvalidAddress,
    PeerLost,
    RpcClient,
    RpcServer,
    RpcTimeout,
    canonical_host,
    check_host,
    check_peer_host,
    format_address,
    parse_address,
)
from hbserve_rpc.address import is_wildcard
from hbserve_rpc.connected_client import Peer

LINK_LOCAL = "fe80::1"


ips = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str)
names = st.from_regex(r"[a-z][a-z0-9_]{0,8}(\.[a-z][a-z0-9-]{0,5}[a-z0-9]){0,3}", fullmatch=True)


def is_fine(check, value) -> bool:
    words = ""
    try:
        check(value)
    except InvalidAddress as error:
        words = str(error)
    assert not words or words.startswith(repr(value))
    assert not words or any(remedy in words for remedy in ("expected", "use ", "needs them"))
    return not words


@given(st.one_of(ips, names), st.integers(1, 65535))
def test_every_host_that_can_be_told_is_read_as_it_was_written(host, port):
    if is_fine(check_peer_host, host):
        assert parse_address(format_address(host, port)) == (host, port)


@given(st.one_of(st.text(max_size=30), st.from_regex(r"[\[\]:.%/ 0-9a-f]{0,20}", fullmatch=True)))
def test_any_text_is_an_address_or_refused_in_words_and_what_is_accepted_is_written_alike(text):
    if is_fine(parse_address, text):
        host, port = parse_address(text)
        assert text.rpartition(":")[0] == format_address(host, port).rpartition(":")[0]
        assert text.isascii()
        assert not set(host) & set(" []/\n\t")
    is_fine(check_host, text)


@given(ips)
def test_an_address_is_the_same_however_it_is_written(host):
    full = ipaddress.ip_address(host).exploded.upper()
    assert canonical_host(full) == canonical_host(host)
    assert is_wildcard(full) == is_wildcard(host)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("", "expected an IP address or a name"),
        (None, "expected an IP address or a name"),
        (5, "expected an IP address or a name"),
        (" ", "a name has ASCII letters"),
        ("127.0.0.1 ", "a name has ASCII letters"),
        ("a b", "a name has ASCII letters"),
        ("localhost\n", "a name has ASCII letters"),
        ("höst", "a name has ASCII letters"),
        ("-host", "a name has ASCII letters"),
        ("a..b", "a name has ASCII letters"),
        ("a" * 64, "a name has ASCII letters"),
        ("*", "a name has ASCII letters"),
        ("%eth0", "a name has ASCII letters"),
        ("127.0.0.1:80", "only the host"),
        ("host:80", "only the host"),
        ("[::1]", r"without brackets, '::1'"),
        ("tcp://127.0.0.1", "it is neither"),
        ("10.0.0.0/8", "it is neither"),
        ("::1::", "it is neither"),
        (":::", "it is neither"),
        ("1:2:3", "it is neither"),
        ("256.0.0.1", "four numbers"),
        ("127.1", "four numbers"),
        ("10.0.0", "four numbers"),
        ("010.0.0.1", "four numbers"),
        ("2130706433", "four numbers"),
        ("0x7f000001", "four numbers"),
        ("224.0.0.1", "multicast or broadcast"),
        ("ff02::1", "multicast or broadcast"),
        ("255.255.255.255", "multicast or broadcast"),
        (LINK_LOCAL, f"which needs its zone; expected one, as in '{LINK_LOCAL}%eth0'"),
        (f"{LINK_LOCAL}%", "it is neither"),
        (f"{LINK_LOCAL}%a b", "the name of a network interface"),
        ("::1%lo", "a zone is for link-local"),
    ],
)
def test_a_host_that_cannot_be_is_refused_with_what_is_expected(host, words):
    with pytest.raises(InvalidAddress, match=words):
        check_host(host)
    with pytest.raises(InvalidAddress, match=words):
        RpcServer(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0:0::0", "::ffff:0.0.0.0"])
def test_a_wildcard_may_be_bound_and_nobody_is_told_it_or_dials_it(host):
    # Known elsewhere: dynamo #12026, SGLang #21704.
    check_host(host)
    with pytest.raises(InvalidAddress, match="so peers cannot connect to it; expected one that they can use"):
        check_peer_host(host)
    with pytest.raises(InvalidAddress, match=r"on the same machine use (127\.0\.0\.1|\[::1\]):80"):
        RpcClient(format_address(host, 80))


def test_a_zone_is_of_one_machine_so_no_other_is_told_it():
    check_host(f"{LINK_LOCAL}%eth0")
    assert parse_address(f"[{LINK_LOCAL}%eth0]:80") == (f"{LINK_LOCAL}%eth0", 80)
    with pytest.raises(InvalidAddress, match="'eth0' means something else on each machine"):
        check_peer_host(f"{LINK_LOCAL}%eth0")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "fd00::2", "node-3", "pod_1.svc.local", "a.b."])
def test_what_others_can_reach_is_accepted(host):
    check_peer_host(host)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "HOST:PORT"), ("5550", "HOST:PORT"), ("host", "HOST:PORT"), ("host:", "HOST:PORT"),
        ("host:0", "from 1 to 65535"), ("host:65536", "from 1 to 65535"), ("host:-1", "HOST:PORT"),
        ("host:1e3", "HOST:PORT"), ("host: 80", "HOST:PORT"), ("host:²", "HOST:PORT"), ("host:٣", "HOST:PORT"),
        ("host:" + "9" * 5000, "HOST:PORT"), ("[::1]", "HOST:PORT"), ("[::1]80", "HOST:PORT"), ("[::1:80", "HOST:PORT"),
        ("::1]:80", "HOST:PORT"), ("[[::1]]:80", "HOST:PORT"), ("::1", "IPv6 host, which needs them"),
        ("::1:80", "IPv6 host, which needs them"), ("fd00::2:5550", "which needs them"), ("[host]:80", "IPv6 host"),
        ("[127.0.0.1]:80", "IPv6 host"), (":80", "HOST:PORT"), ("[]:80", "HOST:PORT"),
        ("tcp://host:80", "HOST:PORT"), ("http://[::1]:80", "HOST:PORT"), ("a b:80", "its host is 'a b'"),
        ("host:80/path", "HOST:PORT"), ("host:80\n", "HOST:PORT"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_is_refused_with_what_is_expected(text, words):
    with pytest.raises(InvalidAddress, match=words):
        parse_address(text)
    with pytest.raises(InvalidAddress, match=words):
        RpcClient(text)


@pytest.mark.parametrize(
    ("host", "dialled"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("127.0.0.1", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        pytest.param("::1", "::1", marks=pytest.mark.ipv6),
        pytest.param("0:0:0:0:0:0:0:1", "::1", marks=pytest.mark.ipv6),
        pytest.param("::", "::1", marks=pytest.mark.ipv6),
        pytest.param("::", "127.0.0.1", marks=pytest.mark.ipv6),
    ],
)
async def test_a_server_is_reached_by_every_kind_of_address(rpc, start, connect, host, dialled):
    # Known elsewhere: vLLM #42149, LMCache #5043.
    server = RpcServer(host)
    server.serve(rpc.CALL, _same)
    await start(server)
    assert server.address == format_address(host, server.port)
    client = await connect(format_address(dialled, server.port))
    assert await client.call(rpc.CALL, rpc.Ask(7), timeout_s=20) == rpc.Ask(7)


async def test_a_name_that_nobody_knows_is_told_by_a_server_and_waited_for_by_a_client(connect):
    with pytest.raises(OSError, match=r"cannot serve on no-such-host\.invalid:0: "):
        await RpcServer("no-such-host.invalid").start()
    await connect("no-such-host.invalid:80")


async def test_a_client_that_is_closed_while_its_name_is_looked_up_leaves_nothing(rpc):
    before = asyncio.all_tasks()
    client = RpcClient("localhost:1")
    starting = asyncio.create_task(client.start())
    await asyncio.sleep(0)
    assert not starting.done()
    await client.close()
    await starting
    assert asyncio.all_tasks() == before
    with pytest.raises(PeerLost, match="is not started"):
        client.notify(rpc.TELL, rpc.Ask())


async def _same(ask):
    return ask


async def test_a_name_that_does_not_resolve_is_said_so_and_not_only_that_there_is_no_answer(rpc):
    async with RpcClient("nobody.invalid:5550") as client:
        with pytest.raises(RpcTimeout, match=r"no answer to .*; the name 'nobody\.invalid' does not resolve: "):
            await client.call(rpc.CALL, rpc.Ask(7), timeout_s=0.2)


def test_without_a_file_to_ask_the_system_with_only_the_loopback_is_known_to_be_this_host():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        trusted = [Peer(b"", None, address).is_trusted for address in ("127.0.0.1", "::1", "192.0.2.1")]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert trusted == [True, True, False]

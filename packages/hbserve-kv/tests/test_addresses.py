"""KV between addresses of every kind that works, and words for each that does not."""

import asyncio
import os
import socket
import subprocess
import sys

import msgspec
import pytest
import torch
from hbserve_kv_layouts import layout_of

from hbserve_kv import AddressNotAvailable, BackendUnavailable, KVTransferConfig, Outcome, TransferFailed
from hbserve_kv.memory.layout import HeadRange
from hbserve_kv.protocol import messages
from hbserve_kv.protocol.handshake import Identity, common_heads
from hbserve_kv.protocol.messages import Grant, Handshake, join_grants
from hbserve_rpc import InvalidAddress, InvalidRequest


async def move(sender, receiver) -> None:
    sender._memory.pool[3] = 7
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([3], 0)
    assert (await transfer.commit(b"")).outcome is Outcome.COMPLETED
    assert (await posted.wait()).outcome is Outcome.COMPLETED
    assert torch.equal(receiver._memory.pool[1], sender._memory.pool[3])


@pytest.mark.ipv6
@pytest.mark.parametrize("backend", ["nccl", "ipc", "auto"])
async def test_kv_moves_between_ipv6_addresses(backend, managers):
    # Known elsewhere: vLLM #42149, SGLang #7858.
    sender, receiver = await managers(0, backend, host="::1"), await managers(1, backend, host="0:0:0:0:0:0:0:1")
    assert sender.address.startswith("[::1]:")
    await move(sender, receiver)


MOONCAKE = """
import asyncio, sys, torch
from conftest import make_manager
from test_addresses import move
async def main():
    managers = [make_manager(rank, "mooncake", host=sys.argv[1]) for rank in (0, 1)]
    for manager in managers:
        await manager.start()
    await move(*managers)
    for manager in managers:
        await manager.close()
asyncio.run(main())
"""


@pytest.mark.ipv6
@pytest.mark.warm
@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_mooncake_moves_kv_between_addresses_of_either_version(host, request):
    # Known elsewhere: Mooncake #470. A process of its own, because Mooncake chooses one version when it is imported.
    pytest.importorskip("mooncake.engine", reason="Mooncake or its system libraries are missing", exc_type=ImportError)
    done = subprocess.run(
        [sys.executable, "-c", MOONCAKE, host], cwd=request.path.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_mooncake_for_the_other_version_of_ip_says_what_to_set(monkeypatch):
    from hbserve_kv.transports.mooncake.setup import choose_ip_version

    monkeypatch.setitem(sys.modules, "mooncake.engine", os)  # it is there already
    monkeypatch.delenv("MC_USE_IPV6", raising=False)
    assert choose_ip_version("127.0.0.1") == 4
    with pytest.raises(BackendUnavailable, match="uses IPv4 in this process, and ::1 is IPv6: set MC_USE_IPV6=1"):
        choose_ip_version("::1")
    monkeypatch.setenv("MC_USE_IPV6", "1")
    assert choose_ip_version("::1") == 6
    with pytest.raises(BackendUnavailable, match=r"uses IPv6 in this process, and 127\.0\.0\.1 is IPv4: unset"):
        choose_ip_version("127.0.0.1")
    with pytest.raises(BackendUnavailable, match="Mooncake cannot serve on '::': means every address"):
        choose_ip_version("::")


def test_mooncake_refuses_a_name_that_has_ipv6_addresses_only_at_start_with_the_cure(monkeypatch):
    from hbserve_kv.transports.mooncake.setup import choose_ip_version

    families = [socket.AF_INET6]
    places = lambda *_, **__: [(family, 1, 6, "", ("fd00::7", 0, 0, 0)) for family in families]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", places)
    monkeypatch.delenv("MC_USE_IPV6", raising=False)
    with pytest.raises(BackendUnavailable, match="'six' has none but fd00::7: expected that address instead"):
        choose_ip_version("six")
    families.append(socket.AF_INET)
    assert choose_ip_version("both") == 4


@pytest.mark.ipv6
async def test_addresses_of_both_versions_of_ip_are_refused_by_nccl_with_both(managers):
    sender, receiver = await managers(0, "nccl", host="127.0.0.1"), await managers(1, "nccl", host="::1")
    posted = receiver.post_receive("t", [1])
    with pytest.raises(TransferFailed, match="one address is IPv4, the other IPv6; Gloo needs the same"):
        await sender.open_send("t", posted.grant)
    await posted.cancel("test over")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", pytest.param("::1", marks=pytest.mark.ipv6)])
async def test_every_address_that_peers_can_be_told_is_accepted_and_reached(host, managers):
    KVTransferConfig(host=host).check_host()
    await move(await managers(0, "nccl", host=host), await managers(1, "nccl", host=host))


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("0.0.0.0", "means every address of a machine, so peers cannot connect to it"),
        ("::", "means every address of a machine"),
        ("fe80::1%eth0", "means something else on each machine"),
        ("fe80::1", "which needs its zone"),
        ("[::1]", "without brackets"),
        ("127.0.0.1:80", "only the host"),
        ("", "expected an IP address or a name"),
        ("a b", "a name has ASCII letters"),
        ("2001:db8::1", "this machine does not have it"),
    ],
)
async def test_an_address_that_no_peer_could_reach_is_refused_at_start(host, words, managers):
    """2001:db8::/32 is nobody's, by RFC 3849."""
    # Known elsewhere: dynamo #12026, SGLang #21704.
    with pytest.raises(AddressNotAvailable, match=words) as caught:
        KVTransferConfig(host=host).check_host()
    assert str(caught.value).startswith(f"kv_transfer.ip={host!r}: ")


@pytest.mark.parametrize("address", ["", "nowhere", "::1:80", "0.0.0.0:80", "a b:80", "host:99999"])
async def test_an_address_that_came_from_elsewhere_and_is_none_fails_what_it_came_with_and_nothing_else(
    address, managers
):
    sender, receiver = await managers(0, "nccl"), await managers(1, "nccl")
    grant = msgspec.msgpack.encode(Grant("t", address, receiver.epoch, receiver.heads))
    with pytest.raises(TransferFailed, match="transfer t: no connection to '"):
        await sender.open_send("t", grant)
    with pytest.raises(InvalidAddress):
        sender.add_peer(1, address)
    await move(sender, receiver)


@pytest.mark.parametrize("address", ["", "nowhere", "::1:80", "0.0.0.0:80"])
def test_a_sender_that_could_not_be_asked_what_it_writes_is_refused(address):
    me = Identity(0, "e", {"m": "m"}, HeadRange(), layout_of())
    hello = Handshake(messages.PROTOCOL_VERSION, 1, "f", address, me.fingerprint, me.heads, me.layout, {}, "l")
    with pytest.raises(InvalidRequest, match=f"address='{address}': "):
        common_heads(hello, me)
    assert common_heads(msgspec.structs.replace(hello, address="[::1]:80"), me)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("protocol_version", 0, f"protocol of hbserve_kv is 0 on rank 1 and {messages.PROTOCOL_VERSION} on rank 0"),
        ("fingerprint", {"m": "other"}, "m is 'other' on rank 1 and 'm' on rank 0"),
        ("fingerprint", {"m": "m", "more": 1}, "more is 1 on rank 1 and None on rank 0"),
        ("heads", HeadRange(1, 1, 2), "num_kv_heads is 2 on rank 1 and 1 on rank 0"),
        ("layout", layout_of(num_heads=2), "heads of its pool is 2 on rank 1 and 1 on rank 1"),
    ],
)
def test_a_sender_whose_kv_means_something_else_is_refused_by_what_differs_first(field, value, named):
    me = Identity(0, "e", {"m": "m"}, HeadRange(), layout_of())
    hello = Handshake(messages.PROTOCOL_VERSION, 1, "f", "127.0.0.1:80", me.fingerprint, me.heads, me.layout, {}, "l")
    assert common_heads(hello, me)
    with pytest.raises(InvalidRequest, match=f"FingerprintMismatch: {named}"):
        common_heads(msgspec.structs.replace(hello, **{field: value}), me)


async def test_a_grant_that_is_none_is_refused_as_one(managers):
    sender = await managers(0, "ipc")
    for junk in (b"", b"\xc1", b"junk", b"\x80"):
        with pytest.raises(TransferFailed, match="not a grant"):
            await sender.open_link(junk)
        with pytest.raises(TransferFailed, match="not a grant"):
            await sender.open_send("t", junk)
    for of_nobody in ([], join_grants([]), [join_grants([]), join_grants([])]):
        async with asyncio.timeout(10):
            with pytest.raises(TransferFailed, match="transfer t: its grant names no receiver"):
                await sender.open_send("t", of_nobody)

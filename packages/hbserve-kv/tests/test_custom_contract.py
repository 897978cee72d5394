"""Backends of somebody else that do not do what KVTransferBase asks for: told which method, and what it must return."""

import asyncio
import socket
from typing import ClassVar

import pytest
import torch

from hbserve_kv import BackendUnavailable, KVTransferBase, TransferFailed


class Passes(KVTransferBase):
    """As an editor makes it from the base class."""

    async def send_kv_cache(self, request_id, kv_buffer, target_rank):
        pass

    async def receive_kv_cache(self, request_id, source_rank):
        pass


class NotAsync(Passes):
    def receive_kv_cache(self, request_id, source_rank):
        return torch.zeros(1)


class SendsNotAsync(Passes):
    def send_kv_cache(self, request_id, kv_buffer, target_rank):
        pass

    async def receive_kv_cache(self, request_id, source_rank):
        await asyncio.Event().wait()  # or its own mistake might be heard first


class TooShort(Passes):
    async def receive_kv_cache(self, request_id, source_rank):
        return torch.zeros(3)


class AList(Passes):
    async def receive_kv_cache(self, request_id, source_rank):
        return [1, 2]


class DescribesByText(Passes):
    opened: ClassVar[list[socket.socket]] = []

    async def start(self):
        self.opened.append(socket.create_server(("127.0.0.1", 0)))

    async def close(self):
        self.opened[-1].close()

    def describe(self):
        return "10.0.0.1"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            Passes,
            r"Passes\.receive_kv_cache\('t:0:\w+', 0\) returned None; it must return the torch.Tensor of 1536 bytes",
        ),
        (AList, r"AList\.receive_kv_cache\(.*\) returned \[1, 2\]; it must return the torch.Tensor of 1536 bytes"),
        (
            TooShort,
            r"returned a tensor of 12 bytes; it must return the torch.Tensor of 1536 bytes that send_kv_cache got",
        ),
        (
            NotAsync,
            r"NotAsync\.receive_kv_cache returned tensor\(.*\), which is not a coroutine; write it with `async def`",
        ),
        (
            SendsNotAsync,
            r"SendsNotAsync\.send_kv_cache returned None, which is not a coroutine; write it with `async def`",
        ),
    ],
)
async def test_a_transfer_by_a_backend_that_breaks_the_contract_fails_with_what_it_must_do(kind, words, managers):
    # Known elsewhere: vLLM #37265.
    sender, receiver = [await managers(rank, f"{kind.__module__}:{kind.__name__}") for rank in (0, 1)]
    posted = receiver.post_receive("t", [1])
    transfer = await sender.open_send("t", posted.grant)
    transfer.push([3], 0)
    sent = await transfer.commit(b"")
    result = await posted.wait()
    assert sent.outcome is not sent.outcome.COMPLETED
    with pytest.raises(TransferFailed, match=words):
        raise TransferFailed(f"{sent.error}; {result.error}")


async def test_a_backend_that_describes_itself_by_no_bytes_is_refused_at_start(managers):
    with pytest.raises(BackendUnavailable, match=r"describe\(\) returned '10\.0\.0\.1'; it must return bytes"):
        await managers(0, f"{__name__}:DescribesByText")
    assert DescribesByText.opened.pop().fileno() == -1, "what it had opened is closed"

"""One ZeroMQ context for all clients of a process: what many of them cost, and that it ends with the last one."""

import asyncio
import os
import subprocess
import sys

import pytest
import zmq

from hbserve_rpc import RpcClient
from hbserve_rpc.message_socket import CLIENTS, MessageSocket, SharedContext

NUM_CLIENTS = 40


def counted(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))


async def test_many_clients_need_no_more_threads_than_one_and_three_files_each(start, connect):
    one = await connect("127.0.0.1:9")
    threads, files = counted("task"), counted("fd")
    for _ in range(NUM_CLIENTS):
        await connect("127.0.0.1:9")
    assert counted("task") == threads
    assert counted("fd") - files <= 4 * NUM_CLIENTS  # one more while it connects
    await one.close()


async def test_the_context_ends_with_the_last_client_and_the_next_one_has_another():
    before = counted("task"), counted("fd")
    for _ in range(2):
        clients = [RpcClient("127.0.0.1:9") for _ in range(3)]
        for client in clients:
            await client.start()
        assert counted("task") > before[0]
        for client in clients:
            await client.close()
        async with asyncio.timeout(20):
            while (counted("task"), counted("fd")) != before:
                await asyncio.sleep(0.01)
    assert CLIENTS._context is None


def test_a_context_has_room_for_as_many_sockets_as_zeromq_allows():
    context, user = SharedContext(), object()
    made = context.enter(user)
    assert made.get(zmq.MAX_SOCKETS) == made.get(zmq.SOCKET_LIMIT) > 60000
    context.leave(user)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_a_context_of_its_own_and_leaves_its_parents_alone():
    context, user = SharedContext(), object()
    made = context.enter(user)
    pid = os.fork()
    if pid == 0:
        context.leave(user)
        is_new = context.enter(user) is not made
        os._exit(0 if is_new and not made.closed else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert context.enter(user) is made
    context.leave(user)


END = """
import asyncio, sys
from hbserve_rpc import RpcClient
kept = []
async def main():
    for number in range(3):
        client = RpcClient("127.0.0.1:9")
        await client.start()
        if number or sys.argv[1] == "kept":
            kept.append(client)
    await asyncio.sleep(0.05)
asyncio.run(main())
"""


@pytest.mark.parametrize("some", ["kept", "collected"])
def test_clients_that_were_never_closed_do_not_keep_their_process(some):
    subprocess.run([sys.executable, "-c", END, some], check=True, timeout=60)


async def test_a_client_is_watched_by_a_name_that_no_client_before_it_has_left():
    """ZeroMQ ends sockets a moment after they are closed. pyzmq names what it watches one with by its file number,
    which the next one has by then."""
    context, user = SharedContext(), object()
    ending = context.enter(user).socket(zmq.PAIR)

    class AfterAnother(MessageSocket):
        def _watch(self, on_event):
            ending.bind(f"inproc://monitor.s-{self._socket.FD}")
            super()._watch(on_event)

    socket = AfterAnother(zmq.DEALER, {}, lambda frames: None, context)
    socket.open(lambda socket: socket.connect("tcp://127.0.0.1:9"), on_event=lambda event: None)
    ending.close()
    socket.close()
    context.leave(user)

"""A name server and instances on one host of several addresses, as a cluster has them behind a headless Service.

    python hbserve_pods.py NAME HOST PORT POD_HOST...

The name server is at HOST. Each line of stdin is what it says of NAME from then on: addresses, or an error such as
NXDOMAIN; each is answered by a line on stdout, when the name has been looked up a few times since. There are no other
names.
"""

import asyncio
import socket
import struct
import sys

from conftest import FakeInstance

NO_ERROR, ERRORS = 0, {"SERVFAIL": 2, "NXDOMAIN": 3}
A, IN = 1, 1
HEADER = struct.Struct(">6H")
A_FEW = 5
AUTHORITATIVE = 0x8400


class NameServer(asyncio.DatagramProtocol):
    """Answers questions for IPv4 addresses of one name, and that there are none of another kind."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.says: list[str] = []
        self.num_asked = 0
        self.asked = asyncio.Event()
        """Set at each question for its addresses."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        number, flags, *_ = HEADER.unpack_from(data)
        name, end = self._read_name(data)
        (kind,) = struct.unpack_from(">H", data, end)
        code, found = NO_ERROR, []
        if name == self._name and kind == A:
            self.num_asked += 1
            self.asked.set()
        if name != self._name or not self.says:
            code = ERRORS["NXDOMAIN"]
        elif self.says[0] in ERRORS:
            code = ERRORS[self.says[0]]
        elif kind == A:
            found = self.says
        answers = [struct.pack(">HHHIH", 0xC000 | HEADER.size, A, IN, 0, 4) + socket.inet_aton(each) for each in found]
        header = HEADER.pack(number, AUTHORITATIVE | flags & 0x0100 | code, 1, len(answers), 0, 0)
        self._transport.sendto(header + data[HEADER.size : end + 4] + b"".join(answers), address)  # type: ignore[attr-defined]

    @staticmethod
    def _read_name(data: bytes) -> tuple[str, int]:
        """Of the question, and where it ends."""
        labels, place = [], HEADER.size
        while length := data[place]:
            labels.append(data[place + 1 : place + 1 + length].decode())
            place += 1 + length
        return ".".join(labels).lower(), place + 1


async def main(name: str, host: str, port: int, pod_hosts: list[str]) -> None:
    loop = asyncio.get_running_loop()
    _, server = await loop.create_datagram_endpoint(lambda: NameServer(name), (host, 53))
    pods = [FakeInstance("hybrid", f"pod-{number}", [], pod, port) for number, pod in enumerate(pod_hosts, 1)]
    for each in pods:
        await each.server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        server.says, server.num_asked = line.split(), 0
        while server.num_asked < A_FEW:
            server.asked.clear()
            await server.asked.wait()
        sys.stdout.write("said\n")
        sys.stdout.flush()
    for each in pods:
        await each.server.stop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]))

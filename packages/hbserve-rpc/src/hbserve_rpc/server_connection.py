"""The connection of a client to its server: how it is made, remade, refused, and tried with another key."""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from hbserve_rpc import wire
from hbserve_rpc.keys import Keys, Party
from hbserve_rpc.message_socket import CLIENTS, MessageSocket

AGAIN_S = 0.2
"""Pause before another key is tried, or before a server that has refused this side is tried again."""
CONNECT_TIMEOUT_S = 2.0
"""How long one attempt to connect may take. The kernel's own goes on for minutes, and tries less and less often."""
MOST_HUNG_UP = 3
"""Number of handshakes in a row that count as a refusal if the server breaks them off, per key that it may have."""


class ServerConnection:
    """A client's connection to its server, which is remade by itself until it is closed. It belongs to the event loop
    that ran `open`.

    Messages that are sent before there is a connection wait for it. A short break of the network loses nothing.
    """

    def __init__(
        self,
        address: str,
        keys: Keys | None,
        server: Party,
        on_message: Callable[[list[bytes]], None],
        on_change: Callable[[], None],
    ) -> None:
        """Make a connection that is not open yet. on_change: called when `is_there` or `refusal` has changed, and maybe
        again while there is no connection."""
        self._endpoint = f"tcp://{address}"
        self._keys = keys
        self._server_keys = deque(keys.public_keys[server] if keys else ())
        """Public keys that the server may have, one or two; the first of them is tried."""
        self._on_change = on_change
        options: dict[int, int | bytes] = {
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 500,
            zmq.CONNECT_TIMEOUT: int(CONNECT_TIMEOUT_S * 1000),
            zmq.IDENTITY: uuid.uuid4().bytes,  # the same after a reconnect by ZeroMQ
        }
        self.socket = MessageSocket(zmq.DEALER, options, on_message, CLIENTS)
        self.is_there = False
        self.refusal = ""
        """Reason why the server does not let this side in; "" while no refusal is known."""
        self._unheard: list[Sequence[bytes]] = []
        """Messages sent while there is no connection but another key to try. They are lost, and sent again with it."""
        self._num_hung_up = 0
        """Number of handshakes in a row that the server has broken off."""
        self._again: asyncio.TimerHandle | None = None

    def open(self, timeout_s: float, *, uses_ipv6: bool) -> None:
        """Open the connection. timeout_s: how long the server's host may acknowledge nothing before another one is
        made: over the old one a network that is back would be tried again only after as long as it was lost."""
        most_ms = max(1, int(min(timeout_s, wire.LONGEST_SILENCE_S) * 1000))
        options = {zmq.IPV6: int(uses_ipv6), zmq.TCP_MAXRT: most_ms} | self._key_options()
        self.socket.open(lambda socket: socket.connect(self._endpoint), options, self._happened)

    def send(self, frames: Sequence[bytes]) -> None:
        if not self.is_there and len(self._server_keys) > 1:
            self._unheard.append(frames)
        self.socket.send(frames)

    def stop(self) -> None:
        """Stop reporting events and trying to connect."""
        self.socket.stop_reading()
        self._try_no_more()

    def _key_options(self) -> dict[int, int | bytes]:
        return self._keys.client_options(self._server_keys[0]) if self._keys else {}

    def _happened(self, event: int) -> None:
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._num_hung_up, self._unheard = 0, []
                self._try_no_more()
                self._set(is_there=True)
            case zmq.EVENT_DISCONNECTED:
                self._set(is_there=False, refusal=self.refusal)
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refused("it accepts connections by keys, and this side's is none of those")
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if self._keys:
                self._refused("it has no keys, as this side has, or is no server of HBServe")
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refused("it accepts connections by keys, and this side has none; or it is no server of HBServe")
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._hung_up()

    def _set(self, *, is_there: bool, refusal: str = "") -> None:
        self.is_there, self.refusal = is_there, refusal
        self._on_change()

    def _hung_up(self) -> None:
        """Handle that the connection ended during a handshake: the server has ended, or it breaks off handshakes with
        clients that know another key of it, or none."""
        self._num_hung_up += 1
        if self._num_hung_up >= MOST_HUNG_UP * max(1, len(self._server_keys)):
            self._refused(
                "it ends each handshake, as one does that has another key than this side knows, or needs one, "
                "or that is no server of HBServe's RPC, such as one of HTTP"
            )
        elif len(self._server_keys) > 1 and self._again is None:
            self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._try_next_key)

    def _refused(self, why: str) -> None:
        """Report the refusal, and try again later: the server may be restarted with other keys. ZeroMQ itself does not
        try again."""
        self._num_hung_up = 0
        self._try_no_more()
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._try_again)
        self._set(is_there=False, refusal=f"does not let this side in: {why}")

    def _try_no_more(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _try_again(self) -> None:
        self._again, self._unheard = None, []
        self._connect_again()
        self._set(is_there=False)

    def _try_next_key(self) -> None:
        self._again = None
        self._server_keys.rotate(-1)
        self._connect_again()
        for frames in self._unheard:
            self.socket.send(frames)

    def _connect_again(self) -> None:
        """Connect again with another identity. The earlier connection may still be in a handshake: with the same
        identity the server could let it in after the new one, take it for a reconnect of the new one, and stop reading
        the new one, which stays open."""
        self.socket.connect_again(self._endpoint, {zmq.IDENTITY: uuid.uuid4().bytes} | self._key_options())

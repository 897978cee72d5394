"""The part of a server that decides who may connect, and as which party (ZAP, ZeroMQ's authentication protocol)."""

import logging
from collections.abc import Collection

import zmq
from zmq.utils import z85

from hbserve_rpc.keys import Keys, Party
from hbserve_rpc.message_socket import Complaints, MessageSocket, SharedContext

logger = logging.getLogger(__name__)

ENDPOINT = "inproc://zeromq.zap.01"
NUM_FRAMES = 9
"""Number of frames in a ZAP request: who asks, nothing, version, id, domain, address, routing id, mechanism, public
key."""


class Doorkeeper:
    """Authenticator that lets in whoever has a key of an allowed party.

    It must be in the ZeroMQ context of the server's socket, and be open before that socket binds. ZeroMQ asks it in the
    middle of each handshake. Whoever is not let in has learned nothing but that keys are needed.
    """

    def __init__(self, keys: Keys, allows: Collection[Party], context: SharedContext) -> None:
        self._parties = {z85.decode(key): party for party in allows for key in keys.public_keys[party]}
        self._complaints = Complaints(logger)
        self._socket = MessageSocket(zmq.ROUTER, {}, self._answer, context)

    def open(self) -> None:
        self._socket.open(lambda socket: socket.bind(ENDPOINT))

    def close(self) -> None:
        self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        if len(frames) != NUM_FRAMES:  # from a mechanism without keys, which the server's socket does not have
            logger.error("a request of %d frames about who may connect", len(frames))
            return
        asks, nothing, version, id_, _, address, _, _, key = frames
        party = self._parties.get(key)
        if party is None:
            self._complaints.add(
                "refused a connection from %s: its key is none of those that may connect",
                address.decode(errors="replace"),
            )
        status, text = (b"200", b"OK") if party else (b"400", b"no such key")
        self._socket.send([asks, nothing, version, id_, status, text, (party or "").encode(), b""])

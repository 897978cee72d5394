"""Frames between an RpcClient and an RpcServer: an envelope and a body, one ZeroMQ frame each.

    client                                     server
      Hello(version, oldest)     ──────▶
                                 ◀──────       Welcome(version, epoch), or Refused(version)
      Call(id, method) + request ──────▶
                                 ◀──────       Reply(id) + reply, or Failed(id, code, message)
      Notify(id, method) + request ────▶       nothing comes back
      Open(id, method, trace) + request ─▶
                                 ◀──────       Items[(id, number, item) …]: of all streams, what one turn of the
                                               server's loop brought; of each no more than it was given credit for
      Credits[(id, count) …]     ──────▶       likewise
      Close(id)                  ──────▶       stop the call or stream; nothing more comes
                                 ◀──────       End(id, count), or Failed(id, code, message)
      Ping                       ──────▶
                                 ◀──────       Pong; also unasked, to see whether the client is still connected
      Goodbye                    ──────▶       it ends in order: what it asked is not wanted any more
                                 ◀──────       Goodbye: it ends in order, and what was asked of it is lost
Each envelope from the server has its epoch. A server that gets anything but a Hello from a client it does not know
answers UnknownClient with the id of that message: it was restarted, and the client's requests up to that id are lost.
Later requests, sent after the Hello that an UnknownClient causes, are not.

The handlers of one client's calls, notifications and streams begin in the order in which it sent them.
"""

from typing import Annotated, Any

import msgspec

from hbserve_rpc.errors import (
    EngineFailed,
    HBServeRpcError,
    InvalidRequest,
    KVTransferFailed,
    LogitsNotFinite,
    Overloaded,
    RemoteError,
    RequestTimeout,
    Unavailable,
)
from hbserve_rpc.plain_values import one_line
from hbserve_rpc.trace_context import Traceparent

PROTOCOL_VERSION = 8
OLDEST_VERSION = 8
"""Oldest version that this side speaks. A release also speaks the previous release's version, so that a deployment can
be replaced process by process; nothing has been released yet."""
CREDIT = 64
"""Number of items that may be on their way in one stream."""
MOST_FRAME_BYTES = 64 << 20
"""Largest size of a frame. Whoever sends a larger one is disconnected before it is read. The log-probabilities of a
prompt of 100,000 tokens are 30 MB; keys and values do not go this way."""
LONGEST_SILENCE_S = 3600.0
"""Longest silence that a client may ask to be allowed. Its requests are kept that long after it is gone."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    version: int
    heartbeat_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=LONGEST_SILENCE_S)]
    """Time of silence after which the client's streams end."""
    oldest: int = 0
    """Oldest version that the client speaks; 0: only `version`. The server accepts any version in between, because it
    may be the older side. Differences are then left to fields with defaults, and to methods that are not served."""

    def is_understood(self) -> bool:
        return self.version >= OLDEST_VERSION and (self.oldest or self.version) <= PROTOCOL_VERSION


class Call(msgspec.Struct, frozen=True, tag=True):
    id: int
    method: str


class Notify(msgspec.Struct, frozen=True, tag=True):
    id: int
    method: str


class Open(msgspec.Struct, frozen=True, tag=True):
    id: int
    method: str
    traceparent: Traceparent = ""
    """Trace that the stream belongs to."""


class Credits(msgspec.Struct, frozen=True, tag=True):
    id: int
    """Id of this message: see `Ping.id`."""
    counts: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=1 << 16)]
    """Pairs of (stream, additional items)."""


class Close(msgspec.Struct, frozen=True, tag=True):
    id: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    id: int = 0
    """Id of this message, from the same counter as the ids of calls, notifications and streams."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """Message that either side sends when it ends in order. A process that dies sends none, but its connection ends:
    see `RpcClient`."""

    epoch: str = ""
    """Epoch of the server, if it sends this."""
    id: int = 0
    """Id of this message, as in a Ping, if the client sends it."""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    version: int
    epoch: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    version: int
    epoch: str


class UnknownClient(msgspec.Struct, frozen=True, tag=True):
    epoch: str
    id: int
    """Id of the message that came from an unknown client."""


class Pong(msgspec.Struct, frozen=True, tag=True):
    epoch: str


class Reply(msgspec.Struct, frozen=True, tag=True):
    epoch: str
    id: int


class Items(msgspec.Struct, frozen=True, tag=True):
    epoch: str
    items: list[tuple[int, int, msgspec.Raw]]
    """Items as (stream, number within it, item). Numbers are 0, 1, 2 …: a gap means that a frame was lost."""


class End(msgspec.Struct, frozen=True, tag=True):
    epoch: str
    id: int
    count: int | None = None
    """Number of the stream's items. An older server does not send it; then a stream that has lost its last items ends
    as if it were complete."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    epoch: str
    id: int
    code: str
    message: str
    retry_after_s: float = 0.0
    """Value of an Overloaded; 0 for other errors."""


FromClient = Hello | Call | Notify | Open | Credits | Close | Ping | Goodbye
FromServer = Welcome | Refused | UnknownClient | Pong | Reply | Items | End | Failed | Goodbye

encode = msgspec.msgpack.Encoder().encode
decode_from_client: Any = msgspec.msgpack.Decoder(FromClient).decode
decode_from_server: Any = msgspec.msgpack.Decoder(FromServer).decode

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Errors that decoding raises for unexpected bytes: for example for text that is not UTF-8, or for data that is nested
thousands deep, even in a field that nobody reads."""

_CROSS_UNCHANGED: dict[str, type[HBServeRpcError]] = {
    error.code: error
    for error in (EngineFailed, InvalidRequest, KVTransferFailed, LogitsNotFinite, RequestTimeout, Unavailable)
}
LONGEST_RETRY_S = 3600.0
"""Largest `retry_after_s` accepted from a peer. Longer times are cut to this, and invalid ones count as 0."""


def mismatch(theirs: int, what: str) -> str:
    """Return the message about a peer whose version this side does not speak. It says which side to upgrade."""
    here = f"{PROTOCOL_VERSION}" if OLDEST_VERSION == PROTOCOL_VERSION else f"{OLDEST_VERSION} to {PROTOCOL_VERSION}"
    older = "this side" if theirs > PROTOCOL_VERSION else "the other side"
    return f"{what} speaks version {theirs} of the protocol, this side {here}: {older} is older, upgrade hbserve there"


def describe_error(epoch: str, id_: int, error: BaseException) -> Failed:
    """Return the answer to call `id_` for an error that its handler raised."""
    if not isinstance(error, HBServeRpcError):
        return Failed(epoch, id_, RemoteError.code, _sendable(f"{type(error).__name__}: {error}"))
    after_s = error.retry_after_s if isinstance(error, Overloaded) else 0.0
    return Failed(epoch, id_, error.code, _sendable(str(error)), after_s)


def encode_body(body: Any, what: str) -> bytes:
    """Encode a body. Raises InvalidRequest if it is longer than what may be sent."""
    encoded = encode(body)
    if len(encoded) > MOST_FRAME_BYTES:
        raise InvalidRequest(f"{what}: {len(encoded)} bytes; at most {MOST_FRAME_BYTES} can be sent")
    return encoded


def own_pause(before_s: float, now_s: float, slept_s: float) -> float:
    """Return how long this process stood still when it meant to sleep for `slept_s`.

    A process that was frozen, or whose event loop was blocked, has read nothing meanwhile. So that time says nothing
    about its peer.
    """
    late_s = now_s - before_s - slept_s
    return late_s if late_s > slept_s else 0.0


def _sendable(text: str) -> str:
    """Replace lone surrogates, which file names may have, and which would keep the whole answer from being sent."""
    return text.encode(errors="backslashreplace").decode()


def revive_error(failed: Failed) -> HBServeRpcError:
    """Return the caller's error for a Failed, the inverse of `describe_error`. Errors that decide what to do,
    or what to blame, keep their class; any other becomes a RemoteError. Its message is one line."""
    message = one_line(failed.message)
    if failed.code == Overloaded.code:
        after_s = failed.retry_after_s if failed.retry_after_s > 0 else 0.0
        return Overloaded(message, min(after_s, LONGEST_RETRY_S))
    return _CROSS_UNCHANGED.get(failed.code, RemoteError)(message)

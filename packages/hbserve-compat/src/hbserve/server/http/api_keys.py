"""API keys of clients. They come from an option, the environment, and a file that is read again when it changes."""

import hashlib
import hmac
import logging
import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from hbserve.server.http.api_error import ApiError, path_of
from hbserve_scheduler import ConfigError
from hbserve_scheduler.config import ServerSection

logger = logging.getLogger(__name__)

VARIABLE = "HBSERVE_API_KEY"
OPEN_PATHS = {"/", "/health", "/ping", "/version", "/metrics", "/openapi.json", "/dashboard"}
"""Paths that need no key, for probes and for people who look. None of them makes the engines compute."""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def are_asked_for(settings: ServerSection) -> bool:
    return bool(settings.api_key or os.environ.get(VARIABLE) or settings.api_key_file)


class ApiKeys:
    """The keys that are accepted at present. Keeps only their digests."""

    def __init__(self, settings: ServerSection) -> None:
        """Read the keys. Raises ConfigError if a key is not valid, or the file cannot be read or has no key."""
        given = (settings.api_key, os.environ.get(VARIABLE))
        for name, key in zip(("server.api_key", VARIABLE), given, strict=True):
            if key and not (key.strip() == key and key.isprintable()):
                raise ConfigError(
                    f"{name}: begins or ends with white space, or has a line's end: no header could have it"
                )
        self._fixed = [_digest(key) for key in given if key]
        if given[1] is not None and not given[1]:
            logger.warning("%s is set, and empty: it asks for no key", VARIABLE)
        self._path = None if settings.api_key_file is None else Path(os.path.expanduser(settings.api_key_file))
        self._from_file: list[bytes] = []
        self._read_at: tuple[int, ...] | None = None
        self._trouble: str | None = None
        if self._path is not None:
            try:
                self._read(self._path)
            except OSError as error:
                raise ConfigError(f"server.api_key_file={str(self._path)!r}: {error.strerror}") from None
            if not self._fixed and not self._from_file:
                raise ConfigError(f"server.api_key_file={str(self._path)!r}: has no key; expected one on each line")

    def accept(self, key: str) -> bool:
        """Whether a key is accepted. Takes the same time for every key."""
        if self._path is not None:
            self._read_again(self._path)
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, each) for each in [*self._fixed, *self._from_file]]
        return any(matches)

    def _read_again(self, path: Path) -> None:
        trouble = None
        try:
            self._read(path)
        except OSError as error:  # the file is being replaced, perhaps: the previous keys stay
            trouble = error.strerror
        if trouble not in (None, self._trouble):
            logger.warning("keeping the previous API keys: %s: %s", path, trouble)
        self._trouble = trouble

    def _read(self, path: Path) -> None:
        found = path.stat()
        # Two writes within one tick of the system's clock have the same time.
        state = found.st_mtime_ns, found.st_ino, found.st_size
        if state != self._read_at:
            lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            self._from_file = [_digest(line) for line in lines if line and not line.startswith("#")]
            if self._read_at is not None:
                logger.info("%s has changed; it has %d keys now", path, len(self._from_file))
            self._read_at = state


class RequireApiKey:
    """ASGI middleware that refuses requests without an accepted key."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_ask(scope):
            what = "wrong" if _key(HTTPConnection(scope).headers) else "no"
            refusal = ApiError(
                401,
                f"{what} API key: expected the header `Authorization: Bearer KEY`, or `x-api-key: KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await refusal.response(scope)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_ask(self, scope: Scope) -> bool:
        is_open = (path_of(scope).rstrip("/") or "/") in OPEN_PATHS or scope["method"] == "OPTIONS"
        return is_open or self._keys.accept(_key(HTTPConnection(scope).headers))


def _key(headers: Headers) -> str:
    """Return the key as OpenAI's or Anthropic's clients send it; "", which is never accepted, if there is none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "").strip()

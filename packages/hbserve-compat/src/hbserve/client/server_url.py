"""URLs of servers, and checks of what goes into the head of a request."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from hbserve_rpc import InvalidAddress, InvalidRequest
from hbserve_rpc.plain_values import shown


@dataclass(frozen=True)
class ServerUrl:
    """The parts of a URL that a client needs."""

    host: str
    port: int
    is_secure: bool
    authority: str
    """Value of the header Host."""
    path: str
    """Path of the URL, without a slash at its end."""


def parse_url(option: str, url: str) -> ServerUrl:
    """Split the `url` that was given by `option`. A URL without a scheme is http.

    Raises:
        InvalidAddress: this is not the URL of a server.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as error:
        raise InvalidAddress(f"{option}={shown(url)}: expected http://HOST:PORT: {error}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0 or not _is_line(url, spaces=False):
        raise InvalidAddress(f"{option}={shown(url)}: expected http://HOST:PORT")
    is_secure = parts.scheme == "https"
    authority = parts.netloc.rpartition("@")[2]
    return ServerUrl(host, port or (443 if is_secure else 80), is_secure, authority, parts.path.rstrip("/"))


def require_header(option: str, name: str, value: str) -> None:
    """Raise InvalidRequest unless name and value make exactly one line of a request's head."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
        raise InvalidRequest(f"{option}={shown(name)}: is not a header name")
    if not _is_line(value):
        raise InvalidRequest(f"{option}={shown(value)}: expected printable text")


def require_path(option: str, path: str) -> None:
    """Raise InvalidRequest unless a request may ask for this path."""
    if not path.startswith("/") or not path.isascii() or not _is_line(path, spaces=False):
        raise InvalidRequest(f"{option}={shown(path)}: expected a path, such as /v1/completions")


def _is_line(text: str, *, spaces: bool = True) -> bool:
    return text.isprintable() and (spaces or " " not in text)

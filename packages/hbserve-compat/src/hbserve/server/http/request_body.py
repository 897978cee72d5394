"""The JSON body of a request: read up to a limit, decoded, and checked against what an endpoint takes."""

import codecs
import logging
import re
from functools import cache
from typing import Any, TypeVar, get_args

import msgspec
from starlette.requests import Request

from hbserve.server.http.api_error import ApiError
from hbserve_rpc.misfits import what_and_where
from hbserve_rpc.plain_values import shown

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)
IGNORED_HEADER = "x-hbserve-ignored"
HALF_A_CHARACTER = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
"""An escaped half of a surrogate pair without the other half."""
MOST_NAMED = 16
"""Most ignored fields that a response names; its header says how many more there were."""
MOST_REMEMBERED = 256
"""Most names of ignored fields that are logged, and remembered as logged."""


async def read_object(request: Request, most_bytes: int) -> dict[str, Any]:
    """Read a request's body, which must be a JSON object.

    Raises:
        ApiError: 413 if it is too large, 415 if it is compressed, 400 if it is not a JSON object.
    """
    _require_plain(request)
    content = decoded(await _read(request, most_bytes))
    if not isinstance(content, dict):
        raise ApiError(400, f"the body is {'null' if content is None else shown(content)}; expected a JSON object")
    return content


def _require_plain(request: Request) -> None:
    """Check what a body claims to be, so that the error says this, and not that its first byte is no JSON."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        problem = f"content-encoding={shown(encoding)}: is not served; send the body as it is"
        raise ApiError(415, problem, headers={"accept-encoding": "identity"})
    kind = request.headers.get("content-type", "")
    # Programs may send JSON under any type; curl calls it a form. Browsers may not: for a page of another origin, they
    # send anything that is not called JSON without asking the server for permission first.
    if "origin" in request.headers and "json" not in kind:
        raise ApiError(415, f"content-type={shown(kind)}: expected application/json from a browser")


async def _read(request: Request, most_bytes: int) -> bytes:
    refused = ApiError(
        413,
        f"the body is larger than {most_bytes} bytes, which is server.max_body_size",
        headers={"connection": "close"},
    )
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > most_bytes:
        raise refused
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most_bytes:
            raise refused
    return bytes(body)


def decoded(body: bytes) -> Any:
    """Decode JSON; a byte order mark before it is allowed, as Windows programs write one. Raises ApiError: 400, with
    the position where it is not JSON."""
    if not body:
        raise ApiError(400, "the body is empty; expected a JSON object")
    try:
        body.decode()  # for the position: msgspec counts bytes from the beginning of the string in which they are
        return msgspec.json.decode(body.removeprefix(codecs.BOM_UTF8))
    except msgspec.DecodeError as error:
        # Programs may cut text within a character. That is another problem than a body that was cut off.
        if re.search("surrogate|truncated", str(error)) and (half := HALF_A_CHARACTER.search(body)):
            place = f"byte {half.start()} is {half[0].decode()}, half of a surrogate pair"
            raise ApiError(400, f"the body is not Unicode text: {place}") from None
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is {error.object[error.start]:#x}"
        raise ApiError(400, f"the body is not UTF-8 text: {place}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


def converted(content: dict[str, Any], kind: type[T]) -> T:
    """Convert the fields that an endpoint takes to their types. Others are left out: see `ignored_fields`.

    Raises:
        ApiError: (400) a field has another type. Names its path, and what is expected.
    """
    try:
        return msgspec.convert({name: _number(value) for name, value in content.items()}, kind, str_keys=True)
    except msgspec.ValidationError as error:
        what, place = what_and_where(error)
        if place.startswith("`key` in "):
            what, place = f"a key of it: {what[:1].lower()}{what[1:]}", place.removeprefix("`key` in ")
        path = place.strip("`").removeprefix("$").lstrip(".") or None
        if missing := re.search(r"missing required field `(\w+)`", what):
            path = f"{path}.{missing[1]}" if path else missing[1]
        raise ApiError(400, f"{path or 'the body'}: {what[:1].lower()}{what[1:]}", param=path) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep") from None


def _number(value: Any) -> Any:
    """Convert 2.0 to 2. JSON has only one kind of number, and some languages write integers that way."""
    return int(value) if type(value) is float and value.is_integer() else value


def ignored_fields(content: dict[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """Return the names of fields that the body has and the endpoint does not take, such as `odd` or
    `stream_options.odd`. A field that is null counts as absent."""
    names = {name for name, value in content.items() if value is not None} - set(kind.__struct_fields__)
    for name, known in _objects(kind).items():
        if isinstance(inner := content.get(name), dict):
            names |= {f"{name}.{each}" for each, value in inner.items() if value is not None and each not in known}
    return sorted(names)


@cache
def _objects(kind: type[msgspec.Struct]) -> dict[str, tuple[str, ...]]:
    """Return the fields of a body that are themselves objects, with the fields of those."""
    return {
        field.name: each.__struct_fields__
        for field in msgspec.structs.fields(kind)
        for each in get_args(field.type)
        if isinstance(each, type) and issubclass(each, msgspec.Struct)
    }


_logged: set[str] = set()


def ignored_header(names: list[str]) -> dict[str, str]:
    """Return a header that names the fields without effect, and log each name once."""
    if not names:
        return {}
    for name in map(_sanitised, names):
        if name not in _logged and len(_logged) < MOST_REMEMBERED:
            _logged.add(name)
            logger.info("requests have the field %s, which is ignored", name)
    more = [f"+{len(names) - MOST_NAMED}"] if len(names) > MOST_NAMED else []
    return {IGNORED_HEADER: ",".join([*map(_sanitised, names[:MOST_NAMED]), *more])}


def _sanitised(name: str) -> str:
    """Make a field's name safe for a header and a log, because clients may call their fields anything."""
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64])

"""Errors in the formats of OpenAI's and Anthropic's APIs: a status, and a JSON object that says what is wrong."""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from hbserve_core import BrokenTokenizer
from hbserve_rpc import HBServeRpcError, InvalidRequest, Overloaded, RequestTimeout, Unavailable

RETRY_AFTER_S = 1
"""Default of `retry-after`, for clients that are refused for lack of room."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}
ANTHROPIC_PATH = "/v1/messages"
"""Path under which errors have the format of Anthropic's API."""
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal or failure that is reported to a client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        """Name of the field of the body that is wrong; None if it is none of them."""
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str | None) -> dict[str, Any]:
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """Make the response, in the format of the API to which the request's path belongs."""
        is_anthropic = path_of(scope).startswith(ANTHROPIC_PATH)
        request_id = scope.get("state", {}).get("request_id")
        body = self.anthropic_body(request_id) if is_anthropic else self.body()
        return Response(msgspec.json.encode(body), self.status, self.headers, "application/json")


def path_of(scope: Scope) -> str:
    """Return a request's path without `root_path`, the prefix under which a proxy serves us."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Translate errors of the block by `in_names_of_client`, so that they name fields as the client does."""
    try:
        yield
    except Exception as error:
        told = in_names_of_client(error, names)
        if told is error:
            raise
        raise told from error


def in_names_of_client(error: Exception, names: Mapping[str, str]) -> Exception:
    """Translate an error for a client that has other `names` for some fields, or for parts of them, such as
    `field.part`. Returns the error itself if it names none of them."""
    known = as_api_error(error)
    if known is None or not names:
        return error
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    # Not within quotes, which show what the client sent. After its beginning, a message has words that are not fields.
    found = re.compile(rf"(?<![\w.\"'])({words})(?![\w\[])")
    message = found.sub(lambda at: names[at[1]] if at.start() == 0 or "_" in at[1] else at[1], known.message)
    param = known.param and found.sub(lambda at: names[at[1]] if at.start() == 0 else at[1], known.param)
    if (message, param) == (known.message, known.param):
        return error
    return ApiError(known.status, message, param=param, code=known.code, headers=known.headers)


def try_again(message: str, after_s: float = RETRY_AFTER_S, *, code: str = "overloaded") -> ApiError:
    """Make a refusal for lack of room, or because nothing is ready to serve. Clients send such a request again."""
    return ApiError(503, message, code=code, headers={"retry-after": str(max(1, math.ceil(after_s)))})


def as_api_error(error: Exception) -> ApiError | None:
    """Translate an error to one that a client may see. None: the error is a bug."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest | BrokenTokenizer):
        # One of several prompts is `prompt[i]` in the body. Parameters belong to all prompts, so they get no index.
        message = re.sub(r"^prompts(\[\d+\]): prompt\b", r"prompt\1", str(error))
        message = re.sub(r"^prompts\[\d+\]: ", "", message)
        found = re.match(r"\w+(\[\d+\]|\.\w+)*(?=[=:])", message) or re.match(r"\w+", message)
        name = re.sub(r"^prompt\[.*", "prompt", found[0]) if found else None
        if re.search(r"structured_outputs[.:=]", str(error)):  # from an instance, whose name its message begins with
            name = "structured_outputs"
        return ApiError(400, message, param=name)
    if isinstance(error, Overloaded):
        return try_again(str(error), error.retry_after_s)
    if isinstance(error, Unavailable):
        return try_again(str(error), code="not_ready")
    if isinstance(error, RequestTimeout):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, HBServeRpcError):
        return ApiError(500, str(error))
    return None

"""Errors as clients of OpenAI's API expect them: a status, and a JSON object that names what is wrong."""

import math
import re
from typing import Any

import msgspec
from starlette.responses import Response

from hbserve.tokenizer import BrokenTokenizer
from hbserve_rpc import HBServeRpcError, InvalidRequest, Overloaded, RequestTimeout, Unavailable

RETRY_AFTER_S = 1
"""Told to those who are refused for lack of room, unless the refusal has a time of its own."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A refusal or failure, as a client is told."""

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
        """The field of the body that is wrong."""
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(msgspec.json.encode(self.body()), self.status, self.headers, "application/json")


def try_again(message: str, after_s: float = RETRY_AFTER_S, *, code: str = "overloaded") -> ApiError:
    """Refusal for lack of room, or of somebody who is ready: clients send the request again."""
    return ApiError(503, message, code=code, headers={"retry-after": str(max(1, math.ceil(after_s)))})


def as_api_error(error: Exception) -> ApiError | None:
    """The same as a client is told; None: nobody meant it to happen."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest | BrokenTokenizer):
        found = re.match(r"\w+", str(error))
        name = found[0] if found else None
        return ApiError(400, str(error), param="prompt" if name == "prompts" else name)
    if isinstance(error, Overloaded):
        return try_again(str(error), error.retry_after_s)
    if isinstance(error, Unavailable):
        return try_again(str(error), code="not_ready")
    if isinstance(error, RequestTimeout):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, HBServeRpcError):
        return ApiError(500, str(error))
    return None

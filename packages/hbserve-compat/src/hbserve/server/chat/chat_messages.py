"""Messages of a chat request, as chat templates take them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from hbserve.server.http.api_error import ApiError
from hbserve_rpc.plain_values import plain_text, shown

ROLES = ("assistant", "developer", "system", "tool", "user")
SPEAKERS = {"developer", "system", "user"}
"""Roles whose messages must have a content. A tool may have nothing to say, and an assistant may call one instead."""
MOST_MESSAGES = 4096
PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Field that has the text of a content's part, by the part's type. Two types are of the Responses API; vLLM takes them
in chats too, and parts that are only a string."""


def plain_messages(messages: list[dict[str, Any]], paths: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return the messages with their content as one text, whatever form it had, and the rest unchanged. `paths` names
    them in errors.

    Raises:
        ApiError: 400, names the message and its field.
        InvalidRequest: a text is not Unicode; names it.
    """
    if not 0 < len(messages) <= MOST_MESSAGES:
        problem = f"messages: {len(messages)} of them; expected 1 to {MOST_MESSAGES}"
        raise ApiError(400, problem, param="messages")
    names = paths or [f"messages[{place}]" for place in range(len(messages))]
    return [_plain(name, message) for name, message in zip(names, messages, strict=True)]


def _plain(path: str, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        problem = f"{path}.role={shown(role)}: expected one of {', '.join(ROLES)}"
        raise ApiError(400, problem, param=f"{path}.role")
    if role in SPEAKERS and message.get("content") is None:
        names = ", ".join(sorted(name for name, value in message.items() if value is not None)[:16])
        raise ApiError(400, f"{path}: has no content, but {shown(names)}; expected a text", param=f"{path}.content")
    plain = {name: value for name, value in message.items() if value is not None}
    if "function_call" in plain:  # no template knows it
        given = shown(plain["function_call"])
        raise ApiError(400, f"{path}.function_call={given}: is called tool_calls here", param=f"{path}.function_call")
    plain["role"] = "system" if role == "developer" else role
    plain["content"] = _text(f"{path}.content", message.get("content"))
    for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if name in plain:  # templates know the one name or the other
            plain[name] = plain_text(f"{path}.{name}", plain[name])
            plain.setdefault(other, plain[name])
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(f"{path}.tool_calls", plain["tool_calls"])
    return plain


def _text(path: str, content: Any) -> str:
    """Return the text of a content that is a text, or consists of parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return plain_text(path, content)
    return "".join(_part(f"{path}[{place}]", part) for place, part in enumerate(content))


def _part(path: str, part: Any) -> str:
    if isinstance(part, str):
        return plain_text(path, part)
    kind = part.get("type") if isinstance(part, dict) else None
    field = PARTS.get(kind) if isinstance(kind, str) else None
    if field is None:
        raise ApiError(400, f"{path}.type={shown(kind)}: expected text; this model reads nothing else", param=path)
    return plain_text(f"{path}.{field}", part.get(field))


def _tool_calls(path: str, calls: Any) -> list[dict[str, Any]]:
    """Return the calls of an earlier answer, with their arguments as the objects that templates expect."""
    if not isinstance(calls, list):
        raise ApiError(400, f"{path}={shown(calls)}: expected a list", param=path)
    plain = []
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            problem = f"{path}[{place}]={shown(call)}: expected a function with a name"
            raise ApiError(400, problem, param=f"{path}[{place}]")
        plain.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return plain


def _arguments(arguments: Any) -> Any:
    """Return arguments as an object, or as the text that a model wrote if that is not JSON."""
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return msgspec.json.decode(arguments)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return arguments

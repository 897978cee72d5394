"""Translation of requests of other APIs to chat completions, as which they are then answered."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.answers.answering import AnswerFormat, Reply
from hbserve.server.answers.answers import Answers
from hbserve.server.chat.message_parts import MessageParts
from hbserve.server.endpoints.chat_prompt import ChatPrompt, chat_prompt
from hbserve.server.endpoints.generating import read_body
from hbserve.server.fields.request_fields import ChatBody, RequestBody
from hbserve.server.http.api_error import ApiError, renamed
from hbserve.server.http.request_body import ignored_fields, ignored_header
from hbserve.server.service import ServedModel, Service
from hbserve_rpc.plain_values import plain_text, shown

B = TypeVar("B", bound=RequestBody)


@dataclass(frozen=True)
class TranslatedChat:
    """A request translated to one of chat completions, with the client's names for its parts."""

    body: ChatBody
    paths: list[str]
    """Path of each message in the client's request."""
    names: Mapping[str, str]
    """Fields of the body, with the client's names for them."""

    async def prompt(self, service: Service, model: ServedModel) -> ChatPrompt:
        """Make the prompt. Raises ApiError, which names what is wrong as the client does."""
        with renamed(self.names):
            return await chat_prompt(service, model, self.body, self.paths)

    async def answer(
        self,
        reply: Reply,
        service: Service,
        model: ServedModel,
        make_format: Callable[[tuple[int, ...], MessageParts], AnswerFormat],
    ) -> None:
        """Send the answer, in a format that is made from the prompt and a reader. Raises what `prompt` raises, and the
        error that ends the answer."""
        prompt = await self.prompt(service, model)
        answer_format = make_format(prompt.token_ids, prompt.make_parts())
        names = {name: _translated(other, self.names) for name, other in prompt.names.items()}
        skip, names = self.body.skip_special_tokens is not False, {**self.names, **names}
        async with Answers(
            model,
            [prompt.token_ids],
            [prompt.params],
            skip_special_tokens=skip,
            shown_ids=prompt.shown_ids,
            names=names,
        ) as answers:
            await reply.answer(answers, answer_format, streamed=bool(self.body.stream))


async def count_tokens(
    request: Request,
    kind: type[B],
    as_chat: Callable[[B], TranslatedChat],
    head: dict[str, Any],
    known: type[RequestBody] | None = None,
) -> Response:
    """Answer with the number of tokens of a body's prompt. `known` is a kind of body whose fields may be there too,
    without effect."""
    model, content, body = await read_body(request, kind)
    model.name_for(body.model)
    prompt = await as_chat(body).prompt(request.app.state.service, model)
    headers = ignored_header(ignored_fields(content, known or kind))
    counted = msgspec.json.encode({**head, "input_tokens": len(prompt.token_ids)})
    return Response(counted, headers=headers, media_type="application/json")


def _translated(path: str, names: Mapping[str, str]) -> str:
    """Return the client's name for a field of a chat, or for a part of a field."""
    known = next((each for each in sorted(names, reverse=True) if f"{path}.".startswith(f"{each}.")), None)
    return path if known is None else names[known] + path.removeprefix(known)


class ChatHistory:
    """Messages of a chat, made from what another API has in their place. A subclass reads that."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.paths: list[str] = []
        """Path of each message in the client's request."""

    def add(self, path: str, role: str, content: str, **more: Any) -> dict[str, Any]:
        self.messages.append({"role": role, "content": content, **more})
        self.paths.append(path)
        return self.messages[-1]


def plain_role(path: str, message: dict[str, Any], roles: tuple[str, ...]) -> str:
    """Return the role of a message. Raises ApiError (400) if it is not one of `roles`."""
    role = message.get("role")
    if role not in roles:
        problem = f"{path}.role={shown(role)}: expected one of {', '.join(roles)}"
        raise ApiError(400, problem, param=f"{path}.role")
    return str(role)


def content_of(path: str, message: dict[str, Any]) -> Any:
    """Return the content of a message that must have one. Raises ApiError (400) if it has none."""
    content = message.get("content")
    if content is None or content == []:
        names = ", ".join(sorted(message)[:16])
        raise ApiError(400, f"{path}: has no content, but {shown(names)}; expected a text", param=f"{path}.content")
    return content


def parts_of(path: str, content: Any) -> list[tuple[str, dict[str, Any], Any]]:
    """Return path, part and type of each element of a list of parts. Raises ApiError if `content` is no such list."""
    if not isinstance(content, list):
        raise ApiError(400, f"{path}={shown(content)}: expected text, or a list of parts", param=path)
    found = []
    for place, part in enumerate(content):
        of_part = f"{path}[{place}]"
        if not isinstance(part, dict):
            raise ApiError(400, f"{of_part}={shown(part)}: expected an object with a type", param=of_part)
        found.append((of_part, part, part.get("type")))
    return found


def text_of(path: str, content: Any, fields: Mapping[str, str]) -> str:
    """Return the text of a message's content, which is a text or a list of parts. `fields` has the types of parts, each
    with the name of the field that has the text.

    Raises:
        ApiError, InvalidRequest: a part is something else.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return plain_text(path, content)
    return "".join(part_text(of_part, part, kind, fields) for of_part, part, kind in parts_of(path, content))


def part_text(path: str, part: dict[str, Any], kind: Any, fields: Mapping[str, str]) -> str:
    """Return the text of one part. Raises what `text_of` raises."""
    if not isinstance(kind, str) or kind not in fields:
        expected = " or ".join(fields)
        raise ApiError(
            400, f"{path}.type={shown(kind)}: expected {expected}; this model reads nothing else", param=path
        )
    return plain_text(f"{path}.{fields[kind]}", part.get(fields[kind]))


def new_tool_call(path: str, call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """Make a tool call of an earlier answer in the format of chats. Raises InvalidRequest if its name is not text."""
    function = {"name": plain_text(f"{path}.name", name), "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def offered_function(path: str, tool: dict[str, Any], kinds: tuple[Any, ...], schema: str) -> dict[str, Any]:
    """Translate a tool to the format of chats. `schema` is the name of its field with the parameters.

    Raises:
        ApiError: (400) the tool's type is not among `kinds`.
    """
    if tool.get("type") not in kinds:
        expected = " or ".join("none" if kind is None else str(kind) for kind in kinds)
        raise ApiError(400, f"{path}.type={shown(tool.get('type'))}: is not served; expected {expected}", param=path)
    given = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get(schema)}
    return {"type": "function", "function": {name: value for name, value in given.items() if value is not None}}


def named_function(name: Any) -> dict[str, Any]:
    """Make the `tool_choice` of one tool in the format of chats."""
    return {"type": "function", "function": {"name": name}}

"""The grammar that a request's answer must follow, under the field names of OpenAI and of vLLM."""

from typing import Any

from hbserve.server.fields.request_fields import SamplingFields
from hbserve.server.http.api_error import ApiError, renamed
from hbserve_rpc import StructuredOutputsParams
from hbserve_rpc.plain_values import shown
from hbserve_rpc.structured_outputs import plain_structured_outputs


def structured_outputs(body: SamplingFields) -> StructuredOutputsParams | None:
    """Return the grammar that `structured_outputs` or `response_format` asks for; None if neither does.

    Raises:
        ApiError: (400) a field is wrong; the message names it.
        InvalidRequest: the grammar that it asks for is not valid.
    """
    given = _of_response_format(body.response_format)
    if given is None:
        return plain_structured_outputs(body.structured_outputs)
    if body.structured_outputs is not None:
        problem = "response_format: there are structured_outputs too; expected one of them"
        raise ApiError(400, problem, param="response_format")
    with renamed(grammar_names(body)):
        return StructuredOutputsParams(**given)


def grammar_names(body: SamplingFields) -> dict[str, str]:
    """Return the names of parts of `structured_outputs`, which instances use, with those that a client knows which sent
    `response_format`."""
    if body.structured_outputs is not None or body.response_format is None:
        return {}
    return {
        "structured_outputs.json": "response_format.json_schema.schema",
        "structured_outputs.json_object": "response_format",
        "structured_outputs": "response_format",
    }


def _of_response_format(wanted: Any) -> dict[str, Any] | None:
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if wanted is None or kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    expected = "type text, json_object, or json_schema"
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        if isinstance(schema, dict):
            return {"json": schema}
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
    raise ApiError(400, f"response_format={shown(wanted)}: expected {expected}", param="response_format")

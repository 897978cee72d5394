"""The grammar that a request's answer is to follow, under the names of OpenAI's API and of vLLM's."""

from typing import Any

from hbserve.server.fields.request_fields import SamplingFields
from hbserve.server.http.api_error import ApiError, renamed
from hbserve_rpc import StructuredOutputsParams
from hbserve_rpc.plain_values import shown
from hbserve_rpc.structured_outputs import plain_structured_outputs


def structured_outputs(body: SamplingFields) -> StructuredOutputsParams | None:
    """What `structured_outputs` or `response_format` say; None: neither asks for anything.

    Raises:
        ApiError: 400, names the field.
        InvalidRequest: what it says cannot be.
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
    """What a client that sent `response_format` calls the parts of `structured_outputs`, as which instances know it."""
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

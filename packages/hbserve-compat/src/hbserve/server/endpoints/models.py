"""/v1/models: the model, under each of its names."""

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.service import ServedModel


async def list_models(request: Request) -> Response:
    model: ServedModel = request.app.state.service.require_model()
    return _json({"object": "list", "data": [_card(model, name) for name in model.names]})


async def retrieve_model(request: Request) -> Response:
    name = request.path_params["model"]
    if not name:  # /v1/models/, as some clients write it
        return await list_models(request)
    model: ServedModel = request.app.state.service.require_model()
    return _json(_card(model, model.name_for(name)))


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "hbserve",
        # `vllm bench serve` needs it.
        "root": model.folder,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")

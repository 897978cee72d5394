"""/health, /ping and /version: for whoever watches the server."""

from importlib.metadata import version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.api_error import try_again
from hbserve.server.service import Service


async def health(request: Request) -> Response:
    """200 if requests are served now; else 503, which says why."""
    service: Service = request.app.state.service
    model = service.require_model()
    down = [each for each in model.scheduler.stats().instances if each.status != "ready"]
    roles_left = {each.role for each in model.scheduler.stats().instances if each.status == "ready"}
    if not ("hybrid" in roles_left or {"prefill", "decode"} <= roles_left):
        states = ", ".join(f"{each.instance_id} is {each.status}" for each in down) or "there are no instances"
        raise try_again(states, code="not_ready")
    return Response()


async def ping(request: Request) -> Response:
    """200 as long as the server runs, also while the model is being loaded."""
    return Response()


async def show_version(request: Request) -> Response:
    return Response(msgspec.json.encode({"version": version("hbserve-compat")}), media_type="application/json")

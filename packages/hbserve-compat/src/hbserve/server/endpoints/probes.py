"""/health, /ping and /version, for programs that watch the server."""

from importlib.metadata import version

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.server.http.api_error import try_again
from hbserve.server.service import Service
from hbserve_scheduler.fleet import missing_roles


async def health(request: Request) -> Response:
    """Answer 200 if requests are served now, and otherwise 503 with the reason."""
    service: Service = request.app.state.service
    model = service.require_model()
    if not model.scheduler.may_serve():
        instances = model.scheduler.stats().instances
        down = [f"{each.instance_id} is {each.status}" for each in instances if each.status != "ready"]
        missing = missing_roles({each.role for each in instances})
        raise try_again(", ".join([*down, *missing]), code="not_ready")
    return Response()


async def ping(request: Request) -> Response:
    """Answer 200 as long as the server runs, also while the model is being loaded."""
    return Response()


async def show_version(request: Request) -> Response:
    return Response(msgspec.json.encode({"version": version("hbserve-compat")}), media_type="application/json")

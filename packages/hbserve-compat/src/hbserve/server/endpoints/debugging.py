"""/debug/trace, a timeline of the last requests, and /debug/view, the content of /dashboard as JSON."""

import asyncio
import math

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hbserve.monitoring.trace import render_trace
from hbserve.server.http.api_error import ApiError
from hbserve.server.service import Service
from hbserve_rpc.plain_values import shown

LAST_S = 60.0


async def show_trace(request: Request) -> Response:
    """Answer with a timeline of the last `last_s` seconds, or of the request `request_id` alone."""
    service: Service = request.app.state.service
    model = service.require_model()
    text = request.query_params.get("last_s", str(LAST_S))
    try:
        last_s = float(text)
    except ValueError:
        last_s = math.nan
    if not 0 <= last_s < math.inf:
        raise ApiError(400, f"last_s={shown(text)}: expected seconds, from 0 on", param="last_s")
    records = await model.whole.fetch_records(last_s, request.query_params.get("request_id", ""))
    trace = await asyncio.to_thread(render_trace, records)
    headers = {"Content-Disposition": 'attachment; filename="trace.json.gz"'}
    return Response(trace, media_type="application/gzip", headers=headers)


async def show_view(request: Request) -> Response:
    """Answer with one View; see hbserve/monitoring/live_view.py."""
    service: Service = request.app.state.service
    view = await service.require_model().watched.look()
    return Response(msgspec.json.encode(view), media_type="application/json", headers={"Cache-Control": "no-store"})

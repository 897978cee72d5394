"""The OpenAI server mounted in an ASGI application of your own, and that application behind Ray Serve.

Run it: uv run python examples/ray_serve.py [MODEL_FOLDER]      (needs: uv pip install 'ray[serve]')

Each replica has a scheduler, a prefill and a decode instance of its own, on its node; Serve's proxy answers at
http://127.0.0.1:8000/v1, and passes every token on: docs/ray.md says what that costs. `hbserve serve --ray` places the
instances of one deployment on the nodes of a cluster instead, and no token goes through Ray.

Ctrl-C ends it, with the cluster that it has started. On one that was there before, Serve goes on until `serve shutdown`
is typed there, which asks its dashboard.
"""

import contextlib
import sys
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.routing import Mount

from hbserve.models.demo_model import find_model_folder
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.server.app import make_app
from hbserve.server.service import Service
from hbserve_scheduler import SchedulerServer
from hbserve_scheduler.config import ServerSection


def application(model_path: str | None) -> Starlette:
    """Any ASGI server runs it; the instances are started and ended with it."""
    service = Service(ServerSection())

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        folder = await find_model_folder(model_path)
        async with DisaggregatedLLM(PdDisaggConfig(model_path=folder)) as llm:
            figures = SchedulerServer(llm.scheduler)  # nobody has to reach it: it is not started
            service.begin(folder.name, folder, llm.scheduler, llm.tokenizer, figures)
            try:
                yield
            finally:
                service.draining = True  # who asks now is refused
                service.close()

    return Starlette(routes=[Mount("/", make_app(service))], lifespan=running)


def main(model_path: str | None) -> None:
    from ray import serve

    # On GPUs: {"num_gpus": 2}, of which the two instances get one each.
    @serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
    @serve.ingress(lambda: application(model_path))
    class Server:
        pass

    with contextlib.suppress(KeyboardInterrupt):
        serve.run(Server.bind(), blocking=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)

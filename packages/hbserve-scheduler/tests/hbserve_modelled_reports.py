"""REPORTS of a modelled instance: it says once what it is, and nothing more."""

import asyncio
from typing import Any

from hbserve_rpc.messages import InstanceInfo
from hbserve_scheduler.instance_client import InstanceStream


class Reports(InstanceStream[Any]):
    """In place of an RpcStream."""

    def __init__(self, info: InstanceInfo) -> None:
        self.info = info
        self.has_said = False

    async def __aenter__(self) -> "Reports":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def __anext__(self) -> Any:
        if self.has_said:
            await asyncio.Event().wait()
        self.has_said = True
        return self.info

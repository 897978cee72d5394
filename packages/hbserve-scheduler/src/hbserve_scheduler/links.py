"""Links between prefill and decode instances, made ahead of the requests that would have to wait for them.

A link is a fact about two instances. What is known of it here is a memory: CONNECT was answered, or a transfer has gone
over it. Whether the instances are ready does not depend on it. A pair that cannot be connected is asked again less and
less often; a connected one is asked from time to time, because its link may break while nobody uses it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping

from hbserve_rpc import HBServeRpcError, PeerLost
from hbserve_rpc.messages import CONNECT, ConnectRequest
from hbserve_rpc.reminder import Reminder
from hbserve_scheduler.health import SERVING
from hbserve_scheduler.instances import InstanceHandle

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 120.0
"""Longest wait for CONNECT. Instances have their own deadline, `kv_transfer.timeout_s` for each way of connecting."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
CHECK_S = 10.0


class Links:
    """Keeper of at most `most` links of each instance. It belongs to one event loop."""

    def __init__(self, handles: Mapping[str, InstanceHandle], most: int) -> None:
        self._handles = handles
        self._most = most
        self._keeping: dict[tuple[str, str], asyncio.Task[None]] = {}
        """Task that keeps each link, by the epochs of the prefill and the decode instance."""
        self._is_update_due = False

    def update(self) -> None:
        """Keep links between instances that serve. To be called when an instance comes, goes, or begins another life.

        All changes in one turn of the event loop are handled together at its end: to look at all pairs for each one of
        a thousand instances that became ready at the same time took 20 s.
        """
        if not self._is_update_due:
            self._is_update_due = True
            asyncio.get_running_loop().call_soon(self._update)

    def _update(self) -> None:
        self._is_update_due = False
        ready = {handle.epoch: handle for handle in self._handles.values() if handle.status in SERVING}
        for pair in [pair for pair in self._keeping if not ready.keys() >= set(pair)]:
            self._keeping.pop(pair).cancel()
        decodes = {
            epoch: handle for epoch, handle in ready.items() if handle.info is not None and handle.info.kv_endpoint
        }
        degree = Counter(epoch for pair in self._keeping for epoch in pair)
        for epoch, prefill in ready.items():
            if prefill.role != "prefill":
                continue
            prefill.links = {peer: is_there for peer, is_there in prefill.links.items() if peer in decodes}
            if degree[epoch] >= self._most:
                continue
            free = [peer for peer in decodes if degree[peer] < self._most and (epoch, peer) not in self._keeping]
            # Instances with the fewest links come first, so that each gets some.
            for peer in sorted(free, key=degree.__getitem__)[: self._most - degree[epoch]]:
                self._keeping[epoch, peer] = asyncio.create_task(self._keep(prefill, decodes[peer]))
                degree.update((epoch, peer))

    async def close(self) -> None:
        """Stop keeping links, now and from now on."""
        tasks, self._most = list(self._keeping.values()), 0
        self._keeping.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, prefill: InstanceHandle, decode: InstanceHandle) -> None:
        """Keep one link, until the task is cancelled because one of the two has gone, or begun another life."""
        assert decode.info is not None, "it is ready"
        epoch, request = decode.epoch, ConnectRequest(decode.info.kv_endpoint)
        loop = asyncio.get_running_loop()
        pause_s, outage = FIRST_PAUSE_S, Reminder(loop.time())
        while True:
            try:
                await prefill.client.call(CONNECT, request, timeout_s=CONNECT_TIMEOUT_S)
            except HBServeRpcError as error:
                prefill.links[epoch] = False
                if not isinstance(error, PeerLost) and outage.say_now(loop.time()):
                    names = prefill.instance_id, decode.instance_id
                    logger.warning("%s cannot connect to %s; still trying: %s", *names, error)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if outage.was_said:
                    logger.warning("%s is connected to %s", prefill.instance_id, decode.instance_id)
                prefill.links[epoch] = True
                pause_s, outage = FIRST_PAUSE_S, Reminder(loop.time())
                await asyncio.sleep(CHECK_S)

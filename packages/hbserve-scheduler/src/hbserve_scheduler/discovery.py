"""Discovery of instances behind a DNS name: an instance that is found there joins, and one no longer found leaves.

    gpu_instances: [{instance_type: prefill, discover: "dns:prefill.example:5555"}]

A name has as many addresses as there are instances, all with the same port; a headless service of Kubernetes is such a
name. Each instance describes itself. One that is found at several addresses is one instance: it is used at the first
that answers, and at another one only once that no longer does. An instance is removed only by an answer that lacks its
address: no answer at all, or a name without any address, says nothing about instances.
"""

import asyncio
import contextlib
import logging
import re
import socket
from dataclasses import dataclass

from hbserve_rpc import HBServeRpcError, InvalidAddress, InvalidRequest, check_host, format_address
from hbserve_rpc.messages import Role
from hbserve_rpc.reminder import Reminder
from hbserve_rpc.settings import PORT
from hbserve_scheduler.errors import ConfigError
from hbserve_scheduler.membership import Membership

logger = logging.getLogger(__name__)

INTERVAL_S = 5.0
TIMEOUT_S = 5.0
"""Longest time of one look-up."""


@dataclass(frozen=True)
class DnsName:
    """A DNS name, with the port of all instances behind it."""

    host: str
    port: int

    @classmethod
    def of(cls, text: str) -> "DnsName":
        """Parse `dns:NAME:PORT`. Raises ConfigError, whose message begins with the value."""
        match = re.fullmatch(r"dns:([^:]+):([0-9]{1,5})", text)
        if match is None or not (int(match[2]) >= 1 and PORT.allow(int(match[2]))):
            raise ConfigError(f"{text!r}: expected dns:NAME:PORT, with a port from 1 to 65535")
        try:
            check_host(match[1])
        except InvalidAddress as error:
            raise ConfigError(f"{text!r}: its name is {error}") from None
        return cls(match[1], int(match[2]))

    async def addresses(self) -> set[str]:
        """Look the name up, in a thread of the event loop, and return every address as `host:port`. Raises OSError."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return {format_address(str(place[0]), self.port) for *_, place in found}


class Discovery:
    """Follower of one name, which it looks up every INTERVAL_S from `start` to `close`."""

    def __init__(self, members: Membership, role: Role, name: DnsName) -> None:
        self.role = role
        self.name = name
        self._members = members
        self._ids: dict[str, str] = {}
        """Ids of the instances that have joined, by address; an instance may have several."""
        self._failing = Reminder(0.0)
        self._refused: dict[str, str] = {}
        """Reasons why instances that were found could not join, by address. Each reason is logged once."""
        self._following: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._following = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stop looking the name up. Instances that have joined stay."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    def leave(self) -> list[str]:
        """Have all instances leave that have joined, and return their ids."""
        left = sorted(set(self._ids.values()))
        self._ids.clear()
        for instance_id in left:
            self._see_off(instance_id)
        return left

    async def _follow(self) -> None:
        while True:
            await self._look_up()
            await asyncio.sleep(INTERVAL_S)

    async def _look_up(self) -> None:
        now_s = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                found = await self.name.addresses()
        except (OSError, TimeoutError) as error:
            if self._failing.say_now(now_s):
                why = error.strerror or str(error) or "no name server answers"
                logger.warning(
                    "%s cannot be looked up; still trying, and no instance leaves because of that: %s",
                    self.name.host,
                    why,
                )
            return
        self._failing = Reminder(now_s)
        self._refused = {address: why for address, why in self._refused.items() if address in found}
        for address in self._ids.keys() - found:
            instance_id = self._ids.pop(address)
            if instance_id not in self._ids.values():
                self._see_off(instance_id)
        new = [address for address in found if not self._members.has(self._ids.get(address, ""))]
        await asyncio.gather(*map(self._join, sorted(new)))

    async def _join(self, address: str) -> None:
        """Have the instance at the address join. This includes a known one that is not reachable, because another one
        may have its address by now."""
        before = self._ids.get(address)
        try:
            info = await self._members.join(address, self.role)
        except HBServeRpcError as error:
            if self._refused.get(address) != (why := str(error)):
                logger.warning("%s, of %s, does not join; still asking: %s", address, self.name.host, why)
            self._refused[address] = why
            return
        self._ids[address] = info.instance_id
        self._refused.pop(address, None)
        if before not in (None, info.instance_id):
            self._see_off(str(before))

    def _see_off(self, instance_id: str) -> None:
        with contextlib.suppress(InvalidRequest):  # it has already left in another way
            self._members.leave(instance_id, for_good=False)  # it may be found again

"""`hbserve join`, `drain`, `flip`, `scale` and `reload`: change the instances of a running deployment."""

import asyncio
import re
import sys
from collections.abc import AsyncIterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from hbserve.remote import remote_scheduler
from hbserve_rpc import InvalidRequest
from hbserve_rpc.address import parse_address
from hbserve_rpc.members import ScaleNews
from hbserve_rpc.messages import InstanceStats, Role
from hbserve_scheduler import ConfigError, RemoteScheduler
from hbserve_scheduler.health import SERVING

LOOK_S = 0.5


@dataclass(frozen=True)
class DrainArgs:
    """The command's arguments."""

    connect: str
    keys: Path | None
    instance_id: str
    leaves: bool
    within_s: float | None


async def join(connect: str, keys: Path | None, address: str) -> None:
    """Add an instance. Raises InvalidAddress, ConfigError, NotReady, and the scheduler's own errors."""
    parse_address(address)
    async with remote_scheduler(connect, keys) as (scheduler, _):
        info = await scheduler.join(address)
    sys.stdout.write(f"{info.instance_id} ({info.role}) at {address} takes requests; it is {info.status}\n")


async def drain(args: DrainArgs) -> None:
    """Drain an instance, and wait until it has no requests left. Raises ConfigError, NotReady, InvalidRequest if it is
    called back meanwhile, and the scheduler's own errors."""
    name = args.instance_id
    async with remote_scheduler(args.connect, args.keys) as (scheduler, _):
        leaves = args.leaves or args.within_s is not None
        await scheduler.drain(name, leaves=leaves, within_s=args.within_s)
        last = -1
        while (found := await _stats_of(scheduler, name)) is not None:
            if found.status in SERVING:
                raise InvalidRequest(f"{name} takes requests again: it was called back, or is another process")
            if not leaves and (found.status == "lost" or not found.active_requests):
                break
            if found.active_requests != last:
                last = found.active_requests
                sys.stderr.write(f"{name} has {last} requests left\n")
            await asyncio.sleep(LOOK_S)
    lost = "no longer answers, and its requests go on elsewhere"
    how = "has left" if found is None else lost if found.status == "lost" else "is drained"
    sys.stdout.write(f"{name} {how}: it may be stopped\n")


async def _stats_of(scheduler: RemoteScheduler, instance_id: str) -> InstanceStats | None:
    """Return what is known of an instance, with its requests of all schedulers. None: it is no member."""
    instances = (await scheduler.fetch_stats()).instances
    return next((each for each in instances if each.instance_id == instance_id), None)


async def flip(connect: str, keys: Path | None, instance_id: str, role: str) -> None:
    """Switch an instance to another role. Raises ConfigError, NotReady, and the scheduler's own errors."""
    if role not in ("prefill", "decode"):
        raise ConfigError(f"{role!r}: expected prefill or decode")
    wanted = cast("Literal['prefill', 'decode']", role)
    async with remote_scheduler(connect, keys) as (scheduler, _), scheduler.flip(instance_id, wanted) as news:
        await _tell(news)


async def scale(connect: str, keys: Path | None, wanted: Sequence[str]) -> None:
    """Set the numbers of instances by words such as prefill=3. Raises ConfigError, NotReady, and the scheduler's own
    errors."""
    numbers = numbers_by_role(wanted)
    async with remote_scheduler(connect, keys) as (scheduler, _), scheduler.scale(numbers) as news:
        await _tell(news)


async def _tell(news: AsyncIterable[ScaleNews]) -> None:
    async for each in news:
        sys.stdout.write(f"{each.text}\n")
        sys.stdout.flush()


def numbers_by_role(words: Sequence[str]) -> dict[Role, int]:
    """Parse words such as prefill=3. Raises ConfigError."""
    found: dict[Role, int] = {}
    for word in words:
        match = re.fullmatch(r"(prefill|decode|hybrid)=([0-9]{1,4})", word)
        if match is None:
            raise ConfigError(f"{word!r}: expected ROLE=NUMBER, of prefill, decode or hybrid; for example decode=3")
        role = cast("Role", match[1])
        if role in found:
            raise ConfigError(f"{word!r}: the number of {role} instances is given twice")
        found[role] = int(match[2])
    return found


async def reload(connect: str, keys: Path | None) -> None:
    """Let the scheduler reread its file. Raises ConfigError, NotReady, and the scheduler's own errors."""
    async with remote_scheduler(connect, keys) as (scheduler, _):
        found = await scheduler.reload()
    changes = {"joining": found.joining, "leaving": found.leaving, "changed, for the next start": found.for_a_restart}
    told = "; ".join(f"{name}: {', '.join(several)}" for name, several in changes.items() if several)
    sys.stdout.write(f"{told or 'nothing has changed'}\n")

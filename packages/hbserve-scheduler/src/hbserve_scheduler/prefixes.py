"""Prefixes of prompts that instances have cached, by prefix: which instances hold it, by their own reports."""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence

from hbserve_rpc import HBServeRpcError
from hbserve_rpc.messages import CACHED_PREFIXES, CachedPrefixesRequest
from hbserve_rpc.prompt_shape import DIGEST_BYTES
from hbserve_scheduler.health import SERVING
from hbserve_scheduler.instances import InstanceHandle

ASK_TIMEOUT_S = 5.0
AT_ONCE = 256
"""Number of digests of a report that are processed at a time. All 8192 of a busy instance would take 5 ms and more, in
which no token gets through."""


class Prefixes:
    """Index of which instances hold which cached blocks. It belongs to one event loop. It is as old as the pause
    between two questions: a request placed by it may find fewer blocks cached, and is then computed all the same."""

    def __init__(self) -> None:
        self._holders: dict[bytes, set[InstanceHandle]] = {}
        self._held: dict[InstanceHandle, set[bytes]] = {}
        self._versions: dict[InstanceHandle, tuple[str, int]] = {}
        """Epoch, and version of the blocks that it holds, of each instance."""

    def num_cached(self, digests: Sequence[bytes], handle: InstanceHandle) -> int:
        """Return the number of leading blocks that an instance holds."""
        held: Collection[bytes] = self._held.get(handle, ())
        return _first_false(len(digests), lambda place: digests[place] in held)

    def longest(
        self, digests: Sequence[bytes], among: Collection[InstanceHandle]
    ) -> tuple[int, Iterator[InstanceHandle]]:
        """Return the number of blocks in the longest prefix that any of `among` holds, and those that hold it."""

        def holders(place: int) -> Iterator[InstanceHandle]:
            known = self._holders.get(digests[place], set())
            fewer, others = (among, known) if len(among) < len(known) else (known, among)
            return (each for each in fewer if each in others)

        num_blocks = _first_false(len(digests), lambda place: any(True for _ in holders(place)))
        return num_blocks, holders(num_blocks - 1) if num_blocks else iter(())

    def set(self, handle: InstanceHandle, held: Collection[bytes]) -> None:
        """Set the digests that an instance holds; none if it has gone."""
        for _ in self._replace(handle, held):
            pass

    def _replace(self, handle: InstanceHandle, held: Collection[bytes]) -> Iterator[None]:
        """Set the digests that an instance holds, yielding after every AT_ONCE changes. Must be exhausted."""
        before, now = self._held.pop(handle, set()), set(held)
        if now:
            self._held[handle] = now
        for count, digest in enumerate(before - now, 1):
            self._holders[digest].discard(handle)
            if not self._holders[digest]:
                del self._holders[digest]
            if count % AT_ONCE == 0:
                yield
        for count, digest in enumerate(now - before, 1):
            self._holders.setdefault(digest, set()).add(handle)
            if count % AT_ONCE == 0:
                yield

    async def keep(self, handles: Callable[[], Collection[InstanceHandle]], interval_s: float) -> None:
        """Ask the ready ones of `handles` what they hold, again and again."""
        while True:
            serving = [handle for handle in handles() if handle.status in SERVING]
            for gone in self._versions.keys() - set(serving):
                del self._versions[gone]
                self.set(gone, ())
            await asyncio.gather(*(self._ask(handle) for handle in serving if handle.status == "ready"))
            await asyncio.sleep(interval_s)

    async def _ask(self, handle: InstanceHandle) -> None:
        epoch, version = self._versions.get(handle, ("", -1))
        request = CachedPrefixesRequest(version if epoch == handle.epoch else -1)
        epoch = handle.epoch
        with contextlib.suppress(HBServeRpcError):  # it is lost, or its version does not know this method
            reply = await handle.client.call(CACHED_PREFIXES, request, timeout_s=ASK_TIMEOUT_S)
            if reply.digests is not None and handle.epoch == epoch:
                places = range(0, len(reply.digests), DIGEST_BYTES)
                for _ in self._replace(handle, [reply.digests[place : place + DIGEST_BYTES] for place in places]):
                    await asyncio.sleep(0)
                self._versions[handle] = epoch, reply.version


def _first_false(count: int, is_true: Callable[[int], bool]) -> int:
    """Return the first number from 0 to `count` for which `is_true` is false, or `count`. It is found by bisection, as
    an instance that holds a block of a prompt also holds the blocks before it."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if is_true(middle) else (low, middle)
    return low

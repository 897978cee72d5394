"""Requests between two attempts. They come before those that wait, which would otherwise take every free place."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from hbserve_rpc import HBServeRpcError, InvalidRequest, LogitsNotFinite, Overloaded, RequestTimeout
from hbserve_scheduler.errors import RequestFailed
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.instances import Placement
from hbserve_scheduler.request import ScheduledRequest

logger = logging.getLogger(__name__)

MOST_DEATHS = 2
"""Deaths of instances that a request may have been on: one of them may have been killed, two tell of the request. See
`Retries` for requests that were there by chance."""
MOST_SUSPECTS = 8
"""Suspects that are tried at a time. If one of them is what an instance died of, the next instance dies too, and only
so many are on it that were on the first: the scheduler gives these up. All others are tried as soon as those have got a
token more."""


class Retries:
    """Gives places to requests whose attempt has failed, first come first served.

    An instance that dies had many requests, of which one may have killed it. All of these are suspects until they have
    got beyond the place where they were then, and few suspects are tried at a time, so that the next death tells few.
    """

    def __init__(self, fleet: Fleet, on_change: Callable[[], None]) -> None:
        self._fleet = fleet
        self._on_change = on_change
        self.waiting: deque[tuple[ScheduledRequest, asyncio.Future[Placement]]] = deque()
        """Requests in the order in which they came, each with the place that it waits for."""
        self._on_trial: list[ScheduledRequest] = []

    def place(self) -> None:
        """Give places to those that are waiting, as far as there are some. To be called when there may be room."""
        self._on_trial = [entry for entry in self._on_trial if entry.is_suspect]
        for entry, place in list(self.waiting):
            if self._is_held_back(entry):
                continue
            placement = self._fleet.place_request(entry)
            if placement is None:
                return
            if entry.is_suspect:
                self._on_trial.append(entry)
                entry.on_progress = self._on_change
            self.waiting.remove((entry, place))
            place.set_result(placement)

    def _is_held_back(self, entry: ScheduledRequest) -> bool:
        return len(self._on_trial) >= MOST_SUSPECTS and entry.is_suspect

    async def wait_for_place(self, entry: ScheduledRequest, timeout_s: float) -> Placement | None:
        """A place away from the instances that failed, if there are others; None if there is none in time."""
        if entry in self._on_trial:  # until its next place
            self._on_trial.remove(entry)
        place: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self.waiting.append((entry, place))
        self._on_change()
        try:
            while not (await asyncio.wait([place], timeout=timeout_s))[0] and self._is_held_back(entry):
                pass  # nobody lacks: others are on trial, whose attempts have deadlines of their own
        except asyncio.CancelledError:
            if place.done():
                place.result().end()
            raise
        finally:
            if not place.done():
                self.waiting.remove((entry, place))
        return place.result() if place.done() else None


def require_another_attempt(entry: ScheduledRequest, error: HBServeRpcError, problems: list[str], most: int) -> None:
    """The last attempt has failed; it is added to `problems`, unless it was none. `most` may be made.

    Raises what ends the request: another attempt would not help, or would do harm.
    """
    if isinstance(error, InvalidRequest | LogitsNotFinite | RequestTimeout):  # another instance would say the same
        raise error
    if isinstance(error, Overloaded) and entry.attempts[-1].first_token_s is None:
        logger.debug("request %s is to be placed again: %s", entry.request.request_id, error)
        entry.attempts.pop()  # who refuses has not begun: that was none
        entry.figures.num_refusals += 1
        return
    problems.append(f"attempt {len(entry.attempts)}: {error}")
    logger.warning("request %s: %s", entry.request.request_id, problems[-1])
    entry.figures.failed_attempts[type(error).__name__] += 1
    if len(entry.deaths) >= MOST_DEATHS:
        died = " and ".join(entry.deaths)
        why = f"it was on {died} as they died, and is tried on no other: it may be what they died of"
        raise RequestFailed("; ".join([*problems, why])) from error
    if len(entry.attempts) >= most:
        raise RequestFailed("; ".join(problems)) from error
    entry.figures.num_retries += not entry.has_parted  # else each choice goes on by itself

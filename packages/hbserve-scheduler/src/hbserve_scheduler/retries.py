"""Requests between two attempts. They come before waiting requests, which would otherwise take every free place."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from hbserve_rpc import HBServeRpcError, InvalidRequest, LogitsNotFinite, Overloaded, RequestTimeout, Unavailable
from hbserve_scheduler.errors import RequestFailed
from hbserve_scheduler.fleet import Fleet
from hbserve_scheduler.instances import Placement
from hbserve_scheduler.request import ScheduledRequest

logger = logging.getLogger(__name__)

MOST_DEATHS = 2
"""Number of instances that must have died under a request for it to be given up. One may have been killed, but two
point to the request. For requests that were there by chance, see `Retries`."""
MOST_SUSPECTS = 8
"""Number of suspects that are tried at a time. If an instance died of one of them, the next instance dies too, and only
these suspects were on both: the scheduler gives them up. If these get one more token, the others are tried."""


class Retries:
    """Queue of requests whose attempt has failed, which get places first come, first served.

    An instance that dies had many requests, one of which may have killed it. All of these are suspects until they get
    beyond the token at which they were then. Few suspects are tried at a time, so that the next death points to few.
    """

    def __init__(self, fleet: Fleet, on_change: Callable[[], None]) -> None:
        self._fleet = fleet
        self._on_change = on_change
        self.waiting: deque[tuple[ScheduledRequest, asyncio.Future[Placement]]] = deque()
        """Requests in the order in which they came, each with a future of the place that it waits for."""
        self._on_trial: list[ScheduledRequest] = []

    def place(self) -> None:
        """Give places to waiting requests while there are some. To be called when there may be room."""
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

    def give_up(self, error: Unavailable) -> None:
        """Let nobody wait any longer: each gets this error in place of a place."""
        while self.waiting:
            _, place = self.waiting.popleft()
            place.set_exception(error)

    async def wait_for_place(self, entry: ScheduledRequest) -> Placement:
        """Return a place, on instances that have not failed if there are others. Raises what `give_up` is given."""
        if entry in self._on_trial:  # it is not, until it has its next place
            self._on_trial.remove(entry)
        place: asyncio.Future[Placement] = asyncio.get_running_loop().create_future()
        self.waiting.append((entry, place))
        self._on_change()
        try:
            await asyncio.wait([place])
        except asyncio.CancelledError:
            if place.done() and place.exception() is None:
                place.result().end()
            raise
        finally:
            if not place.done():
                self.waiting.remove((entry, place))
        return place.result()


def require_another_attempt(entry: ScheduledRequest, error: HBServeRpcError, problems: list[str], most: int) -> None:
    """Decide whether to make another attempt, of at most `most`, after the last one failed with `error`. The failure is
    added to `problems`, unless an instance refused the request, which counts as no attempt.

    Raises the error that ends the request if another attempt would not help, or would do harm.
    """
    if isinstance(error, InvalidRequest | LogitsNotFinite | RequestTimeout):  # another instance would answer the same
        raise error
    if isinstance(error, Overloaded) and entry.attempts[-1].first_token_s is None:
        logger.debug("request %s is to be placed again: %s", entry.request.request_id, error)
        entry.attempts.pop()  # an instance that refuses has not begun: that was no attempt
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
    entry.figures.num_retries += not entry.has_parted  # otherwise each choice goes on by itself, and is counted

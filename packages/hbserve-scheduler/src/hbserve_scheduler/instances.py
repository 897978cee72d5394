"""The scheduler's handle of one instance, and the places that requests take there.

A handle is a connection to the instance, with what the scheduler knows about it.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from hbserve_rpc import HBServeRpcError, PeerDied, PeerLost, RpcClient
from hbserve_rpc.messages import STATS, Empty, InstanceInfo, InstanceStats, InstanceStatus, Role
from hbserve_rpc.reminder import Reminder
from hbserve_rpc.reports import REPORTS, InstanceReport, ReportsRequest
from hbserve_scheduler.config import SchedulerConfig
from hbserve_scheduler.health import Health
from hbserve_scheduler.instance_client import InstanceClient

logger = logging.getLogger(__name__)

SPARE_PART = 10
"""Number of blocks of which one must stay free when a request is sent to prefill before its grant."""
MOST_DEATHS_KEPT = 32
REFUSED_S = 0.1
"""Time for which an instance that has refused a request is left alone."""
SAY_AFTER_S = 5.0
"""Time for which a call to an instance may go unanswered before it is logged that the instance cannot be reached."""


class InstanceHandle:
    """Handle of one instance, which connects to it and receives its reports. It tries a lost instance again and again,
    because that may come back, in a new epoch."""

    def __init__(
        self,
        instance_id: str,
        role: Role,
        address: str,
        config: SchedulerConfig,
        on_change: "Callable[[InstanceHandle], None]",
        on_info: "Callable[[InstanceHandle], None]",
        make_client: Callable[[str], InstanceClient] = RpcClient,
    ) -> None:
        """Make a handle that is not connected yet.

        on_change: called when there may be more room than before. on_info: called when `info` has changed.
        """
        self.instance_id = instance_id
        self.role: Role = role
        self.declared: Role = role  # the role that the instance was started with; it may have changed since
        self.address = address
        self.info: InstanceInfo | None = None
        self.last_stats: InstanceStats | None = None
        self.health = Health()
        self.load = self.load_of_others = 0
        """Amount of work that the instance has: prompt tokens on a prefill instance, requests on others, where each
        choice counts. Includes work of other schedulers by the last report; `load_of_others` is their share."""
        self.is_full = False
        """Whether the instance has just refused a request, and is left alone for REFUSED_S."""
        self.turn = 0
        """Number that the fleet sets anew whenever the instance gets a request: the lower, the longer ago."""
        self.num_inflight = self.num_pending = 0
        """Number of prompts on a prefill instance, and of requests that wait for room on a decode instance."""
        self.num_given = self.tokens_given = 0
        """Number of requests, and of their tokens, that were ever given to a decode instance."""
        self._given_at_report = 0, 0
        self.died: dict[str, None] = {}
        """Epochs of the instance's last lives that did not end in order."""
        self.links: dict[str, bool] = {}
        """State of a prefill instance's links, by epoch of the decode instance: connected (True), or cannot be for now
        (False). See links.py."""
        self._config, self._make, self._on_info, self._on_change = config, make_client, on_info, on_change
        self._following: asyncio.Task[None] | None = None
        self._outage: Reminder | None = None
        """Timer of warnings while the instance cannot be reached; else None."""
        self.client = self._make_client()

    def _make_client(self) -> InstanceClient:
        client = self._make(self.address)
        # The handle must hear of a loss even if no call waits there, because nothing more must be sent there.
        client.on_lost = lambda lost: self._client_lost(client, lost)
        client.on_doubt = lambda why: self._client_in_doubt(client, why)
        return client

    def _client_lost(self, client: InstanceClient, lost: PeerLost) -> None:
        if client is self.client:
            has_died = isinstance(lost, PeerDied)
            # If the instance says goodbye, whoever ended it knows: often it was the Ctrl-C that ends this process too.
            self.lost(str(lost), has_died=has_died, level=logging.WARNING if has_died else logging.INFO)

    def _client_in_doubt(self, client: InstanceClient, why: str) -> None:
        if client is self.client:
            self._pass_on(self.health.doubted(why))

    async def start(self) -> None:
        self._outage = Reminder(asyncio.get_running_loop().time())
        await self.client.start()
        self.health.why += self.client.problem
        self._following = asyncio.create_task(self._follow())

    async def close(self, why: str) -> None:
        following, self._following = self._following, None
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await self.client.close(why)

    @property
    def status(self) -> InstanceStatus:
        return self.health.state

    @property
    def epoch(self) -> str:
        """Epoch of the instance's present life; "" while it cannot be reached."""
        return self.info.epoch if self.info is not None else ""

    @property
    def stats(self) -> InstanceStats:
        """The last snapshot that the instance reported, with its present status and role."""
        last = self.last_stats
        if last is None or self.info is None:
            return InstanceStats(self.instance_id, self.role, self.status)
        return msgspec.structs.replace(last, status=self.status, role=self.role)

    def reports_room(self, num_tokens: int, num_choices: int = 1) -> bool:
        """Return whether the last report leaves room for one more request, besides those given since the report, and
        spare room for requests to grow. Each choice of a request counts as one; choices share their prompt's tokens."""
        info, report = self.info, self.last_stats
        if info is None or report is None or report.epoch != info.epoch or report.waiting_requests:
            return False
        num_requests = self.num_given - self._given_at_report[0] + num_choices
        tokens = self.tokens_given - self._given_at_report[1] + num_tokens
        num_blocks = tokens // max(1, info.block_size) + num_requests  # each request's last block is not full
        left = report.free_blocks - num_blocks
        return left >= info.num_blocks // SPARE_PART and report.active_requests + num_requests <= info.max_num_seqs

    async def refresh(self) -> None:
        """Ask the instance for its stats now. Raises what `RpcClient.call` raises."""
        given, client = (self.num_given, self.tokens_given), self.client
        stats = await client.call(STATS, Empty(), timeout_s=self._config.heartbeat_timeout_s)
        if client is self.client:  # otherwise it was dropped meanwhile, and these are stats of the life that ended
            self.last_stats, self._given_at_report = stats, given

    async def _follow(self, pause_s: float = 0.0) -> None:
        """Receive the instance's reports from when it can be reached until it is lost."""
        await asyncio.sleep(pause_s)
        complaint = asyncio.get_running_loop().call_later(SAY_AFTER_S, self._complain)

        def take(report: InstanceInfo | InstanceReport) -> None:
            complaint.cancel()
            self._take(report)

        try:
            async with self.client.stream(REPORTS, ReportsRequest(self._config.heartbeat_interval_s)) as reports:
                await reports.each(take)
            self.lost("it has ended its reports")
        except HBServeRpcError as error:
            self.lost(str(error))
        finally:
            complaint.cancel()

    def _take(self, report: InstanceInfo | InstanceReport) -> None:
        if isinstance(report, InstanceInfo):
            self.take_info(report)
            return
        self.last_stats, self._given_at_report = report.stats, (self.num_given, self.tokens_given)
        others = report.other_tokens if self.role == "prefill" else report.other_requests
        self.load += others - self.load_of_others
        self.load_of_others = others
        self.changed()

    def take_info(self, info: InstanceInfo) -> None:
        """Handle the instance's description of itself."""
        started_as = info.started_as or info.role
        if info.instance_id != self.instance_id or started_as != self.declared:
            self.lost(
                f"{self.address} is {started_as} instance {info.instance_id!r}, "
                f"not {self.declared} instance {self.instance_id!r}"
            )
            return
        if info.role != self.role:  # the two roles count load in different units
            logger.info("%s at %s is a %s instance now", self.instance_id, self.address, info.role)
            self.role, self.load, self.load_of_others = info.role, self.load - self.load_of_others, 0
        if self._outage is not None and self._outage.was_said:
            silent_s = asyncio.get_running_loop().time() - self._outage.began_s
            logger.warning("%s at %s is reachable, after %.0f s", self.instance_id, self.address, silent_s)
        self._outage = None
        self._set_info(info)

    def lost(self, why: str, *, has_died: bool = False, level: int = logging.WARNING) -> None:
        """Stop using the instance until it answers again. has_died: its process has ended, and not in order."""
        if has_died:
            self.note_death(self.epoch)
        if self.info is not None:
            self._outage = Reminder(asyncio.get_running_loop().time(), was_said=True)
            self.load -= self.load_of_others
            self.load_of_others = 0
            self._set_info(None)
        self._pass_on(self.health.lost(why), level=level)
        self._complain()
        # Whatever the cause, the instance must describe itself anew, unless the event loop is cancelling this task.
        if self._following is not None and not self._following.done():
            self._following.cancel()
            self._following = asyncio.create_task(self._follow(self._config.heartbeat_interval_s))

    def _set_info(self, info: InstanceInfo | None) -> None:
        if info is None or info.epoch != self.epoch:
            self.links.clear()
        is_another, self.info = info != self.info, info
        if info is not None:
            self._pass_on(self.health.answers(info), is_another=is_another)

    def drain(self, epoch: str) -> None:
        """Give it no new requests in the life of this epoch; with "" as the epoch, let it have some again."""
        self._pass_on(self.health.drain(epoch))

    def _pass_on(self, has_changed: bool, *, is_another: bool = False, level: int = logging.INFO) -> None:
        """Log and pass on a change of the instance's state; only pass on a change of its description."""
        if has_changed:
            why = f": {self.health.why}" if self.health.why else ""
            logger.log(level, "%s at %s is %s%s", self.instance_id, self.address, self.status, why)
        if has_changed or is_another:
            self._on_info(self)
            self.changed()

    def refused(self) -> None:
        """Send no requests there for now: other schedulers have given the instance more than its last report says."""
        if not self.is_full:
            self.is_full = True
            asyncio.get_running_loop().call_later(REFUSED_S, self._may_be_asked)
            self._on_change(self)

    def _may_be_asked(self) -> None:
        self.is_full = False
        self.changed()

    def changed(self) -> None:
        """Report that there may be more room than before."""
        self._on_change(self)

    def _complain(self) -> None:
        """Log that the instance cannot be reached, if a warning is due."""
        now_s = asyncio.get_running_loop().time()
        if self._outage is not None and self._outage.say_now(now_s):
            silent_s = now_s - self._outage.began_s
            logger.warning("not reachable for %.0f s; still trying: %s", silent_s, self.describe_problem())

    async def drop(self, why: str) -> None:
        """Fail everything that waits for the instance now, and not after missed heartbeats: it is known to be dead."""
        old, self.client = self.client, self._make_client()
        self.lost(why, has_died=True)
        await self.client.start()
        await old.close(why, error=PeerDied)

    def note_death(self, epoch: str) -> None:
        """Remember that a life of the instance has died, either of what it computed, or because it was killed. Which of
        the two cannot be told from here."""
        if epoch:
            self.died[epoch] = None
            while len(self.died) > MOST_DEATHS_KEPT:
                del self.died[next(iter(self.died))]

    def describe_problem(self) -> str:
        problem = self.health.why or f"it is {self.status}"
        return f"{self.instance_id} ({self.role}) at {self.address}: {problem}"


class Placement:
    """The places that one attempt has on its instances. They are taken when it is made, and given back one by one.

    `prefill` is None if `decode` computes the prompt too: a hybrid instance, or a decode instance on its own.
    """

    def __init__(
        self, prefill: InstanceHandle | None, decode: InstanceHandle, num_tokens: int, num_choices: int = 1
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.may_begin = prefill is not None and decode.reports_room(num_tokens, num_choices)
        """Whether the decode instance is expected to grant at once, so that the prompt may be computed before it
        has."""
        self._num_tokens = num_tokens
        self._num_choices = num_choices
        self.is_pending = prefill is not None or decode.role == "decode"
        """Whether the decode instance may not have found room yet."""
        self._prefilling = prefill is not None
        self._decoding = True
        decode.load += num_choices
        decode.num_given += num_choices
        decode.tokens_given += num_tokens
        decode.num_pending += self.is_pending
        if prefill is not None:
            prefill.num_inflight += 1
            prefill.load += num_tokens

    def granted(self) -> None:
        """Note that the decode instance has found room, or if it computes the prompt itself, that it has done so."""
        if self.is_pending:
            self.is_pending = False
            self.decode.num_pending -= 1
            self.decode.changed()

    def prefilled(self) -> None:
        """Note that the prefill instance is done with the request."""
        if self._prefilling and self.prefill is not None:
            self._prefilling = False
            self.prefill.num_inflight -= 1
            self.prefill.load -= self._num_tokens
            self.prefill.changed()

    def end(self) -> None:
        """Give back all places that are still taken."""
        if not self._decoding:  # this place is given back last, so all are
            return
        self.granted()
        self.prefilled()
        self._decoding = False
        self.decode.load -= self._num_choices
        self.decode.changed()

"""One attempt at a request, on a pair of instances or on one hybrid instance.

P is the prefill instance and D the decode instance. A leg is one stream, to either of them:

    DECODE to D ──▶ Granted (room, and where the KV goes) ──▶ TokenEvents of D
    PREFILL to P ──▶ first token ──▶ TransferDone          the grant comes in PREFILL, or after it in GRANT
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Coroutine
from typing import Any

from hbserve_rpc import EngineFailed, HBServeRpcError, InvalidRequest, Overloaded, PeerDied, PeerLost, RemoteError
from hbserve_rpc.counts import LinkCounts
from hbserve_rpc.messages import (
    DECODE,
    END_CHOICE,
    GENERATE,
    GRANT,
    PREFILL,
    DecodeRequest,
    EndChoice,
    GenerateRequest,
    Granted,
    GrantRequest,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.records import AttemptRecord
from hbserve_scheduler.instance_client import InstanceStream
from hbserve_scheduler.instances import InstanceHandle, Placement
from hbserve_scheduler.request import ScheduledRequest

logger = logging.getLogger(__name__)

VERDICT_TIMEOUT_S = 0.08
"""Time to wait, after one leg has failed, for what the other leg reports. Then the other is cancelled, so that all this
takes at most 0.1 s."""

ACCOUNT_TIMEOUT_S = 1.0
"""Time for which a request that has all its tokens waits to hear what P has moved, for its record: on a busy machine P
may be later than D's few tokens. The client already has its last token by then, but not the end of the stream."""


class Attempt:
    """One attempt, which follows a request until its last token. All ids that it uses are new, so that nothing of an
    earlier attempt can be mistaken for part of this one."""

    def __init__(self, entry: ScheduledRequest, placement: Placement) -> None:
        self._entry = entry
        self._placement = placement
        self._loop = asyncio.get_running_loop()
        self._is_debugged = logger.isEnabledFor(logging.DEBUG)
        prefill, decode = placement.prefill, placement.decode
        self._record = AttemptRecord(entry.since_submit_s(), (prefill or decode).instance_id, decode.instance_id)
        entry.attempts.append(self._record)
        self._transfer_id = os.urandom(16).hex()
        self._moving: LinkCounts | None = None
        """Counts of the link that the transfer uses, from the grant to the end of the transfer."""
        self._lives = [(handle, handle.epoch) for handle in (prefill, decode) if handle is not None]
        """Instances that compute for the request, each with its epoch at the start of the attempt."""
        self._request_id = f"{entry.request.request_id}.{self._transfer_id[:8]}"
        self._decode_epoch = ""
        """Epoch of D, if P computes for it."""
        self._first_token = asyncio.Event()
        self._decided = self._loop.create_future()
        """Future that is set when the last token has come, or a leg has failed."""

    def _decide(self) -> None:
        if not self._decided.done():
            self._decided.set_result(None)

    async def run(self) -> None:
        """Run the attempt. Raises HBServeRpcError if it fails; tokens delivered until then stay delivered."""
        try:
            await self._run()
            self._end_transfer("completed")
        except HBServeRpcError as error:
            self._end_transfer("failed")
            self._record.error = str(error)
            self._debug("failed: %s", error)
            if not isinstance(error, Overloaded):  # an instance that refuses has not computed anything
                self._entry.was_on += self._lives
            self._entry.num_tried = self._entry.num_delivered
            raise
        finally:
            self._end_transfer("aborted")
            self._record.ended_s = self._entry.since_submit_s()

    def _debug(self, what: str, *details: object) -> None:
        """Log, at level DEBUG, which phase the request has reached."""
        if self._is_debugged:
            at = self._entry.request.request_id, len(self._entry.attempts), 1e3 * self._entry.since_submit_s()
            logger.debug(f"request %s, attempt %d, %.1f ms: {what}", *at, *details)

    def _end_transfer(self, outcome: str) -> None:
        """Count the transfer as ended, unless it has been counted already."""
        if self._moving is not None:
            self._moving.end(outcome)
            self._moving = None

    async def _run(self) -> None:
        """Run the request on one instance, on P alone, or on P and D."""
        entry, place = self._entry, self._placement
        self._debug("placed on %s and %s", self._record.prefill_instance, self._record.decode_instance)
        if place.prefill is None:
            entry.figures.num_local_prefills += place.decode.role == "decode"
            await self._alone(place.decode)
        elif len(entry.output) + 1 >= entry.request.params.max_tokens:
            # Its only token comes from P: there is nothing to decode.
            self._record.decode_instance = ""
            self._placement.granted()
            await self._prefill(place.prefill, b"")
            self._require_end(place.prefill)
        else:
            await self._pair(place.prefill, place.decode)

    async def _alone(self, instance: InstanceHandle) -> None:
        """Run on a hybrid instance, or on a decode instance that computes the prompt itself."""
        entry = self._entry
        request = GenerateRequest(
            self._request_id,
            entry.request.prompt_token_ids,
            entry.request.params,
            [*entry.output],
            left_s=entry.left_s(),
        )
        try:
            async with instance.client.stream(GENERATE, request) as events:
                self._tell_ends_of_choices(instance)
                await events.each(self._take)
        except HBServeRpcError as error:
            raise self._note_failure(instance, error) from error
        finally:
            entry.on_choice_ended = None
        self._require_end(instance)

    def _take(self, event: Granted | TokenEvent) -> bool:
        """Deliver an event. Return True if no more events are wanted."""
        if isinstance(event, TokenEvent):
            self._deliver(event)
            if self._placement.is_pending:
                self._placement.granted()
        # All choices may have ended here, while the instance does not know it and goes on with those ended here.
        return bool(self._entry.choices) and self._entry.finish_reason is not None

    def _tell_ends_of_choices(self, instance: InstanceHandle) -> None:
        """Tell an instance which choices are no longer wanted, now and whenever another one ends."""
        if not self._entry.choices:
            return

        def tell(choice: int) -> None:
            with contextlib.suppress(PeerLost):
                instance.client.notify(END_CHOICE, EndChoice(self._request_id, choice))

        for each in self._entry.choices:
            if each.finish_reason is not None:
                tell(each.choice)
        self._entry.on_choice_ended = tell

    def _deliver(self, event: TokenEvent) -> None:
        self._entry.deliver(event)
        if self._record.first_token_s is None and event.token_ids:
            self._record.first_token_s = self._entry.since_submit_s()
            self._debug("first token")

    def _require_end(self, instance: InstanceHandle) -> None:
        """Raise RemoteError if the instance has ended its stream although the request has not ended."""
        if self._entry.finish_reason is None:
            problem = f"ended the stream after {len(self._entry.output)} tokens, without a finish reason"
            raise self._note_failure(instance, RemoteError(problem))

    async def _pair(self, prefill: InstanceHandle, decode: InstanceHandle) -> None:
        """Reserve on D, prefill on P, decode on D. If one leg fails, close the other and raise the cause."""
        entry, self._decode_epoch = self._entry, decode.epoch
        request = DecodeRequest(
            self._request_id,
            self._transfer_id,
            entry.request.prompt_token_ids,
            entry.request.params,
            [*entry.output],
            left_s=entry.left_s(),
            prefill_instance=prefill.instance_id,
        )
        async with decode.client.stream(DECODE, request) as events:
            if self._placement.may_begin:
                # The order matters: the prefill instance must know the request before it gets the grant.
                await self._both(
                    self._prefill(prefill, b"", grant_follows=True), self._grant_and_decode(prefill, decode, events)
                )
            else:
                grant = await self._reserve(decode, events)
                await self._both(self._prefill(prefill, grant), self._decode(decode, events))

    async def _reserve(self, decode: InstanceHandle, events: InstanceStream[Granted | TokenEvent]) -> bytes:
        """Wait for room on D, and return the grant."""
        try:
            granted = await anext(events, None)
            if granted is None:
                raise RemoteError("ended the stream before its grant")
            if not isinstance(granted, Granted):
                raise RemoteError(f"sent {type(granted).__name__} before its grant")
        except HBServeRpcError as error:
            raise self._note_failure(decode, error) from error
        self._record.granted_s = self._entry.since_submit_s()
        self._moving = self._entry.figures.link(self._record.prefill_instance, self._record.decode_instance)
        self._moving.active += 1
        self._debug("room on %s, %d tokens cached", self._record.decode_instance, granted.num_cached_tokens)
        self._placement.granted()
        self._entry.num_cached_tokens = granted.num_cached_tokens
        return granted.grant

    async def _grant_and_decode(
        self, prefill: InstanceHandle, decode: InstanceHandle, events: InstanceStream[Granted | TokenEvent]
    ) -> None:
        """Run D's leg when P computes already and waits for the grant."""
        try:
            grant = await self._reserve(decode, events)
        except InvalidRequest:
            raise
        except HBServeRpcError:
            # P's work is not lost: the client gets the first token, and the next attempt finds all but the last block
            # in P's prefix cache.
            with contextlib.suppress(PeerLost):
                prefill.client.notify(GRANT, GrantRequest(self._request_id, b""))
            await self._first_token.wait()  # if P fails instead, this leg is cancelled
            self._entry.computed_on = prefill.instance_id
            raise
        try:
            prefill.client.notify(GRANT, GrantRequest(self._request_id, grant))
        except HBServeRpcError as error:
            raise self._note_failure(prefill, error) from error
        await self._decode(decode, events)

    async def _both(self, *legs: Coroutine[Any, Any, None]) -> None:
        """Run P's leg and D's together.

        One leg may fail only because the other has ended, well or not, and its failure may be heard first. So the first
        failure is not raised at once. If both fail, P's is raised: P knows better why nothing more came from it.
        """
        prefill, decode = tasks = [self._loop.create_task(self._deciding(leg)) for leg in legs]
        try:
            await self._decided
            await self._hear_other(prefill, decode)
            if self._entry.finish_reason is None and self._record.decoding_s is not None and prefill.done():
                # D has sent tokens, so it has the KV, whatever has happened to P since.
                await decode
            for task in tasks:
                if task.done() and self._entry.finish_reason is None:
                    task.result()
        finally:
            if not all(task.done() and not task.cancelled() and task.exception() is None for task in tasks):
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _hear_other(self, prefill: "asyncio.Task[None]", decode: "asyncio.Task[None]") -> None:
        """Wait a moment for the leg that has not ended, if it may tell why the other failed, or what was moved."""
        # Without a grant, neither side knows why the other failed. Without a first token, D does not know why P failed.
        is_granted = self._record.granted_s is not None
        may_know = is_granted and (self._first_token.is_set() or not prefill.done())
        if may_know and not (prefill.done() and decode.done()):
            has_all = self._record.decoding_s is not None and self._entry.finish_reason is not None
            await asyncio.wait([prefill, decode], timeout=ACCOUNT_TIMEOUT_S if has_all else VERDICT_TIMEOUT_S)

    async def _deciding(self, leg: Coroutine[Any, Any, None]) -> None:
        try:
            await leg
        except BaseException:
            self._decide()
            raise

    async def _prefill(self, instance: InstanceHandle, grant: bytes, *, grant_follows: bool = False) -> None:
        entry = self._entry
        request = PrefillRequest(
            self._request_id,
            self._transfer_id,
            entry.request.prompt_token_ids,
            entry.request.params,
            grant,
            [*entry.output],
            grant_follows,
            left_s=entry.left_s(),
        )
        entry.is_prefilling = True
        try:
            async with instance.client.stream(PREFILL, request) as events:
                await events.each(self._take_prefilled)
            if not self._first_token.is_set():
                raise RemoteError("ended the stream before the first token")
        except HBServeRpcError as error:
            raise self._note_failure(instance, error) from error
        finally:
            entry.is_prefilling = False
            if entry.finish_reason is None:
                entry.tell_ends()
        self._lives = [life for life in self._lives if life[0] is not instance]  # P holds nothing of it any more
        self._placement.prefilled()

    def _take_prefilled(self, event: TokenEvent | TransferDone) -> bool:
        entry = self._entry
        if isinstance(event, TransferDone):
            entry.kv_bytes += event.num_bytes
            entry.kv_transfer_time_s += event.time_s
            self._note_moved(event)
            if self._placement.prefill is not None:
                self._placement.prefill.links[self._decode_epoch] = True
            return False
        self._deliver(event)
        if event.choice == entry.request.params.n - 1:  # choices come in order
            self._first_token.set()
        if entry.finish_reason is not None:
            self._decide()
        return False

    def _note_moved(self, done: TransferDone) -> None:
        if self._moving is not None:
            self._moving.num_bytes += done.num_bytes
            self._moving.time_s += done.time_s
        self._end_transfer("completed")
        now_s = self._record.kv_moved_s = self._entry.since_submit_s()
        self._debug("%d bytes of KV moved in %d parts, %.1f ms", done.num_bytes, done.num_parts, 1e3 * done.time_s)
        self._record.computed = [(now_s - each.age_s, each.count) for each in done.computed]
        self._record.pushed = [(now_s - each.age_s, each.count) for each in done.pushed]

    async def _decode(self, instance: InstanceHandle, events: InstanceStream[Granted | TokenEvent]) -> None:
        num_delivered = len(self._entry.output)
        # P sends prompt_logprobs with its first token; D does not have them.
        expects_logprobs = self._entry.request.params.prompt_logprobs is not None and num_delivered == 0
        early: list[TokenEvent] = []  # at most one, which has overtaken P's token on its own connection

        def take(event: Granted | TokenEvent) -> bool:
            if not isinstance(event, TokenEvent):
                return False
            if (event.index > num_delivered or expects_logprobs) and not self._first_token.is_set():
                early.append(event)
                return True
            return self._take_decoded(event)

        self._tell_ends_of_choices(instance)
        try:
            await events.each(take)
            if early:
                await self._first_token.wait()
                if not self._take_decoded(early[0]):
                    await events.each(take)
            if self._entry.finish_reason is None:
                await self._first_token.wait()
        except HBServeRpcError as error:
            raise self._note_failure(instance, error) from error
        finally:
            self._entry.on_choice_ended = None
        self._require_end(instance)
        self._decide()

    def _take_decoded(self, event: TokenEvent) -> bool:
        if self._record.decoding_s is None:
            self._record.decoding_s = self._entry.since_submit_s()
            self._debug("decodes")
        return self._take(event)

    def _doubt_link(self) -> None:
        """Make placements prefer other pairs for now: this one may have failed because it is no longer connected."""
        prefill = self._placement.prefill
        if prefill is not None and prefill.links.get(self._decode_epoch):
            del prefill.links[self._decode_epoch]

    def _note_failure(self, instance: InstanceHandle, error: HBServeRpcError) -> HBServeRpcError:
        """Note what an error says about its instance: a lost one, for example, is not used again until it has answered.
        Return the same error with the instance's name, to be raised."""
        problem = f"{instance.instance_id}: {error}"
        if isinstance(error, Overloaded):
            instance.refused()
            return Overloaded(problem, error.retry_after_s)
        self._entry.failed_on.add(instance.instance_id)
        self._doubt_link()
        if isinstance(error, EngineFailed | PeerDied):
            for epoch in [epoch for handle, epoch in self._lives if handle is instance]:
                instance.note_death(epoch)
        if isinstance(error, PeerLost):
            instance.lost(str(error))
        return type(error)(problem)

"""Sessions of a modelled instance. Each does the work of one request: compute a prompt, decode, both, or report.

A session is driven by its engine and by timers, and sends its answers to one stream.
"""

import math
from collections.abc import Callable
from typing import Any

from hbserve.simulator.engine import DecodeWork, PromptWork
from hbserve.simulator.instance import ModelledInstance
from hbserve.simulator.stream import Stream
from hbserve_rpc.messages import (
    DecodeRequest,
    FinishReason,
    GenerateRequest,
    Granted,
    InstanceInfo,
    PrefillRequest,
    TokenEvent,
    TransferDone,
)
from hbserve_rpc.reports import InstanceReport, ReportsRequest

TOKEN = 5
ZEROS = [TOKEN] * 4096


class Reporting:
    """A session that sends the instance's description, and then its figures whenever they have changed."""

    def __init__(
        self, instance: ModelledInstance, request: ReportsRequest, stream: Stream[InstanceInfo | InstanceReport]
    ) -> None:
        self._instance = instance
        self._interval_s = request.interval_s
        self._stream = stream
        self._last: InstanceReport | None = None
        stream.put(instance.info())
        self._report()

    def _report(self) -> None:
        report = InstanceReport(self._instance.figures())
        if report != self._last:
            self._last = report
            self._stream.put(report)
        self._timer = self._instance.loop.call_later(self._interval_s, self._report)

    def close(self) -> None:
        self._timer.cancel()


class RoomSession:
    """A session that needs room for a request, and decodes its tokens."""

    def __init__(
        self, instance: ModelledInstance, request: GenerateRequest | DecodeRequest, stream: Stream[Any]
    ) -> None:
        self._instance = instance
        self._request = request
        self._stream = stream
        self._first = len(request.output_token_ids)
        self.num_tokens = len(request.prompt_token_ids) + self._first
        self.num_choices = request.params.n
        self._last = request.params.max_tokens
        self._work: PromptWork | DecodeWork | None = None
        self._is_closed = False

    def enter(self) -> None:
        """Call `begin` two message times after there is room: one for the request to arrive, and one for the answer."""
        self._instance.loop.call_later(2 * self._instance.profile.message_s, self.begin)

    def begin(self) -> None:
        """Begin, unless the session was closed meanwhile."""
        raise NotImplementedError

    def _decode(self, first: int) -> None:
        """Decode the answer from token `first` on."""
        self._first = first
        self._work = DecodeWork(self.num_tokens, self._last - first, self._tell_first, self._tell_rest)
        self._instance.engine.add(self._work)

    def _tell_first(self, at_s: float) -> None:
        self._tell(1, at_s)

    def _tell_rest(self) -> None:
        self._tell(self._last - self._first, self._instance.loop.time())

    def _tell(self, count: int, at_s: float) -> None:
        """Send `count` tokens, which are computed at `at_s`."""
        event = _tokens(self._first, count, self._last)
        self._first += count
        put: Callable[[TokenEvent], None] = self._stream.put if event.finish_reason is None else self._stream.put_last
        self._instance.loop.call_at(at_s + self._instance.profile.message_s, put, event)

    def close(self) -> None:
        self._is_closed = True
        if self._work is not None:
            self._instance.engine.remove(self._work)
            self._work = None  # breaks a cycle of references: see Stream.__aexit__
        self._instance.let_out(self)


class Generating(RoomSession):
    """A request whose prefill and decode run on one instance."""

    def __init__(self, instance: ModelledInstance, request: GenerateRequest, stream: Stream[TokenEvent]) -> None:
        super().__init__(instance, request, stream)
        instance.let_in(self)

    def begin(self) -> None:
        if self._is_closed:
            return
        instance = self._instance
        cached = instance.cached(self._request.prompt_token_ids, self.num_tokens)
        self._work = PromptWork(self.num_tokens, cached, None, self._prompt_is_done)
        instance.engine.add(self._work)

    def _prompt_is_done(self) -> None:
        self._tell(1, self._instance.loop.time())
        if self._last > self._first:
            self._decode(self._first)
        self._instance.remember(self._request.prompt_token_ids)


class Decoding(RoomSession):
    """The decode half of a request: reserves room, waits for the KV, and decodes."""

    def __init__(
        self, instance: ModelledInstance, request: DecodeRequest, stream: Stream[Granted | TokenEvent]
    ) -> None:
        super().__init__(instance, request, stream)
        self._transfer_id = request.transfer_id
        self.cached_tokens = 0
        instance.fabric.reservations[request.transfer_id] = self
        instance.let_in(self)

    def begin(self) -> None:
        if self._is_closed:
            return
        self.cached_tokens = self._instance.cached(self._request.prompt_token_ids, self.num_tokens, counts=False)
        self._stream.put(Granted(self._transfer_id.encode(), self.cached_tokens))

    def kv_is_there(self) -> None:
        """Begin to decode: all KV has arrived, and the first token is known from the prefill instance.

        An idle engine begins its step some time after launching it. That time is as long as other steps are launched
        before the end of the previous one.
        """
        launch_s = self._instance.law.launched_ahead_s
        if launch_s and self._instance.engine.is_idle:
            self._instance.loop.call_later(launch_s, self._go_on)
        else:
            self._go_on()

    def _go_on(self) -> None:
        if not self._is_closed:
            self._decode(self._first + 1)

    def close(self) -> None:
        self._instance.remember(self._request.prompt_token_ids)
        del self._instance.fabric.reservations[self._transfer_id]
        super().close()


class Prefilling:
    """The prefill half of a request: computes the prompt, and moves each chunk's KV as soon as it is computed and
    granted."""

    def __init__(
        self, instance: ModelledInstance, request: PrefillRequest, stream: Stream[TokenEvent | TransferDone]
    ) -> None:
        self._instance = instance
        self._request = request
        self._stream = stream
        self._first = len(request.output_token_ids)
        self._moves = False
        """Whether KV has to be moved."""
        self._granted_s = math.inf
        """Time at which the grant arrives; infinite while that is not known."""
        if not request.grant_follows:
            self._moves, self._granted_s = bool(request.grant), -math.inf
        self._pushed: int | None = None
        self._is_computed = self._is_closed = False
        self._num_bytes = self._num_parts = 0
        self._time_s = 0.0
        count, prompt = len(request.prompt_token_ids) + self._first, request.prompt_token_ids
        self._work = PromptWork(count, instance.cached(prompt, count), self._push, self._computed)
        instance.begin_prefill(request.request_id, self.grant)
        instance.engine.add(self._work)

    def grant(self, moves: bool, at_s: float) -> None:
        """Take the grant, which arrives at `at_s`. Nothing is pushed before that time."""
        if self._granted_s == math.inf:
            self._moves, self._granted_s = moves, at_s
            if self._is_computed:
                self._instance.loop.call_at(at_s, self._tell_granted)

    def _computed(self) -> None:
        """Send what is left, if it is granted: the prompt is computed, and so are all other chunks of its last step."""
        instance = self._instance
        self._is_computed = True
        instance.remember(self._request.prompt_token_ids)
        now_s = instance.loop.time()
        if self._granted_s < now_s:
            self._tell(now_s + instance.profile.message_s, self._push(now_s))
        elif self._granted_s < math.inf:
            instance.loop.call_at(self._granted_s, self._tell_granted)

    def _tell_granted(self) -> None:
        """Send everything, if the grant came after the prompt was computed. The first token is held back until now, so
        that the wait for room is before the first token, and not between it and the second."""
        if not self._is_closed:
            moved_s = self._push(self._instance.loop.time())
            self._tell(moved_s, moved_s)

    def _tell(self, first_s: float, moved_s: float) -> None:
        """Send the first token, and then that the KV was moved, at these two times and in this order."""
        loop, last = self._instance.loop, self._request.params.max_tokens
        event = _tokens(self._first, 1, last)
        if self._moves and last > self._first + 1:
            done = TransferDone(self._num_bytes, self._num_parts, self._time_s)
            if moved_s > first_s:
                loop.call_at(first_s, self._stream.put, event)
                loop.call_at(moved_s, self._stream.put_last, done)
            else:  # one timer, because asyncio's own loop calls two of the same time in any order
                loop.call_at(first_s, self._put_both, event, done)
        else:
            loop.call_at(first_s, self._stream.put_last, event)

    def _put_both(self, event: TokenEvent, done: TransferDone) -> None:
        self._stream.put(event)
        self._stream.put_last(done)

    def _push(self, now_s: float) -> float:
        """Push the KV that has been computed. Returns when it will have arrived."""
        if not self._moves or now_s < self._granted_s:
            return now_s
        instance, work = self._instance, self._work
        reservation = None
        if self._pushed is None or work.done == work.num_tokens:
            reservation = instance.fabric.reservations.get(self._request.transfer_id)
        if self._pushed is None:
            self._pushed = reservation.cached_tokens if reservation is not None else 0
        end_s = now_s
        if (num_new := work.done - self._pushed) > 0:
            self._pushed = work.done
            num_bytes = num_new * instance.profile.kv_bytes_per_token
            begin_s, end_s = instance.move(num_bytes, now_s)
            self._num_bytes += num_bytes
            self._time_s += end_s - begin_s
        self._num_parts += 1
        end_s += instance.profile.handoff_s
        if reservation is not None and work.done == work.num_tokens:
            instance.loop.call_at(end_s, reservation.kv_is_there)
        return end_s

    def close(self) -> None:
        self._is_closed = True
        self._instance.engine.remove(self._work)
        self._instance.end_prefill(self._request.request_id)
        if self._is_computed:  # else the chunk that is under way will still be pushed
            del self._work  # breaks a cycle of references: see Stream.__aexit__


def _tokens(index: int, count: int, last: int) -> TokenEvent:
    ends: FinishReason | None = "length" if index + count >= last else None
    return TokenEvent(index, ZEROS[:count] if count <= len(ZEROS) else [TOKEN] * count, ends)

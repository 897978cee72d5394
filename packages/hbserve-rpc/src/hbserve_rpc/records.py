"""Records of requests: where each was and when, and how it ended. Log lines and statistics are made from them.

    submit        place           grant        first token     second        last
      ├── queue ────┤── reserve ────┤               │              │            │
                    ├────────── prefill ────────────┤── hand-off ──┤            │
                                                    ├────────── decode ─────────┤
An attempt that fails is followed by the next one, from `place` on.
"""

from typing import Literal

import msgspec

from hbserve_rpc.messages import FinishReason, RequestFinished
from hbserve_rpc.methods import Method

Delay = Literal["queue", "reservation", "transfer", "preemption", "retry"]
"""Cause for which a request waits, apart from its own computation: a place, room on the decode instance, its KV after
the prompt was computed, blocks that it had to give up, and another attempt."""
MUCH = 0.25
"""Part of a request's time from which on a delay is named as what held it up."""


class AttemptRecord(msgspec.Struct, tag=True):
    """One try at a request. Times are in seconds from `submit`, on the scheduler's clock; None: not reached."""

    began_s: float
    """Time when the attempt had its places on instances."""
    prefill_instance: str = ""
    decode_instance: str = ""
    """Id of the decode instance; empty if there was nothing to decode."""
    granted_s: float | None = None
    """Time when the decode instance had room."""
    first_token_s: float | None = None
    """Time when the first token of this attempt was there."""
    kv_moved_s: float | None = None
    """Time when the prefill instance said that all KV was moved. Coming from it, the news may be late."""
    decoding_s: float | None = None
    """Time when the first token of the decode instance was there, by which it had all KV."""
    computed: list[tuple[float, int]] = []
    """Times, and numbers of prompt tokens that the prefill instance had computed by then; one for each chunk. Times are
    late by at most the time that their message was under way. Empty if no KV was moved."""
    pushed: list[tuple[float, int]] = []
    """Times, and numbers of blocks that the prefill instance had handed over; one for each part of the transfer."""
    ended_s: float | None = None
    error: str = ""
    """Reason why the attempt failed; "" if it did not."""

    def waits(self, end_s: float) -> "dict[Delay, float]":
        """Return the time spent waiting for the decode instance's room, and then for the KV.

        end_s: when the request ended.
        """
        granted_s = end_s if self.granted_s is None else self.granted_s
        # The prompt may be computed before there is room; meanwhile nobody waits for room.
        before = [at_s for at_s, _ in self.computed if at_s <= granted_s]
        found: dict[Delay, float] = {"reservation": max(0.0, granted_s - max([self.began_s, *before]))}
        if (there_s := self.kv_there_s) is not None:
            computed_s = self.computed[-1][0] if self.computed else self.first_token_s or there_s
            found["transfer"] = max(0.0, there_s - max(computed_s, granted_s))
        return found

    @property
    def kv_there_s(self) -> float | None:
        """Time by which all KV was certainly with the decode instance; None: not reached."""
        if self.kv_moved_s is None or self.decoding_s is None:
            return self.decoding_s if self.kv_moved_s is None else self.kv_moved_s
        return min(self.kv_moved_s, self.decoding_s)

    @property
    def kv_overlap(self) -> float | None:
        """Fraction of the transfer's time, from its first part to its end, in which the prompt was being computed, so
        that nobody waited for the transfer. None: nothing was moved."""
        if self.kv_moved_s is None or not self.pushed or not self.computed:
            return None
        began_s = self.pushed[0][0]
        took_s = self.kv_moved_s - began_s
        return min(max((self.computed[-1][0] - began_s) / took_s, 0.0), 1.0) if took_s > 0 else 1.0

    @property
    def busy_instances(self) -> set[str]:
        """Ids of the instances that still have the request, as far as the scheduler knows."""
        if self.ended_s is not None:
            return set()
        return {self.decode_instance, self.prefill_instance if self.kv_moved_s is None else ""} - {""}


class RequestRecord(msgspec.Struct, frozen=True, tag=True):
    """Record of a request that has ended. Its times are like those of an AttemptRecord."""

    request_id: str
    submitted_at: float
    """Time of submission: Unix time, in seconds."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    kv_bytes: int
    kv_transfer_time_s: float
    attempts: list[AttemptRecord]
    e2e_s: float
    finish_reason: FinishReason | None
    """Reason why the request ended; None if it failed."""
    first_token_s: float | None = None
    second_token_s: float | None = None
    error: str = ""
    num_choices: int = 1
    """Number of choices. `num_output_tokens` counts the tokens of all; times other than the end are the first one's."""
    num_preemptions: int = 0
    """Number of preemptions of all choices: see TokenEvent."""
    stalled: tuple[float, float] | None = None
    """Start and end of the longest time between two messages with tokens, for a request that was preempted."""
    traceparent: str = ""
    """W3C traceparent: the trace that the request belongs to, and the span in it that made the request; "": none."""

    @property
    def queue_s(self) -> float:
        """Time until the request had its first places on instances, or until its end if it never had any."""
        return self.attempts[0].began_s if self.attempts else self.e2e_s

    @property
    def handoff_s(self) -> float | None:
        """Time from the first token to the second (see RequestFinished.handoff_s); None if there is no second one."""
        if self.first_token_s is None or self.second_token_s is None:
            return None
        return self.second_token_s - self.first_token_s

    @property
    def decode_s(self) -> float | None:
        """Time from the first token to the end; None if there was no token."""
        return None if self.first_token_s is None else self.e2e_s - self.first_token_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first (see RequestFinished.tpot_s); None if there is at most one."""
        num_tokens = self.num_output_tokens / self.num_choices
        return decode_s / (num_tokens - 1) if (decode_s := self.decode_s) and num_tokens > 1 else None

    @property
    def delays(self) -> dict[Delay, float]:
        """Time in seconds that the request waited, by cause."""
        found: dict[Delay, float] = {"queue": self.queue_s}
        if self.attempts:
            last = self.attempts[-1]
            if len(self.attempts) > 1:
                found["retry"] = last.began_s - self.queue_s
            if self.is_disaggregated:
                found |= last.waits(self.e2e_s)
        if self.stalled is not None:
            found["preemption"] = self.stalled[1] - self.stalled[0]
        return found

    @property
    def main_delay(self) -> Delay | None:
        """Cause of the longest delay, if it held the request up for much of its time; else None."""
        return self.main_of(self.delays)

    def main_of(self, delays: dict[Delay, float]) -> Delay | None:
        """Return `main_delay`, for callers that have computed the `delays` already."""
        cause = max(delays, key=delays.__getitem__)
        return cause if delays[cause] > MUCH * self.e2e_s else None

    @property
    def is_disaggregated(self) -> bool:
        """Whether the last attempt prefilled on one instance and decoded on another."""
        return bool(self.attempts) and self.attempts[-1].decode_instance not in ("", self.attempts[-1].prefill_instance)

    def finished(self, reason: FinishReason, choice: int = 0) -> RequestFinished:
        """Make the last item of the client's stream, for the request or for one of its choices."""
        last = self.attempts[-1] if self.attempts else AttemptRecord(0.0)
        return RequestFinished(
            reason,
            self.num_prompt_tokens,
            self.num_output_tokens,
            queue_time_s=self.queue_s,
            ttft_s=self.e2e_s if self.first_token_s is None else self.first_token_s,
            tpot_s=self.tpot_s or 0.0,
            e2e_s=self.e2e_s,
            handoff_s=self.handoff_s or 0.0,
            kv_bytes=self.kv_bytes,
            kv_transfer_time_s=self.kv_transfer_time_s,
            num_cached_tokens=self.num_cached_tokens,
            num_attempts=len(self.attempts),
            prefill_instance=last.prefill_instance,
            decode_instance=last.decode_instance,
            choice=choice,
        )

    def describe(self) -> str:
        """Return a line for the log. It has figures only, and no text from outside but the error's."""
        tokens = f"{self.num_prompt_tokens} + {self.num_output_tokens} tokens"
        if self.num_choices > 1:
            tokens += f" of {self.num_choices} choices"
        if self.num_cached_tokens:
            tokens += f" ({self.num_cached_tokens} cached)"
        how = f"failed: {self.error}" if self.finish_reason is None else self.finish_reason
        line = f"request {self.request_id}: {tokens}, {_ms(self.e2e_s)} ({', '.join(self._phases())})"
        if self.attempts:
            last = self.attempts[-1]
            line += f", {last.prefill_instance}"
            line += f" > {last.decode_instance}" if self.is_disaggregated else ""
        failed = [f"attempt {i}: {each.error}" for i, each in enumerate(self.attempts, 1) if each.error]
        if failed and self.finish_reason is not None:
            how += f" after {'; '.join(failed)}"
        if self.held_up:
            how += f"; {self.held_up}"
        return f"{line}: {how}" + (f"; trace {self.traceparent.split('-')[1]}" if self.traceparent else "")

    @property
    def held_up(self) -> str:
        """The main delay in words, or "" if there is none."""
        cause, last = self.main_delay, self.attempts[-1] if self.attempts else AttemptRecord(0.0)
        if cause is None:
            return ""
        how_long = _ms(self.delays[cause])
        match cause:
            case "queue":
                return f"waited {how_long} in the queue"
            case "reservation":
                return f"waited {how_long} for room on {last.decode_instance}"
            case "transfer":
                return f"waited {how_long} for its KV from {last.prefill_instance} to {last.decode_instance}"
            case "preemption":
                times = "once" if self.num_preemptions == 1 else f"{self.num_preemptions} times"
                return f"preempted {times}, and paused for {how_long}"
            case "retry":
                return f"lost {how_long} to failed attempts"

    def _phases(self) -> list[str]:
        phases = [f"queue {_ms(self.queue_s)}"]
        if self.attempts:
            last = self.attempts[-1]
            if self.is_disaggregated and last.granted_s is not None:
                phases.append(f"reserve {_ms(last.granted_s - last.began_s)}")
            if last.first_token_s is not None:
                phases.append(f"prefill {_ms(last.first_token_s - last.began_s)}")
        if self.kv_bytes:
            phases.append(f"KV {self.kv_bytes / 2**20:.1f} MiB in {_ms(self.kv_transfer_time_s)}")
        if self.handoff_s is not None:
            phases.append(f"{'hand-off' if self.is_disaggregated else 'second token'} {_ms(self.handoff_s)}")
        if self.decode_s is not None and self.num_output_tokens > 1:
            phases.append(f"decode {_ms(self.decode_s)}")
        return phases


def _ms(time_s: float) -> str:
    return f"{1e3 * time_s:.1f} ms" if time_s < 0.1 else f"{1e3 * time_s:.0f} ms"


class RecordsRequest(msgspec.Struct, frozen=True, tag=True):
    """Request for records of requests that ended in the last `last_s` seconds; only of `request_id` unless it is ""."""

    last_s: float
    request_id: str = ""


class Records(msgspec.Struct, frozen=True, tag=True):
    """Records of requests, in the order in which these ended. The scheduler does not remember all requests."""

    requests: list[RequestRecord]


SCHEDULER_RECORDS: Method[RecordsRequest, Records] = Method("scheduler.records", RecordsRequest, Records)

"""Records of requests: where each was, when, and how it ended. Log lines and figures are read from them.

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
"""What a request may wait for beside its own computation: a place, room on the decode instance, its KV after the prompt
was computed, blocks that it had to give up, and another attempt."""
MUCH = 0.25
"""Part of its time for which a request is held up by something that is to be named."""


class AttemptRecord(msgspec.Struct, tag=True):
    """One try at a request. Times are in seconds from `submit`, on the scheduler's clock; None: not reached."""

    began_s: float
    """It had its places."""
    prefill_instance: str = ""
    decode_instance: str = ""
    """Empty if there was nothing to decode."""
    granted_s: float | None = None
    """The decode instance had room."""
    first_token_s: float | None = None
    """The first token of this attempt was there."""
    kv_moved_s: float | None = None
    """The prefill instance has said that all KV is there. That comes by way of it, and may be late."""
    decoding_s: float | None = None
    """The first token of the decode instance was there, and so was the KV."""
    computed: list[tuple[float, int]] = []
    """When the prefill instance had computed how many tokens of the prompt: one for each chunk. As late as the message
    that told it was under way, at most; what moved no KV has none."""
    pushed: list[tuple[float, int]] = []
    """When it had handed over how many blocks: one for each part of the transfer."""
    ended_s: float | None = None
    error: str = ""
    """Why it failed."""

    def waits(self, end_s: float) -> "dict[Delay, float]":
        """For the decode instance's room and then for the KV; `end_s` is when the request ended."""
        granted_s = end_s if self.granted_s is None else self.granted_s
        # The prompt may be computed before there is room, and nobody waits for that meanwhile.
        before = [at_s for at_s, _ in self.computed if at_s <= granted_s]
        found: dict[Delay, float] = {"reservation": max(0.0, granted_s - max([self.began_s, *before]))}
        if (there_s := self.kv_there_s) is not None:
            computed_s = self.computed[-1][0] if self.computed else self.first_token_s or there_s
            found["transfer"] = max(0.0, there_s - max(computed_s, granted_s))
        return found

    @property
    def kv_there_s(self) -> float | None:
        """All KV was with the decode instance, at the latest."""
        if self.kv_moved_s is None or self.decoding_s is None:
            return self.decoding_s if self.kv_moved_s is None else self.kv_moved_s
        return min(self.kv_moved_s, self.decoding_s)

    @property
    def kv_overlap(self) -> float | None:
        """Part of the transfer's time, from its first part to its end, in which the prompt was still being computed:
        nobody waited for that. None: nothing was moved."""
        if self.kv_moved_s is None or not self.pushed or not self.computed:
            return None
        began_s = self.pushed[0][0]
        took_s = self.kv_moved_s - began_s
        return min(max((self.computed[-1][0] - began_s) / took_s, 0.0), 1.0) if took_s > 0 else 1.0

    @property
    def busy_instances(self) -> set[str]:
        """Those that have it still, as far as the scheduler was told."""
        if self.ended_s is not None:
            return set()
        return {self.decode_instance, self.prefill_instance if self.kv_moved_s is None else ""} - {""}


class RequestRecord(msgspec.Struct, frozen=True, tag=True):
    """A request that has ended. Times as an attempt's."""

    request_id: str
    submitted_at: float
    """Unix time, in seconds."""
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    kv_bytes: int
    kv_transfer_time_s: float
    attempts: list[AttemptRecord]
    e2e_s: float
    finish_reason: FinishReason | None
    """None: it has failed."""
    first_token_s: float | None = None
    second_token_s: float | None = None
    error: str = ""
    num_choices: int = 1
    """Their tokens are all in `num_output_tokens`; other times than the end are of the first one."""
    num_preemptions: int = 0
    """Of all choices: see TokenEvent."""
    stalled: tuple[float, float] | None = None
    """Of one that was preempted, the longest time between two messages with tokens: from, and to."""
    traceparent: str = ""
    """The trace that it belongs to, and the span in it that has asked; "": none."""

    @property
    def queue_s(self) -> float:
        """Until it had its first places, or its end if it never had any."""
        return self.attempts[0].began_s if self.attempts else self.e2e_s

    @property
    def handoff_s(self) -> float | None:
        """See RequestFinished.handoff_s."""
        if self.first_token_s is None or self.second_token_s is None:
            return None
        return self.second_token_s - self.first_token_s

    @property
    def decode_s(self) -> float | None:
        """First token to the end."""
        return None if self.first_token_s is None else self.e2e_s - self.first_token_s

    @property
    def tpot_s(self) -> float | None:
        """See RequestFinished.tpot_s; None: there was one token at most."""
        num_tokens = self.num_output_tokens / self.num_choices
        return decode_s / (num_tokens - 1) if (decode_s := self.decode_s) and num_tokens > 1 else None

    @property
    def delays(self) -> dict[Delay, float]:
        """Seconds that it waited, by cause."""
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
        """The longest of them, if the request was held up by it for much of its time."""
        return self.main_of(self.delays)

    def main_of(self, delays: dict[Delay, float]) -> Delay | None:
        """`main_delay`, where its `delays` are known."""
        cause = max(delays, key=delays.__getitem__)
        return cause if delays[cause] > MUCH * self.e2e_s else None

    @property
    def is_disaggregated(self) -> bool:
        """Whether its last attempt prefilled on one instance and decoded on another."""
        return bool(self.attempts) and self.attempts[-1].decode_instance not in ("", self.attempts[-1].prefill_instance)

    def finished(self, reason: FinishReason, choice: int = 0) -> RequestFinished:
        """What its client hears of it, or of one choice."""
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
        """One line for the log: figures only, no text of anybody's but the error's."""
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
        """The main delay in words; "": there is none."""
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
    """Requests that ended within the last `last_s` seconds, and of these one alone if `request_id` says which."""

    last_s: float
    request_id: str = ""


class Records(msgspec.Struct, frozen=True, tag=True):
    """In the order in which they ended; the scheduler does not remember all."""

    requests: list[RequestRecord]


SCHEDULER_RECORDS: Method[RecordsRequest, Records] = Method("scheduler.records", RecordsRequest, Records)

"""Backoff before a peer that could not be reached is tried again. No I/O; time is given by the caller.

After a failure nothing is tried for a while, which doubles up to a limit; then one attempt decides (half-open). There
is no state in which a peer is given up.
"""

from dataclasses import dataclass

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 10.0


@dataclass
class Breaker:
    num_failures: int = 0
    retry_at_s: float = 0.0
    last_error: str = ""

    def refusal(self, now_s: float) -> str:
        """Why no attempt should be made now; "" if one should."""
        if now_s >= self.retry_at_s:
            return ""
        pause_s = self.retry_at_s - now_s
        return f"failed {self.num_failures} times, last: {self.last_error}; tried again in {pause_s:.1f} s"

    def failed(self, error: str, now_s: float) -> None:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self.num_failures, 16))
        self.num_failures += 1
        self.retry_at_s, self.last_error = now_s + pause_s, error

    def is_stale(self, now_s: float) -> bool:
        """So long after the last failure that it says nothing any more."""
        return now_s > self.retry_at_s + LONGEST_PAUSE_S

"""Timing of warnings that something is wrong: at once, then less and less often, for as long as it lasts."""

import math


class Reminder:
    """Of one trouble, from when it begins until it is over. The caller supplies the time, in seconds."""

    def __init__(
        self, now_s: float, *, was_said: bool = False, first_pause_s: float = 10.0, longest_pause_s: float = 300.0
    ) -> None:
        """was_said: somebody says now that it has begun. Each pause is twice as long as the one before it."""
        self.began_s = now_s
        self.was_said = False
        self._due_s, self._pause_s, self._longest_pause_s = -math.inf, first_pause_s, longest_pause_s
        if was_said:
            self.say_now(now_s)

    def say_now(self, now_s: float) -> bool:
        """Whether to say it now; then it counts as said."""
        if now_s < self._due_s:
            return False
        self.was_said, self._due_s = True, now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        return True

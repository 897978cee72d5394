"""Timing of warnings about a lasting problem: at once, then less and less often for as long as it lasts."""

import math


class Reminder:
    """Timer of the warnings about one problem, from its beginning to its end. The caller supplies times, in seconds."""

    def __init__(
        self, now_s: float, *, was_said: bool = False, first_pause_s: float = 10.0, longest_pause_s: float = 300.0
    ) -> None:
        """Begin at `now_s`. Each pause between two warnings is twice as long as the one before.

        was_said: whether the beginning is being logged already, which counts as the first warning.
        """
        self.began_s = now_s
        self.was_said = False
        self._due_s, self._pause_s, self._longest_pause_s = -math.inf, first_pause_s, longest_pause_s
        if was_said:
            self.say_now(now_s)

    def say_now(self, now_s: float) -> bool:
        """Return whether to log a warning now. If so, it counts as logged."""
        if now_s < self._due_s:
            return False
        self.was_said, self._due_s = True, now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
        return True

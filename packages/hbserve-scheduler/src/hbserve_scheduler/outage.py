"""The time in which an instance is not reached, and when that is to be said."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0


class Outage:
    """Said at the first failure, and then ever more rarely."""

    def __init__(self, now_s: float, *, was_said: bool = False) -> None:
        self.began_s = now_s
        self.was_said = was_said
        self._pause_s = FIRST_PAUSE_S
        self._said_s = now_s

    def is_due(self, now_s: float) -> bool:
        """Whether it is to be said now; it counts as said then."""
        if self.was_said and now_s - self._said_s < self._pause_s:
            return False
        if self.was_said:
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self.was_said, self._said_s = True, now_s
        return True

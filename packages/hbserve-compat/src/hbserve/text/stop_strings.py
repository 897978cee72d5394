"""Search for stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first, and of several that are complete at the same character the longest.

    So the result depends on the text alone, not on the pieces in which it comes. The time is linear in the text,
    however long the stop strings are (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        """Length of the longest prefix of each stop string with which the text ends."""
        self.found: str | None = None
        """The stop string that was found; None: none so far."""

    def feed(self, text: str) -> int:
        """Add a piece of text. Must not be called after a stop string was found.

        Returns:
            If one was `found`, how many of the last characters are the stop string and what follows it; otherwise, how
            many of them may become a stop string.
        """
        for position, character in enumerate(text):
            complete = ""
            for number, (stop, borders) in enumerate(self._stops):
                matched = _longer(stop, borders, self._matched[number], character)
                self._matched[number] = matched
                if matched == len(stop) > len(complete):
                    complete = stop
            if complete:
                self.found = complete
                return len(complete) + len(text) - position - 1
        return max(self._matched, default=0)


def _longer(stop: str, borders: Sequence[int], matched: int, character: str) -> int:
    """Return the length of the prefix of `stop` with which the text ends after one more character. `matched`, which is
    less than all of it, is that length before."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)


def _borders(stop: str) -> list[int]:
    """Return, for each prefix of `stop`, the length of the longest shorter prefix with which it ends."""
    borders = [0] * len(stop)
    for end in range(1, len(stop)):
        borders[end] = _longer(stop, borders, borders[end - 1], stop[end])
    return borders

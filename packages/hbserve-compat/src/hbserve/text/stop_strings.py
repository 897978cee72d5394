"""Stop strings in a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Looks for the stop string that is complete first, and among several complete at once for the longest.

    So what is found depends on the text alone, not on the pieces in which it comes. The time is linear in the text,
    however long stop strings are (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        """How much of each stop string's beginning the text ends with."""
        self.found: str | None = None
        """The one that has come."""

    def feed(self, text: str) -> int:
        """Add a piece of text; not once one was found.

        Returns:
            How many of the last characters are a stop string and what follows it, if one was `found`; otherwise, how
            many of them may become one.
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
    """How much of `stop` the text ends with after one more character, if it ended with `matched` before, not all."""
    while matched and stop[matched] != character:
        matched = borders[matched - 1]
    return matched + (stop[matched] == character)


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`, the length of the longest shorter one that it ends with."""
    borders = [0] * len(stop)
    for end in range(1, len(stop)):
        borders[end] = _longer(stop, borders, borders[end - 1], stop[end])
    return borders

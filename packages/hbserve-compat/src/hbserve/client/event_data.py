"""Parser of server-sent events as OpenAI's API sends them: one line of data for each, and `[DONE]` after the last."""


class EventData:
    """Extracts the data of the events from one answer's body."""

    def __init__(self) -> None:
        self._held = b""
        self.any = False
        """Whether there was an event yet."""
        self.are_done = False
        """Whether `[DONE]` has come, after which no event is to be expected."""

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of each event that this piece of the body completes. The space after `data:` is optional."""
        *lines, self._held = (self._held + piece).split(b"\n")
        found = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        self.any = self.any or bool(found)
        self.are_done = self.are_done or b"[DONE]" in found
        return [data for data in found if data != b"[DONE]"]

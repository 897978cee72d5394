"""Parser of server-sent events as OpenAI's API sends them: one line of data for each, and `[DONE]` after the last."""


class EventData:
    """Extracts the data of the events from one answer's body."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of each event that this piece of the body completes. The space after `data:` is optional."""
        *lines, self._held = (self._held + piece).split(b"\n")
        return [data for line in lines if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]"]

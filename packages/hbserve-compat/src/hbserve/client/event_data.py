"""Data of server-sent events, as OpenAI's API sends them: one line each, and `[DONE]` behind the last."""


class EventData:
    """Reads one answer's body."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, piece: bytes) -> list[bytes]:
        """The data that is whole with this piece of the body; a space after `data:` need not be there."""
        *lines, self._held = (self._held + piece).split(b"\n")
        return [data for line in lines if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]"]

"""The places that one attempt takes on its instances, and when it gives each back."""

from hbserve_scheduler.instances import InstanceHandle


class Placement:
    """Taken when made. `prefill` is None on a hybrid instance, which is then `decode`."""

    def __init__(
        self, prefill: InstanceHandle | None, decode: InstanceHandle, num_tokens: int, num_choices: int = 1
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.may_begin = prefill is not None and decode.reports_room(num_tokens, num_choices)
        """The decode instance is expected to grant at once: the prompt may be computed before it has."""
        self._num_tokens = num_tokens
        self._num_choices = num_choices
        self._pending = prefill is not None
        self._prefilling = prefill is not None
        self._decoding = True
        decode.load += num_choices
        decode.num_given += num_choices
        decode.tokens_given += num_tokens
        if prefill is not None:
            decode.num_pending += 1
            prefill.num_inflight += 1
            prefill.load += num_tokens

    def granted(self) -> None:
        """The decode instance has found room."""
        if self._pending:
            self._pending = False
            self.decode.num_pending -= 1
            self.decode.changed()

    def prefilled(self) -> None:
        """The prefill instance is done with the request."""
        if self._prefilling and self.prefill is not None:
            self._prefilling = False
            self.prefill.num_inflight -= 1
            self.prefill.load -= self._num_tokens
            self.prefill.changed()

    def end(self) -> None:
        """Give back what is still taken."""
        self.granted()
        self.prefilled()
        if self._decoding:
            self._decoding = False
            self.decode.load -= self._num_choices
            self.decode.changed()

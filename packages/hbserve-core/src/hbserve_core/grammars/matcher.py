"""Position of one request's output in its grammar, and the tokens that may come next.

Another thread takes in a token and computes the mask of the tokens that may follow, usually in 0.1 ms, but a schema can
be designed so that it takes half a second.
Shapes: V vocab_size.
"""

from collections.abc import Sequence as Ids
from concurrent.futures import Future
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from hbserve_core.grammars.compilation import shortened
from hbserve_core.grammars.workers import Workers
from hbserve_rpc import InvalidRequest, SamplingParams

Mask = npt.NDArray[np.int32]
"""Mask of tokens, (ceil(V / 32),): bit i of word j says whether token 32 * j + i is allowed."""

_DEAD_END = "NoExtensionBias"
"""Message of llguidance for a grammar that is not complete and allows nothing, because it cannot be fulfilled, such as
{"$ref": "#"}."""


class Matcher:
    """Matcher of one request's grammar. It belongs to the engine's thread, like the request. When the grammar is
    complete and allows nothing more, the tokens that end a sequence are allowed."""

    def __init__(self, matcher: Any, ends: Mask, params: SamplingParams, output: Ids[int], workers: Workers) -> None:
        """Compute the first mask. So a matcher should be made in a thread that may take its time.

        matcher: llguidance's matcher at the grammar's beginning, which from now on belongs to this object. ends: the
        mask of tokens that end a sequence. output: the request's tokens so far. workers: threads in which the matcher
        is advanced.

        Raises:
            InvalidRequest: the output does not follow the grammar, or computing its first mask takes too long.
        """
        self._matcher = matcher
        self._ends = ends
        self._goes_on = params.ignore_eos
        self._min_tokens = params.min_tokens
        self._workers = workers
        self._num_tokens = 0
        self._computing: Future[None] | None = None
        self._was_late = False
        self.error = ""
        """Reason why the request cannot continue; set when a mask cannot be computed."""
        self.mask: Mask = np.zeros_like(ends)
        """Mask of the next token. Valid when `is_ready` returns true."""
        self._address = self.mask.ctypes.data
        if not matcher.consume_tokens(list(output)):
            raise InvalidRequest(
                f"output_token_ids: do not follow structured_outputs: {shortened(matcher.get_error())}"
            )
        self._num_tokens = len(output)
        self._compute()
        if self.error:
            raise InvalidRequest(self.error)

    def advance(self, token: int) -> None:
        """Take in the next output token, without waiting. Must not be called before `is_ready` has returned true."""
        self._was_late = False
        self._computing = self._workers.submit(lambda: self._take(token))

    def forked(self, token: int) -> "Matcher":
        """Make a copy that continues from here with an output token of its own, and becomes ready as after `advance`.
        This matcher must be ready, and must not be advanced any more."""
        other = copy(self)
        other.mask = np.zeros_like(self.mask)
        other._address = other.mask.ctypes.data
        other._computing = self._workers.submit(lambda: other._take_apart(token))
        return other

    def is_ready(self, timeout_s: float = 0.0) -> bool:
        """Return whether the mask of the next token has been computed, after waiting for it up to `timeout_s`. A mask
        that was late once is not waited for again."""
        if self._computing is None:
            return True
        try:
            self._computing.result(0.0 if self._was_late else max(0.0, timeout_s))
        except TimeoutError:
            self._was_late = True
            return False
        self._computing = None
        return True

    def _take_apart(self, token: int) -> None:
        self._matcher = self._matcher.deep_copy()
        self._take(token)

    def _take(self, token: int) -> None:
        self._num_tokens += 1
        if self._matcher.consume_token(token):
            self._compute()
        else:
            self._fail()

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._address, self.mask.nbytes)
        if self._matcher.is_error():
            self._fail()
        elif self._goes_on or self._num_tokens < self._min_tokens:
            others = self.mask & ~self._ends
            if others.any():
                self.mask[:] = others

    def _fail(self) -> None:
        why = shortened(self._matcher.get_error())
        if why == _DEAD_END:
            why = "none that the model has can follow"
        self.error = f"structured_outputs: output token {self._num_tokens} cannot be chosen: {why}"

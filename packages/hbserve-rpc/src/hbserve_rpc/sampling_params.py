"""How the next token of one request is chosen, and when the request ends."""

import math
from collections.abc import Callable

import msgspec

from hbserve_rpc.errors import InvalidRequest

MAX_STOP_STRINGS = 16
LARGEST_INT = 2**63 - 1
"""What every reader of the wire format can hold."""


class SamplingParams(msgspec.Struct):
    """Sampling parameters of one request.

    The first three fields are nano-vllm's, in its order, so they may be given by position.

    Raises:
        InvalidRequest: (a ValueError) a value out of its range; the message names the field, the value and the range.
    """

    temperature: float = 1.0
    """Divides the logits. 0 is greedy: the most likely token, every time. Any other number may be as small or as large
    as a float can be: it comes ever closer to greedy, or to a choice by chance alone."""
    max_tokens: int = 64
    """Most tokens to generate, an end-of-sequence token included."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token."""
    top_k: int = -1
    """Sample among the k most likely tokens only; -1 or 0 is off."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities add up to top_p; 1 is off."""
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens, whatever else is in the batch."""
    stop: list[str] = []
    """Strings that end the text; they are not part of it. Applied where text is made, by the client."""
    stop_token_ids: list[int] = []
    """Token ids that end the request, beside the model's own end-of-sequence ids."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.validate()

    def validate(self) -> None:
        """Check every field again: they may be set after construction.

        Raises:
            InvalidRequest: as the class says.
        """
        _require_number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "a number >= 0")
        _require_int("max_tokens", self.max_tokens, 1)
        _require_int("top_k", self.top_k, -1)
        _require_number("top_p", self.top_p, lambda v: 0 < v <= 1, "a number in (0, 1]")
        if self.seed is not None:
            _require_int("seed", self.seed, 0)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest(f"ignore_eos={self.ignore_eos!r}: expected True or False")
        _require_list("stop", self.stop)
        _require_list("stop_token_ids", self.stop_token_ids)
        if len(self.stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in self.stop):
            raise InvalidRequest(f"stop={self.stop!r}: expected at most {MAX_STOP_STRINGS} non-empty strings")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0)


def _require_number(name: str, value: object, allowed: Callable[[float], bool], expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not allowed(value):
        raise InvalidRequest(f"{name}={value!r}: expected {expected}")
    if isinstance(value, int) and value > LARGEST_INT:
        raise InvalidRequest(f"{name}={value!r}: expected a float, or an integer up to {LARGEST_INT}")


def _require_int(name: str, value: object, low: int, high: int = LARGEST_INT) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"{name}={value!r}: expected an integer from {low} to {high}")


def _require_list(name: str, value: object) -> None:
    if not isinstance(value, (list, tuple)):
        raise InvalidRequest(f"{name}={value!r}: expected a list")

"""The rules by which the next token of one request is chosen, and by which the request ends."""

import contextlib
import math
from collections.abc import Callable
from numbers import Real

import msgspec

from hbserve_rpc.errors import InvalidRequest
from hbserve_rpc.plain_values import LARGEST_INT, plain_bool, plain_int, plain_items, plain_scalar, plain_text, shown

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
"""Each generated token is looked for among them."""


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
        self.validate()

    def validate(self) -> None:
        """Make every field plain, and check it again: they may be set after construction.

        Numbers may be of numpy or torch, lists any ordered iterable; None is no list, and one stop string is a list of
        one.

        Raises:
            InvalidRequest: as the class says.
        """
        self.temperature = _plain_number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "a number >= 0")
        self.max_tokens = plain_int("max_tokens", self.max_tokens, 1)
        self.top_k = plain_int("top_k", self.top_k, -1)
        self.top_p = _plain_number("top_p", self.top_p, lambda v: 0 < v <= 1, "a number in (0, 1]")
        if self.seed is not None:
            self.seed = plain_int("seed", self.seed, 0)
        self.ignore_eos = plain_bool("ignore_eos", self.ignore_eos)
        self.stop = _plain_stop(self.stop)
        self.stop_token_ids = _plain_stop_token_ids(self.stop_token_ids)

    def copied(self) -> "SamplingParams":
        """Another one, checked, that shares nothing with this one: what is kept of a call."""
        return SamplingParams(*(getattr(self, name) for name in self.__struct_fields__))


def _plain_number(name: str, value: object, allowed: Callable[[float], bool], expected: str) -> float:
    value = plain_scalar(value)
    if isinstance(value, int) and int.__gt__(value, LARGEST_INT):  # a subclass may compare otherwise, or raise
        expected += f", as a float or an integer up to {LARGEST_INT}"
    elif isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(Exception):  # a fraction beyond all floats; a __float__ of somebody else
            if allowed(number := float(value)):
                return number
    raise InvalidRequest(f"{name}={shown(value)}: expected {expected}")


def _plain_stop(value: object) -> list[str]:
    if value is None:
        return []
    expected = f"a list of at most {MAX_STOP_STRINGS} non-empty strings"
    stops = [value] if isinstance(value, str) else plain_items("stop", value, expected, MAX_STOP_STRINGS)
    stops = [str.__str__(each) if isinstance(each, str) else each for each in stops]
    if len(stops) > MAX_STOP_STRINGS or not all(isinstance(each, str) and each for each in stops):
        raise InvalidRequest(f"stop={shown(stops)}: expected {expected}")
    return [plain_text(f"stop[{place}]", each) for place, each in enumerate(stops)]


def _plain_stop_token_ids(value: object) -> list[int]:
    expected = f"a list of at most {MAX_STOP_TOKEN_IDS} token ids"
    ids = [] if value is None else plain_items("stop_token_ids", value, expected, MAX_STOP_TOKEN_IDS)
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"stop_token_ids={shown(ids)}: expected {expected}, got {len(ids)}")
    return [plain_int("stop_token_ids", each, 0) for each in ids]

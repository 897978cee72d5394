"""Sampling parameters: how the next token of a request is chosen, and what ends the request."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from itertools import islice
from numbers import Real
from operator import attrgetter
from typing import Any, ClassVar, cast

import msgspec

from hbserve_rpc.errors import InvalidRequest
from hbserve_rpc.plain_values import (
    LARGEST_INT,
    LARGEST_TOKEN_ID,
    plain_bool,
    plain_int,
    plain_items,
    plain_scalar,
    plain_text,
    require_in_vocabulary,
    shown,
)
from hbserve_rpc.structured_outputs import StructuredOutputsParams, plain_structured_outputs

MAX_STOP_STRINGS = 16
MAX_STOP_TOKEN_IDS = 1024
"""Largest number of `stop_token_ids`, because each generated token is looked up in them."""
MAX_LOGPROBS = 20
"""Largest `logprobs` and `prompt_logprobs`, as in the OpenAI API."""
MAX_BIASED_TOKENS = 1024
MOST_BIAS = 100.0
"""Largest absolute value in `logit_bias`, as in the OpenAI API: enough to forbid a token, or to force it."""
MAX_CHOICES = 1024
MOST_PRIORITY = 2**31 - 1
LONGEST_TIMEOUT_S = 365 * 86400.0


class SamplingParams(msgspec.Struct):
    """Sampling parameters of one request.

    The first three fields are nano-vllm's, in its order, so they may be given by position. As in nano-vllm, this is
    also a dataclass: `dataclasses.replace`, `asdict` and `fields` accept it.

    Raises:
        InvalidRequest: (a ValueError) a value is out of range; the message names the field, the value and the range.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    temperature: float = 1.0
    """Number that divides the logits. 0 is greedy: always the most likely token. Any other float is allowed, however
    small or large: small ones come ever closer to greedy, and large ones to a choice by chance alone."""
    max_tokens: int = 64
    """Largest number of tokens to generate, including an end-of-sequence token."""
    ignore_eos: bool = False
    """Whether to go on after an end-of-sequence token."""
    top_k: int = -1
    """Number of most likely tokens to sample from; -1 or 0 turns it off."""
    top_p: float = 1.0
    """Total probability of the tokens to sample from, which are the fewest that add up to it; 1 turns it off."""
    seed: int | None = None
    """Seed of the random choice. The same seed, prompt and parameters give the same tokens, whatever else is in the
    batch."""
    stop: list[str] = []
    """Strings that end the text. They are not part of it, unless `include_stop_str_in_output` says so. The client looks
    for them, because that is where text is made."""
    stop_token_ids: list[int] = []
    """Token ids that end the request, in addition to the model's own end-of-sequence ids."""
    min_tokens: int = 0
    """Number of tokens before which the request does not end: until then, tokens that would end it are not drawn, and
    stop strings are not looked for. It cannot exceed `max_tokens`."""
    min_p: float = 0.0
    """Smallest probability of the tokens to sample from, as a fraction of that of the most likely one; 0 turns it off.
    Applied before `top_k` and `top_p`."""
    presence_penalty: float = 0.0
    """Number subtracted from the logit of each token that is already in the output; from -2 to 2."""
    frequency_penalty: float = 0.0
    """Number subtracted from the logit of a token once for each time that it is already in the output; from -2 to 2."""
    repetition_penalty: float = 1.0
    """Number that divides the logit of each token that is already in the prompt or the output, or multiplies the logit
    if it is negative. From 0.01 to 100; 1 turns it off."""
    logit_bias: dict[int, float] | None = None
    """Numbers from -100 to 100 that are added to the logits, by token id; before everything else."""

    logprobs: int | None = None
    """Number of most likely tokens, up to 20, whose log-probabilities are given at each place of the output, in
    addition to that of the output token. 0 gives the output token's alone; None turns it off."""
    prompt_logprobs: int | None = None
    """Like `logprobs`, but for each prompt token except the first. The prompt is then computed even where its prefix is
    cached. They come with the first output token, so a request that has output from an earlier attempt gets none."""
    include_stop_str_in_output: bool = False
    """Whether the text ends with the stop string instead of before it."""
    structured_outputs: StructuredOutputsParams | None = None
    """Form that the answer must have, for example JSON of a schema; a dict of its fields is accepted too. An answer
    ends when it is complete, whatever `ignore_eos` and `min_tokens` say. Before that only `max_tokens` ends it, with
    finish_reason "length", so `stop` and `stop_token_ids` are not allowed beside it."""
    n: int = 1
    """Number of answers to the prompt, up to 1024. The prompt is computed once for all of them. With a seed, each
    answer uses the next one, so the first answer is that of n=1."""
    priority: int = 0
    """Rank among waiting requests: those with lower numbers begin first, as in vLLM. A request with a lower number that
    comes later goes ahead, so that the others wait longer."""
    timeout_s: float | None = None
    """Time after submission at which the request ends with an error (RequestTimeout); None: only the deployment's own
    limit applies."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Convert every field to plain types and check it. Call it again if fields were set after construction.

        Numbers may be numpy's or torch's, and a list may be any ordered iterable. None means an empty list, and a
        single stop string a list of one.

        Raises:
            InvalidRequest: a value is out of range: see the class.
        """
        self.temperature = _plain_number("temperature", self.temperature, lambda v: 0 <= v < math.inf, "a number >= 0")
        self.max_tokens = plain_int("max_tokens", self.max_tokens, 1)
        self.ignore_eos = plain_bool("ignore_eos", self.ignore_eos)
        rare = _rare_of(self)
        if tuple(map(type, rare)) == _RARE_TYPES and rare == _RARE_DEFAULTS:  # nearly always
            self.stop, self.stop_token_ids = [], []
        else:
            self._validate_rare()

    def _validate_rare(self) -> None:
        """Validate all fields but the first three."""
        self.top_k = plain_int("top_k", self.top_k, -1)
        self.top_p = _plain_number("top_p", self.top_p, lambda v: 0 < v <= 1, "a number in (0, 1]")
        if self.seed is not None:
            self.seed = plain_int("seed", self.seed, 0)
        self.include_stop_str_in_output = plain_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        self.stop = _plain_stop(self.stop)
        self.stop_token_ids = _plain_stop_token_ids(self.stop_token_ids)
        self.min_tokens = plain_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        self.min_p = _plain_number("min_p", self.min_p, lambda v: 0 <= v <= 1, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = _plain_number(name, getattr(self, name), lambda v: -2 <= v <= 2, "a number from -2 to 2")
            setattr(self, name, value)
        self.repetition_penalty = _plain_number(
            "repetition_penalty", self.repetition_penalty, lambda v: 0.01 <= v <= 100, "a number from 0.01 to 100"
        )
        self.logit_bias = _plain_logit_bias(self.logit_bias)
        if self.logprobs is not None:
            self.logprobs = plain_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = plain_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        self.structured_outputs = plain_structured_outputs(self.structured_outputs)
        for name in ("stop", "stop_token_ids"):
            if self.structured_outputs is not None and (given := getattr(self, name)):
                raise InvalidRequest(f"{name}={shown(given)}: not with structured_outputs, whose grammar ends it")
        self.n = plain_int("n", self.n, 1, MAX_CHOICES)
        self.priority = plain_int("priority", self.priority, -MOST_PRIORITY, MOST_PRIORITY)
        if self.timeout_s is not None:
            self.timeout_s = _plain_number(
                "timeout_s", self.timeout_s, lambda v: 0 < v <= LONGEST_TIMEOUT_S, "seconds, up to a year, or None"
            )

    def require_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest, with its name, if a token id is not in a vocabulary of `vocab_size` tokens."""
        require_in_vocabulary("stop_token_ids", self.stop_token_ids, vocab_size)
        if self.logit_bias and (token := max(self.logit_bias)) >= vocab_size:
            raise InvalidRequest(f"logit_bias[{token}]: token {token} is outside the vocabulary [0, {vocab_size})")

    @property
    def needs_logits(self) -> bool:
        """Whether the request asks for more than a next token chosen by temperature, top_k and top_p."""
        changes = self.min_tokens or self.min_p or self.logit_bias or self.has_penalties
        return bool(changes) or self.logprobs is not None or self.structured_outputs is not None

    @property
    def has_penalties(self) -> bool:
        """Whether the choice of the next token depends on which tokens are there already."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    def copied(self) -> "SamplingParams":
        """Return a checked copy that shares nothing with this object, to keep after a call has returned."""
        return SamplingParams(*_all_of(self))

    def of_choice(self, choice: int) -> "SamplingParams":
        """Return the parameters of one of the `n` answers on its own. With one seed, all answers would be the same."""
        own = self.copied()
        own.n = 1
        if own.seed is not None:
            own.seed = (own.seed + choice) % (LARGEST_INT + 1)
        return own


def _dataclass_fields(kind: type[msgspec.Struct]) -> dict[str, dataclasses.Field[Any]]:
    """Make the `__dataclass_fields__` by which the module `dataclasses` recognises a dataclass."""
    fields = [
        (
            each.name,
            each.type,
            dataclasses.field(default=each.default)
            if each.default is not msgspec.NODEFAULT
            else dataclasses.field(default_factory=cast("Callable[[], Any]", each.default_factory)),
        )
        for each in msgspec.structs.fields(kind)
    ]
    made: Any = dataclasses.make_dataclass(kind.__name__, fields)
    return {each.name: each for each in dataclasses.fields(made)}


SamplingParams.__dataclass_fields__ = _dataclass_fields(SamplingParams)
_all_of = attrgetter(*SamplingParams.__struct_fields__)
_RARE = SamplingParams.__struct_fields__[3:]
_rare_of = attrgetter(*_RARE)
_RARE_DEFAULTS: tuple[Any, ...] = tuple(
    [] if each.default is msgspec.NODEFAULT else each.default for each in msgspec.structs.fields(SamplingParams)[3:]
)
_RARE_TYPES = tuple(map(type, _RARE_DEFAULTS))


def _plain_number(name: str, value: object, allowed: Callable[[float], bool], expected: str) -> float:
    if type(value) is float and allowed(value):  # nearly always, and several times for each request
        return value
    value = plain_scalar(value)
    if isinstance(value, int) and int.__gt__(value, LARGEST_INT):  # a subclass may compare differently, or raise
        expected += f", as a float or an integer up to {LARGEST_INT}"
    elif isinstance(value, Real) and not isinstance(value, bool):
        with contextlib.suppress(Exception):  # a fraction too large for a float, or somebody's own __float__
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
    return [plain_int(f"stop_token_ids[{place}]", each, 0) for place, each in enumerate(ids)]


def _plain_logit_bias(value: object) -> dict[int, float] | None:
    expected = f"a dict of at most {MAX_BIASED_TOKENS} token ids with numbers from {-MOST_BIAS:g} to {MOST_BIAS:g}"
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"logit_bias={shown(value)}: expected {expected}")
    items = list(islice(value.items(), MAX_BIASED_TOKENS + 1))  # it may be large, or never end
    if len(items) > MAX_BIASED_TOKENS:
        raise InvalidRequest(f"logit_bias: more than {MAX_BIASED_TOKENS} tokens; expected {expected}")
    plain = {}
    for key, bias in items:
        token = plain_int("logit_bias", key, 0, LARGEST_TOKEN_ID)
        plain[token] = _plain_number(
            f"logit_bias[{token}]", bias, lambda v: -MOST_BIAS <= v <= MOST_BIAS, "a number from -100 to 100"
        )
    return plain or None

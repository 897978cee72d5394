"""Normalisation of the prompts and parameters that any entry gets: they are checked, and copied to plain types. Errors
name the place of what is wrong."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from typing import Any

from hbserve.text.tokenizer import encode, require_tokenizer
from hbserve_rpc import InvalidRequest, LogitsNotFinite, SamplingParams
from hbserve_rpc.plain_values import (
    num_dimensions,
    plain_int,
    plain_items,
    plain_scalar,
    plain_text,
    plain_token_ids,
    shown,
)

Prompt = Any
"""A prompt as users give it: a string; token ids in a list, tuple, array, tensor or iterator; `{"prompt": …}` or
`{"prompt_token_ids": …}`, as in vLLM; or what a tokenizer returns for one text."""
PlainPrompt = str | list[int]

EXPECTED = (
    'a string or a list of token ids (or {"prompt": …}, {"prompt_token_ids": …}, or what a tokenizer returns; '
    "of messages, what its apply_chat_template returns)"
)
_OF_TOKENIZERS = {"attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"}
"""Keys that tokenizers return beside `input_ids`. Only the mask says something about the prompt: what it hides is
padding."""


@contextmanager
def naming(place: int, count: int) -> Iterator[None]:
    """Add the prompt's index to errors about it, if there are several prompts. Other errors pass unchanged."""
    try:
        yield
    except (InvalidRequest, LogitsNotFinite) as error:
        raise type(error)(f"prompts[{place}]: {error}" if count > 1 else str(error)) from error


def read_prompts(prompts: object) -> list[PlainPrompt]:
    """Return the prompts of one call, one or several, as strings and lists of our own.

    Raises:
        InvalidRequest: a prompt is not valid. Names the prompt, the place in it, and what is allowed.
    """
    several: Iterable[object]
    if isinstance(prompts, str):
        several = [prompts]
    elif isinstance(prompts, Mapping):
        several = _rows(prompts) if "input_ids" in prompts else [prompts]
    else:
        items = plain_items("prompts", prompts, f"one prompt or a list of them; a prompt is {EXPECTED}")
        several = [items] if items and isinstance(plain_scalar(items[0]), Number) else items
    plain: list[PlainPrompt] = []
    several = list(several)
    for place, each in enumerate(several):
        with naming(place, len(several)):
            plain.append(read_prompt(each))
    return plain


def read_prompt(prompt: object) -> PlainPrompt:
    """Return one prompt as a string or a list of our own. Raises InvalidRequest."""
    if isinstance(prompt, str):
        return plain_text("prompt", prompt)
    if isinstance(prompt, Mapping):
        return _read_mapping(prompt)
    ids = plain_items("prompt", prompt, EXPECTED)
    if num_dimensions(prompt) == 2 and len(ids) == 1:  # a batch of one, as tokenizers return tensors
        ids = ids[0]
    return some_tokens(plain_token_ids("prompt", ids))


def some_tokens(ids: list[int]) -> list[int]:
    """Return the ids. Raises InvalidRequest if there are none."""
    if not ids:
        raise InvalidRequest("prompt: expected at least one token")
    return ids


def _read_mapping(prompt: Mapping[Any, Any]) -> PlainPrompt:
    if "input_ids" in prompt:
        rows = _rows(prompt)
        if len(rows) != 1:
            raise InvalidRequest(f"prompt: expected one prompt, got a batch of {len(rows)}")
        return some_tokens(rows[0])
    given = {key for key, value in prompt.items() if value is not None}
    others = given - {"prompt", "prompt_token_ids"}
    if others or not given:
        raise InvalidRequest(f"prompt={shown(prompt)}: expected {EXPECTED}")
    if "prompt_token_ids" in given:
        return some_tokens(plain_token_ids("prompt", prompt["prompt_token_ids"]))
    return plain_text("prompt", prompt["prompt"])


def _rows(encoding: Mapping[Any, Any]) -> list[list[int]]:
    """Return token ids without padding, from what a tokenizer returned for one text or for several."""
    if others := set(encoding) - _OF_TOKENIZERS - {"input_ids"}:
        raise InvalidRequest(f"prompts: {shown(sorted(map(str, others)))} beside input_ids; expected text only")
    rows, masks = _nested(encoding["input_ids"]), _nested(encoding.get("attention_mask"))
    if encoding.get("attention_mask") is None:
        return [plain_token_ids("input_ids", row) for row in rows]
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise InvalidRequest("attention_mask: expected one number for each of input_ids")
    return [
        [token for token, shows in zip(plain_token_ids("input_ids", row), map(_shows, mask), strict=True) if shows]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _shows(value: object) -> int:
    number = plain_scalar(value)
    return plain_int("attention_mask", int(number) if isinstance(number, bool) else number, 0, 1)


def _nested(values: object) -> list[list[Any]]:
    items = [] if values is None else plain_items("input_ids", values, "token ids")
    if items and isinstance(plain_scalar(items[0]), Number):
        return [items]
    return [plain_items("input_ids", each, "token ids") for each in items]


def encode_all(tokenizer: Any, prompts: list[PlainPrompt], params: list[SamplingParams]) -> list[list[int]]:
    """Return the token ids of each prompt. Takes long for long texts, so event loops should call it in a thread.

    Raises:
        InvalidRequest: a prompt or a stop string is text, but there is no tokenizer. Names the prompt.
    """
    ids = []
    for place, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        with naming(place, len(prompts)):
            if each.stop:
                require_tokenizer(tokenizer, "stop")
            ids.append(encode(tokenizer, prompt) if isinstance(prompt, str) else prompt)
    return ids


def read_params(params: object, num_prompts: int) -> list[SamplingParams]:
    """Return a SamplingParams for each prompt, as copies that callers cannot change.

    Raises:
        InvalidRequest: a value is wrong, their number does not fit, or one is not a SamplingParams.
    """
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params.copied()] * num_prompts
    expected = "SamplingParams, or a list of them"
    several = [params] if isinstance(params, Mapping) else plain_items("sampling_params", params, expected)
    for each in several:
        if not isinstance(each, SamplingParams):
            raise InvalidRequest(f"sampling_params: expected {expected}; got {shown(each)}")
    if len(several) != num_prompts:
        raise InvalidRequest(
            f"sampling_params: {len(several)} for {num_prompts} prompts; expected one, or one per prompt"
        )
    plain = []
    for place, each in enumerate(several):
        with naming(place, len(several)):
            plain.append(each.copied())
    return plain

"""Prompts of a load. The datasets have the names that `vllm bench serve` gives them, and the same seed gives the same
prompts in every process."""

import codecs
import csv
import gzip
import io
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec

from hbserve.text.tokenizer import encode
from hbserve_rpc import InvalidRequest

MOONCAKE_BLOCK = 512
"""Tokens for each id of `hash_ids` in Mooncake's traces, whose timestamps are milliseconds."""
SHAREGPT_FEWEST, SHAREGPT_MOST_PROMPT, SHAREGPT_MOST = 4, 1024, 2048
"""Bounds for ShareGPT, as in vLLM: the fewest tokens of a prompt and of an answer, the most of a prompt, and the most
of both together. Other conversations are skipped."""

GZIP = b"\x1f\x8b"
"""The first bytes of a file that gzip has packed."""
MOST_TOKENS = MOST_REQUESTS = 10_000_000
"""Limits of what may be asked for. No model has room for more tokens, and a typing error must not fill the memory."""


@dataclass(frozen=True)
class Prompt:
    """One request of a load."""

    token_ids: list[int]
    output_len: int
    at_s: float | None = None
    """Time since the first request, if the dataset has times."""
    text: str | None = None
    """The user's message of a chat, if the dataset has it as text."""


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that random prompts are drawn from: all except special tokens."""

    ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> "Vocabulary":
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        return cls(tuple(each for each in range(len(tokenizer)) if each not in special))

    def draw(self, rng: random.Random, count: int) -> list[int]:
        return rng.choices(self.ids, k=count)


def random_prompts(
    vocabulary: Vocabulary, count: int, input_len: int, output_len: int, *, spread: float, prefix_len: int, seed: int
) -> list[Prompt]:
    """Make prompts of random tokens, which all begin with the same `prefix_len` tokens. Lengths are uniform between
    1 - `spread` and 1 + `spread` times the wanted ones."""
    rng = random.Random(seed)
    prefix = vocabulary.draw(rng, prefix_len)

    def around(wanted: int) -> int:
        return max(1, rng.randint(round(wanted * (1 - spread)), round(wanted * (1 + spread))))

    return [Prompt(prefix + vocabulary.draw(rng, around(input_len)), around(output_len)) for _ in range(count)]


def prefix_repetition(
    vocabulary: Vocabulary,
    count: int,
    *,
    prefix_len: int,
    suffix_len: int,
    num_prefixes: int,
    output_len: int,
    seed: int,
) -> list[Prompt]:
    """Make prompts in random order, each of which begins with one of `num_prefixes` common prefixes."""
    rng = random.Random(seed)
    prefixes = [vocabulary.draw(rng, prefix_len) for _ in range(num_prefixes)]
    prompts = [Prompt(prefixes[i % num_prefixes] + vocabulary.draw(rng, suffix_len), output_len) for i in range(count)]
    rng.shuffle(prompts)
    return prompts


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """Open a dataset's file, and unpack it if it is gzipped. Reads the file only once, so that it may be a pipe.

    Raises:
        InvalidRequest: the file is gzipped, and cannot be unpacked to its end.
    """
    with path.open("rb") as file:
        if file.peek(2)[:2] != GZIP:
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidRequest(f"{path}: cannot be unpacked; is it cut off? {error}") from None


def sharegpt(path: Path, tokenizer: Any, count: int, *, output_len: int | None, seed: int) -> list[Prompt]:
    """Read the first questions of ShareGPT's conversations, with the lengths of their answers. Entries without two
    turns of text are skipped.

    Raises:
        InvalidRequest: the file is not of this format, or has no conversation of a usable length.
    """
    with _opened(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    problem = f"{path}: not ShareGPT's format, [{{conversations: [{{value}}]}}]"
    try:
        entries = msgspec.json.decode(content, type=list[Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{problem}: {_why_not(error)}") from None
    turns = [said for entry in entries if (said := _two_turns(entry))]
    if not turns:
        raise InvalidRequest(f"{problem}: none of {len(entries)} entries has two turns of text")
    random.Random(seed).shuffle(turns)
    found: list[Prompt] = []
    for question, answer in turns:
        if len(found) == count:
            break
        prompt = encode(tokenizer, question)
        length = output_len or len(encode(tokenizer, answer, add_special_tokens=False))
        few = len(prompt) < SHAREGPT_FEWEST or length < SHAREGPT_FEWEST
        if not few and len(prompt) <= SHAREGPT_MOST_PROMPT and len(prompt) + length <= SHAREGPT_MOST:
            found.append(Prompt(prompt, length, text=question))
    if not found:
        raise InvalidRequest(f"{path}: no conversation of a usable length among {len(turns)}")
    return [found[i % len(found)] for i in range(count)]


class _CustomLine(msgspec.Struct):
    """A line of a custom dataset."""

    prompt: str
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)] | None = None


def custom(
    path: Path,
    tokenizer: Any,
    count: int,
    *,
    output_len: int | None,
    shuffle_seed: int | None,
    repeats: bool,
    templated: bool,
) -> list[Prompt]:
    """Read prompts from lines of `{"prompt", "output_tokens"}`, as in vLLM's dataset of this name. Empty lines are
    skipped.

    Args:
        output_len: length of all answers. None: each line has its own.
        shuffle_seed: None keeps the file's order.
        repeats: whether to start again from the beginning if the file has fewer than `count` prompts.
        templated: whether to put the model's chat template around each prompt, as a user's message.

    Raises:
        InvalidRequest: a line is not of this format (which is named), there is none, or the model has no chat template.
    """
    entries: list[tuple[str, int]] = []
    decoder = msgspec.json.Decoder(_CustomLine)
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = decoder.decode(line.removeprefix(codecs.BOM_UTF8))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidRequest(f'{path}:{number}: not a line of {{"prompt": …}}: {_why_not(error)}') from None
            length = output_len or entry.output_tokens
            if length is None:
                raise InvalidRequest(f"{path}:{number}: has no output_tokens, which --custom-output-len=-1 asks for")
            entries.append((entry.prompt, length))
    if not entries:
        raise InvalidRequest(f"{path}: a dataset without lines")
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(entries)
    found = [Prompt(_asked(tokenizer, text, templated), length, text=text) for text, length in entries[:count]]
    return [found[i % len(found)] for i in range(count)] if repeats else found


def _asked(tokenizer: Any, text: str, templated: bool) -> list[int]:
    """Encode a prompt. `templated`: as a user's message in the model's chat template. Raises InvalidRequest."""
    if not templated:
        return encode(tokenizer, text)
    if not tokenizer.chat_template:
        raise InvalidRequest("--dataset-name custom: this model has no chat template; give --skip-chat-template")
    messages = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return encode(tokenizer, whole, add_special_tokens=False)


def _two_turns(entry: Any) -> list[str]:
    """Return the texts of a conversation's first two turns; empty if there are fewer turns, or one is not text."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    first = turns[:2] if isinstance(turns, list) else []
    said = [each["value"] for each in first if isinstance(each, dict) and isinstance(each.get("value"), str)]
    return said if len(said) == 2 else []


def _why_not(error: Exception) -> str:
    """Return a short reason for the exception of a decoder."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8 text"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


@dataclass(frozen=True)
class TracedRequest:
    """One line of a trace: the time and the lengths of a request."""

    at_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """Ids of the prompt's blocks. Equal blocks after equal beginnings have equal ids."""


_Time = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _Line(msgspec.Struct):
    """A line of a timed trace."""

    timestamp: _Time
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
    output_length: _Tokens
    hash_ids: list[int] | None = None


def read_timed_trace(path: Path, *, unit_s: float, most: int | None = None) -> Iterator[TracedRequest]:
    """Read lines of `{"timestamp", "input_length", "output_length", "hash_ids"}`, as in Mooncake's traces. Empty lines
    are skipped.

    Raises:
        InvalidRequest: a line (which is named) is not of this format, or its time is before that of the line above;
            or there is no line.
    """
    first: float | None = None
    last = 0.0
    decoder = msgspec.json.Decoder(_Line, strict=False)
    with _opened(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, most):
            try:
                entry = decoder.decode(line.removeprefix(codecs.BOM_UTF8))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise InvalidRequest(f"{path}:{number}: not a line of a timed trace: {_why_not(error)}") from None
            first, last = (entry.timestamp,) * 2 if first is None else (first, last)
            if entry.timestamp < last:
                problem = f"timestamp {entry.timestamp:g} after {last:g}: expected lines in the order of their times"
                raise InvalidRequest(f"{path}:{number}: {problem}")
            last = entry.timestamp
            at_s = (last - first) * unit_s
            yield TracedRequest(at_s, entry.input_length, entry.output_length, tuple(entry.hash_ids or ()))
    if first is None:
        raise InvalidRequest(f"{path}: a timed trace without lines")


def timed_trace(
    path: Path, vocabulary: Vocabulary, count: int | None, *, block_size: int, unit_s: float
) -> list[Prompt]:
    """Make the prompts of a trace. The tokens of a block depend only on its id. Raises InvalidRequest."""

    @lru_cache(maxsize=1 << 14)
    def block(hash_id: int) -> list[int]:
        return vocabulary.draw(random.Random(hash_id), block_size)

    prompts: list[Prompt] = []
    for each in read_timed_trace(path, unit_s=unit_s, most=count):
        tokens = [token for hash_id in each.hash_ids for token in block(hash_id)][: each.input_len]
        tail = random.Random(f"tail of {len(prompts)}")
        tokens += vocabulary.draw(tail, each.input_len - len(tokens))
        prompts.append(Prompt(tokens, max(1, each.output_len), each.at_s))
    return prompts


def burstgpt(path: Path, vocabulary: Vocabulary, count: int, *, seed: int) -> list[Prompt]:
    """Make prompts with the lengths and times of BurstGPT's answered requests to GPT-4, beginning at a random place of
    the file.

    Raises:
        InvalidRequest: the file lacks a column of BurstGPT, a row (which is named) is not of this format, or there is
            no such request.
    """
    found = [row for row in _rows(path) if row.given > 0]
    if not found:
        raise InvalidRequest(f"{path}: has no request to GPT-4 with an answer")
    rng = random.Random(seed)
    begin = rng.randrange(max(1, len(found) - count + 1))
    rows = sorted(found[begin : begin + count], key=lambda row: row.at_s)
    return [Prompt(vocabulary.draw(rng, max(1, row.asked)), row.given, row.at_s - rows[0].at_s) for row in rows]


class _Row(msgspec.Struct):
    """A row of BurstGPT."""

    at_s: _Time = msgspec.field(name="Timestamp")
    asked: _Tokens = msgspec.field(name="Request tokens")
    given: _Tokens = msgspec.field(name="Response tokens")


def _rows(path: Path) -> Iterator[_Row]:
    """Yield the rows about GPT-4."""
    with _opened(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, restkey="")
        try:
            missing = {"Timestamp", "Model", "Request tokens", "Response tokens"}.difference(reader.fieldnames or ())
            if missing:
                raise InvalidRequest(f"{path}: not BurstGPT's columns: there is no {min(missing)!r}")
            for row in reader:
                if row["Model"] == "GPT-4":
                    yield msgspec.convert(row, _Row, strict=False)
        except (msgspec.ValidationError, UnicodeDecodeError, csv.Error) as error:
            place = f"{path}:{reader.line_num}"
            raise InvalidRequest(f"{place}: not a row of BurstGPT's: {_why_not(error)}") from None

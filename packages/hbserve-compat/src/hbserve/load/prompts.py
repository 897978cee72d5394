"""Prompts of a load, by the names of `vllm bench serve` for its datasets. The same seed gives the same prompts in every
process."""

import csv
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from hbserve.tokenizer import encode
from hbserve_rpc import InvalidRequest

MOONCAKE_BLOCK = 512
"""Tokens for each id of `hash_ids` in Mooncake's traces, whose timestamps are milliseconds."""
SHAREGPT_FEWEST, SHAREGPT_MOST_PROMPT, SHAREGPT_MOST = 4, 1024, 2048
"""Tokens of a ShareGPT prompt, of its answer, and of both: others are passed over, as vLLM does."""


@dataclass(frozen=True)
class Prompt:
    """One request of a load."""

    token_ids: list[int]
    output_len: int
    at_s: float | None = None
    """Since the first one, where the dataset says when requests came."""


@dataclass(frozen=True)
class Vocabulary:
    """The ids from which prompts are made up: those that are no special tokens."""

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
    """Prompts of random tokens, all after the same `prefix_len` ones; lengths are uniform within 1 - and 1 + `spread`
    times the wanted ones."""
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
    """Prompts that share one of `num_prefixes` beginnings, mixed."""
    rng = random.Random(seed)
    prefixes = [vocabulary.draw(rng, prefix_len) for _ in range(num_prefixes)]
    prompts = [Prompt(prefixes[i % num_prefixes] + vocabulary.draw(rng, suffix_len), output_len) for i in range(count)]
    rng.shuffle(prompts)
    return prompts


def sharegpt(path: Path, tokenizer: Any, count: int, *, output_len: int | None, seed: int) -> list[Prompt]:
    """First questions of ShareGPT's conversations, with the lengths of their answers.

    Raises:
        InvalidRequest: the file is not of this format, or has no conversation of a usable length.
    """
    try:
        turns = [
            [each["value"] for each in entry["conversations"][:2]]
            for entry in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"{path}: not ShareGPT's format, [{{conversations: [{{value}}]}}]: {error!r}") from None
    turns = [each for each in turns if len(each) == 2]
    random.Random(seed).shuffle(turns)
    found: list[Prompt] = []
    for question, answer in turns:
        if len(found) == count:
            break
        prompt = encode(tokenizer, question)
        length = output_len or len(encode(tokenizer, answer, add_special_tokens=False))
        few = len(prompt) < SHAREGPT_FEWEST or length < SHAREGPT_FEWEST
        if not few and len(prompt) <= SHAREGPT_MOST_PROMPT and len(prompt) + length <= SHAREGPT_MOST:
            found.append(Prompt(prompt, length))
    if not found:
        raise InvalidRequest(f"{path}: no conversation of a usable length among {len(turns)}")
    return [found[i % len(found)] for i in range(count)]


@dataclass(frozen=True)
class TracedRequest:
    """A line of a trace: the shape of a request, and when it came."""

    at_s: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()
    """One for each block of the prompt: equal blocks after equal beginnings have equal ids."""


def read_timed_trace(path: Path, *, unit_s: float, most: int | None = None) -> Iterator[TracedRequest]:
    """Lines of `{"timestamp", "input_length", "output_length", "hash_ids"}`, as Mooncake's traces have them. Empty ones
    are passed over.

    Raises:
        InvalidRequest: a line is not of this format; says which. Or there is none.
    """
    first: float | None = None
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, most):
            try:
                entry = json.loads(line)
                at = float(entry["timestamp"])
                lengths = int(entry["input_length"]), int(entry["output_length"])
                hash_ids = tuple(map(int, entry.get("hash_ids", ())))
                if not math.isfinite(at) or min(lengths) < 0:
                    raise ValueError(f"timestamp {at:g}, lengths {lengths}")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                raise InvalidRequest(f"{path}:{number}: not a line of a timed trace: {error!r}") from None
            first = at if first is None else first
            yield TracedRequest((at - first) * unit_s, *lengths, hash_ids)
    if first is None:
        raise InvalidRequest(f"{path}: a timed trace without a line")


def timed_trace(
    path: Path, vocabulary: Vocabulary, count: int | None, *, block_size: int, unit_s: float
) -> list[Prompt]:
    """Prompts of a trace: the tokens of a block follow from its id alone. Raises InvalidRequest."""

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
    """Lengths and times of BurstGPT's requests to GPT-4 that got an answer, from a random place of the file on.

    Raises:
        InvalidRequest: the file has not BurstGPT's columns, or no such request.
    """
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            rows = [
                (float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))
                for row in csv.DictReader(lines)
                if row["Model"] == "GPT-4" and int(row["Response tokens"]) > 0
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise InvalidRequest(f"{path}: not BurstGPT's columns: {error!r}") from None
    if not rows:
        raise InvalidRequest(f"{path}: has no request to GPT-4 with an answer")
    rng = random.Random(seed)
    begin = rng.randrange(max(1, len(rows) - count + 1))
    rows = rows[begin : begin + count]
    return [Prompt(vocabulary.draw(rng, max(1, asked)), given, at_s - rows[0][0]) for at_s, asked, given in rows]

"""Compilation of grammars for one model's tokenizer.

Limits keep what one grammar takes small, but cannot rule everything out: 64 KiB can be written that take ten seconds to
compile. So there is a deadline, after which a request is refused, while its thread goes on to the end.
"""

import asyncio
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Ids
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from hbserve_core.grammars.matcher import Mask, Matcher, shortened
from hbserve_core.grammars.workers import Workers
from hbserve_rpc import InvalidRequest, Overloaded, SamplingParams, StructuredOutputsParams

COMPILE_TIMEOUT_S = 5.0
"""Deadline of one grammar, and of waiting for those before it."""
_COMPILED_AT_ONCE = 2
_MOST_KEPT = 16
"""Compiled grammars that are kept for other requests. Each may come to take tens of MiB."""
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 100_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
_JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\r\t]{0,32}"}
"""Of schemas: a model may lay JSON out as it likes, but not write white space for ever."""


class GrammarCompiler:
    """Compiles, and keeps what was asked for last. Any thread may call."""

    def __init__(self, folder: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """folder: the model's, with its tokenizer.json."""
        self._path = Path(folder).expanduser() / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(each for each in eos_token_ids if each < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._problem = ""
        """Why there is none."""
        self._ends: Mask = np.zeros(0, np.int32)
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        self._compiling = Workers(_COMPILED_AT_ONCE, "grammars")
        self._matching = Workers(max(2, min(8, (os.cpu_count() or 1) // 4)), "matchers")

    def load(self) -> None:
        """Read the tokenizer, if that has not been tried. It takes a second, or three for a large one, and no other
        thread runs meanwhile: an instance does it before it is ready. Requests hear of what is wrong with it."""
        with self._lock:
            if self._tokenizer is None and not self._problem:
                try:
                    self._tokenizer = self._read_tokenizer()
                except (OSError, ValueError) as error:
                    self._problem = f"structured_outputs: {self._path} cannot be used for them: {error}"
                    return
                words = -(-self._tokenizer.vocab_size // 32)
                bits = np.zeros(32 * words, np.uint8)
                bits[self._eos_token_ids] = 1
                self._ends = np.packbits(bits, bitorder="little").view(np.int32)

    def _read_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        text = self._path.read_text(encoding="utf-8").strip()
        if not text.startswith("{"):
            raise ValueError("it is no JSON object")  # llguidance would take it for a name to download
        if not self._eos_token_ids:
            raise ValueError("the model has no token that ends a sequence")
        try:
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
        except ValueError:  # the tokenizer may have more tokens than the model
            return LLTokenizer(text, eos_token=self._eos_token_ids)

    def matcher(self, params: SamplingParams, output: Ids[int] = ()) -> Matcher | None:
        """What follows a request's grammar from behind its output so far; None if it has no grammar. Takes a while.

        Raises:
            InvalidRequest: there is no such grammar, it is too large, or too slow; says which and why.
            Overloaded: others are still being compiled.
        """
        if params.structured_outputs is None:
            return None
        future = self._submit(params, output)
        try:
            return future.result(COMPILE_TIMEOUT_S)
        except TimeoutError:
            raise _too_late(params.structured_outputs, future) from None

    async def matcher_in_loop(self, params: SamplingParams, output: Ids[int] = ()) -> Matcher | None:
        """The same in an event loop, which goes on meanwhile."""
        if params.structured_outputs is None:
            return None
        future = self._submit(params, output)
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise _too_late(params.structured_outputs, future) from None

    def _submit(self, params: SamplingParams, output: Ids[int]) -> "Future[Matcher]":
        return self._compiling.submit(lambda: self._make(params, output))

    def _make(self, params: SamplingParams, output: Ids[int]) -> Matcher:
        self.load()
        if self._problem:
            raise InvalidRequest(self._problem)
        wanted = params.structured_outputs
        assert wanted is not None
        with self._lock:
            compiled = self._compiled.get(wanted)
        if compiled is None:
            compiled = self._compile(wanted)
        with self._lock:
            self._compiled[wanted] = compiled
            self._compiled.move_to_end(wanted)
            while len(self._compiled) > _MOST_KEPT:
                self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._ends, params, output, self._matching)

    def _compile(self, wanted: StructuredOutputsParams) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        kind = wanted.kind
        try:
            compiled = LLMatcher(self._tokenizer, _source(wanted), log_level=0, limits=LLParserLimits(**_LIMITS))
        except ValueError as error:
            raise InvalidRequest(f"structured_outputs.{kind}: {shortened(str(error))}") from None
        if compiled.is_error():
            raise InvalidRequest(f"structured_outputs.{kind}: {shortened(compiled.get_error())}")
        return compiled


def _too_late(wanted: StructuredOutputsParams, future: "Future[Matcher]") -> Exception:
    if future.cancel():
        return Overloaded("structured_outputs: other grammars are being compiled")
    return InvalidRequest(f"structured_outputs.{wanted.kind}: takes more than {COMPILE_TIMEOUT_S:g} s to compile")


def _source(wanted: StructuredOutputsParams) -> str:
    """What llguidance compiles. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if wanted.json is not None:
        return LLMatcher.grammar_from_json_schema(str(wanted.json), _JSON_OPTIONS)
    if wanted.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, _JSON_OPTIONS)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return grammar_from("grammar", wanted.grammar)
    assert wanted.choice is not None, "one of them is given"
    return LLMatcher.grammar_from_lark(
        "start: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in wanted.choice)
    )

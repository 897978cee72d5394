"""Compilation of grammars for one model's tokenizer, with a cache.

A grammar that was not seen before is first tried in another process, so that no thread here is busy with it for long.
"""

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from collections.abc import Sequence as Ids
from concurrent.futures import Future
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from hbserve_core.grammars.compilation import compile_grammar, read_tokenizer
from hbserve_core.grammars.matcher import Mask, Matcher
from hbserve_core.grammars.trials import Trials
from hbserve_core.grammars.workers import Workers
from hbserve_rpc import InvalidRequest, Overloaded, SamplingParams, StructuredOutputsParams

COMPILE_TIMEOUT_S = 10.0
"""Longest time that a request waits for its own grammar, which takes a moment, and for those that are compiled before
it."""
_COMPILED_AT_ONCE = 2
_TRIED_AT_ONCE = 8
"""Number of trials that run at once. It may exceed the number of cores: trials are processes, and a quick one is not
held up by slow ones."""
_MOST_TRIALS = 64
"""Largest number of trials that run, wait, or are remembered. A grammar that was too slow is often sent again, and is
then not tried again."""
_MOST_KEPT = 16
"""Largest number of compiled grammars that are kept for other requests. Each may grow to tens of MiB."""
_OTHERS = "structured_outputs: other grammars are being compiled"


class GrammarCompiler:
    """Compiler of grammars that keeps the most recently used ones. Its methods may be called from any thread."""

    def __init__(self, folder: str, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """folder: the model's folder, which has a tokenizer.json."""
        self._path = Path(os.path.expanduser(folder)) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(each for each in eos_token_ids if each < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._problem = ""
        """Reason why there is no tokenizer; "" if there is one, or it was not read yet."""
        self._ends: Mask = np.zeros(0, np.int32)
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        self._tried: OrderedDict[StructuredOutputsParams, Future[str]] = OrderedDict()
        """Trials that run or wait, and the results of the last ones."""
        self._trials = Trials(self._path, vocab_size, self._eos_token_ids)
        self._trying = Workers(_TRIED_AT_ONCE, "trials")
        self._compiling = Workers(_COMPILED_AT_ONCE, "grammars")
        self._matching = Workers(max(2, min(8, (os.cpu_count() or 1) // 4)), "matchers")

    def load(self) -> None:
        """Read the tokenizer, unless that was already tried. It takes one second, or three for a large one, in which no
        other thread runs, so an instance does it before it is ready. If it fails, requests with grammars get the
        error."""
        with self._lock:
            if self._tokenizer is None and not self._problem:
                try:
                    self._tokenizer = read_tokenizer(self._path, self._vocab_size, self._eos_token_ids)
                except (OSError, ValueError) as error:
                    self._problem = f"structured_outputs: {self._path} cannot be used for them: {error}"
                    return
                words = -(-self._tokenizer.vocab_size // 32)
                bits = np.zeros(32 * words, np.uint8)
                bits[self._eos_token_ids] = 1
                self._ends = np.packbits(bits, bitorder="little").view(np.int32)

    def matcher(self, params: SamplingParams, output: Ids[int] = ()) -> Matcher | None:
        """Make a matcher for a request's grammar, advanced by its output so far. Returns None if the request has no
        grammar. This takes a while.

        Raises:
            InvalidRequest: the grammar is invalid, too large or too slow; the message says which and why. Overloaded:
            other grammars are still being compiled.
        """
        wanted = params.structured_outputs
        if wanted is None:
            return None
        deadline = monotonic() + COMPILE_TIMEOUT_S
        made: Future[Matcher] | None = None
        try:
            _require_none(self._trial(wanted).result(COMPILE_TIMEOUT_S))
            made = self._compiling.submit(lambda: self._make(params, output))
            return made.result(max(0.0, deadline - monotonic()))
        except TimeoutError:
            if made is not None:
                made.cancel()
            raise Overloaded(_OTHERS) from None

    async def matcher_in_loop(self, params: SamplingParams, output: Ids[int]) -> Matcher:
        """Do the same as `matcher`, for a request that has a grammar, without blocking the event loop."""
        wanted = params.structured_outputs
        assert wanted is not None
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                _require_none(await asyncio.shield(asyncio.wrap_future(self._trial(wanted))))
                return await asyncio.wrap_future(self._compiling.submit(lambda: self._make(params, output)))
        except TimeoutError:
            raise Overloaded(_OTHERS) from None

    def _trial(self, wanted: StructuredOutputsParams) -> "Future[str]":
        """Return the trial of a grammar, whose result is the reason why the grammar must not be compiled here, or "".
        Requests for the same grammar share one trial, which goes on after they have given up, because they are often
        sent again. Raises Overloaded."""
        with self._lock:
            trial = self._tried.get(wanted)
            if trial is None or (trial.done() and trial.exception() is not None):
                self._make_room_for_a_trial()
                trial = self._tried[wanted] = self._trying.submit(lambda: self._try(wanted))
            self._tried.move_to_end(wanted)
            return trial

    def _make_room_for_a_trial(self) -> None:
        if len(self._tried) >= _MOST_TRIALS:
            oldest = next((each for each, trial in self._tried.items() if trial.done()), None)
            if oldest is None:
                raise Overloaded(_OTHERS)
            del self._tried[oldest]

    def _try(self, wanted: StructuredOutputsParams) -> str:
        self.load()
        return self._problem or self._trials.problem_of(wanted)

    def _make(self, params: SamplingParams, output: Ids[int]) -> Matcher:
        wanted = params.structured_outputs
        assert wanted is not None
        with self._lock:
            compiled = self._compiled.get(wanted)
        if compiled is None:
            compiled = compile_grammar(self._tokenizer, wanted)
        with self._lock:
            self._compiled[wanted] = compiled
            self._compiled.move_to_end(wanted)
            while len(self._compiled) > _MOST_KEPT:
                self._compiled.popitem(last=False)
        return Matcher(compiled.deep_copy(), self._ends, params, output, self._matching)


def _require_none(problem: str) -> None:
    if problem:
        raise InvalidRequest(problem)

"""LLM: the synchronous interface, a drop-in replacement for nano-vllm's."""

import contextlib
import copy
import itertools
import queue
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hbserve.backends.backend import Backend, News, Progress
from hbserve.backends.keywords import translated
from hbserve.backends.own_thread import Ended
from hbserve.models.demo_model import model_folder
from hbserve.progress import progress_bar
from hbserve.text.detokenizer import Detokenizer
from hbserve.text.prompts import Prompt, encode_all, naming, read_params, read_prompt, read_prompts
from hbserve.text.tokenizer import load_tokenizer
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import TokenLogprobs


@dataclass
class _Choice:
    detokenizer: Detokenizer
    logprobs: list[TokenLogprobs] | None
    """Log-probabilities of the tokens so far; None if they were not asked for."""
    has_ended: bool = False

    def answer(self) -> dict[str, Any]:
        token_ids = self.detokenizer.token_ids
        found: dict[str, Any] = {"text": self.detokenizer.text, "token_ids": token_ids}
        if self.logprobs is not None:
            found["logprobs"] = self.logprobs[: len(token_ids)]  # there may be more, of tokens after a stop string
        return found


@dataclass
class _Request:
    number: int
    choices: list[_Choice]
    place: int
    """Index of the prompt among the prompts of its call."""
    prompt_logprobs: list[TokenLogprobs | None] | None
    """Log-probabilities of the prompt; those of its first token are None, as in vLLM. None: not asked for."""

    def answer(self) -> dict[str, Any]:
        found = self.choices[0].answer()
        if self.prompt_logprobs is not None:
            found["prompt_logprobs"] = self.prompt_logprobs
        if len(self.choices) > 1:
            found["outputs"] = [choice.answer() for choice in self.choices]
        return found


@dataclass(eq=False)
class _Call:
    """The requests of one caller that have not ended."""

    num_prompts: int = 1
    """Number of prompts of the call. If there are several, an error names its prompt."""
    requests: dict[str, _Request] = field(default_factory=dict)
    news: News = field(default_factory=queue.SimpleQueue)
    errors: list[tuple[int, Exception]] = field(default_factory=list)
    """Errors of failed requests that were not raised yet, each with the index of its prompt."""
    num_new_tokens: int = 0
    """Number of output tokens that came with the last step."""


class LLM:
    """A language model. By default one engine in this process does everything; with `kv_transfer_backend=`, prefill and
    decode run in processes of their own. Keywords are those of nano-vllm and the fields of PdDisaggConfig.

    A model folder without a tokenizer serves token ids: then `tokenizer` is None, every text is "" (as in vLLM without
    a tokenizer), and input that is text, such as a prompt or a stop string, is refused.

    Several threads may call it at the same time; a forked process may not. It ends, with all that it has started, by
    `exit()`, at the end of a `with` block, when it is garbage-collected, or at the interpreter's end.
    """

    _default_backend: str | None = None
    """The `kv_transfer_backend` if none is given. None: one engine in this process."""

    def __init__(self, model: str | Path | None = None, **keywords: Any) -> None:
        """Load the model, and start what runs it. A warning names each keyword that is unknown, and so ignored.

        Raises:
            ValueError: a keyword has an invalid value.
            BrokenTokenizer: (a ValueError) the model's tokenizer cannot be read.
            FileNotFoundError: there is no such model folder, or a file is missing in it.
        """
        self._numbers = itertools.count()
        self._added = _Call()
        self._stepping = threading.Lock()
        self._backend: Backend | None = None
        settings = translated(keywords, self._default_backend)
        if "kv_transfer_backend" in settings:
            from hbserve.backends.disaggregated import DisaggregatedBackend as chosen
        else:
            from hbserve.backends.hybrid import HybridBackend as chosen  # type: ignore[assignment]
        folder = model_folder(model)
        self._tokenizer = load_tokenizer(folder)
        # A copy for callers: truncation that they switch on, perhaps in another thread, must not apply to our prompts.
        self.tokenizer: Any = copy.deepcopy(self._tokenizer)
        self._backend = chosen(folder, settings)
        # Refers to the backend only: an `atexit` of this object would keep it alive for ever.
        self._end = weakref.finalize(self, self._backend.close)

    def exit(self) -> None:
        """End everything that was started. Calls that wait for an answer raise. May be called twice."""
        backend = self._backend
        if backend is not None:
            self._end.detach()
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.exit()

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams) -> None:
        """Queue a prompt for `step`: a string, to which no chat template is applied, or token ids.

        Raises:
            InvalidRequest: (a ValueError) the request can never run; the message says why.
        """
        plain, params = [read_prompt(prompt)], read_params(sampling_params, 1)
        (token_ids,) = encode_all(self._tokenizer, plain, params)
        self._add(self._added, token_ids, params[0])

    def _add(self, call: _Call, token_ids: list[int], params: SamplingParams, place: int = 0) -> None:
        number = next(self._numbers)
        # As nano-vllm does, the text keeps special tokens.
        choices = []
        for _ in range(params.n):
            text = Detokenizer(
                self._tokenizer,
                params.stop,
                skip_special_tokens=False,
                min_tokens=params.min_tokens,
                include_stop_str_in_output=params.include_stop_str_in_output,
            )
            choices.append(_Choice(text, None if params.logprobs is None else []))
        request = _Request(number, choices, place, None if params.prompt_logprobs is None else [None])
        call.requests[str(number)] = request  # before `add`: if that is interrupted, the request may exist all the same
        try:
            with naming(place, call.num_prompts):
                self._running().add(str(number), token_ids, params, call.news)
        except InvalidRequest:
            del call.requests[str(number)]
            raise

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Compute one step of the requests that `add_request` has queued. Returns those that finished, as
        (number, output token ids), and the number of tokens that were computed.

        As in nano-vllm, that number is positive for a step with prompt tokens, and minus the number of sequences for a
        step that only decoded.

        Raises:
            LogitsNotFinite, RequestFailed, Unavailable, RequestTimeout: a request failed, and has ended. Each failure
                is raised once, after the requests that finished in the same step were returned, so that none is lost.
        """
        with self._stepping:
            finished, count = self._step(self._added)
        ended = [(request.number, each.detokenizer.token_ids) for request in finished for each in request.choices]
        return ended, count

    def _step(self, call: _Call) -> tuple[list[_Request], int]:
        if not call.requests and not call.errors:
            raise InvalidRequest("step: there is no request; add_request() first")
        progress, num_prompt_tokens = self._running().step(call.news) if not call.errors else ([], 0)
        call.num_new_tokens = sum(len(each.token_ids) for each in progress)
        finished = []
        for each in progress:
            request = call.requests.get(each.request_id)
            if request is None:  # it has ended at a stop string; this was under way
                continue
            if each.error is not None or each.finish_reason == "abort":
                del call.requests[each.request_id]
                call.errors.append((request.place, each.error or Ended()))
                if len(request.choices) > 1:
                    self._running().end([each.request_id], "abort")
                continue
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += each.prompt_logprobs
            if self._take(request, each):
                finished.append(call.requests.pop(each.request_id))
        if call.errors and not finished:
            place, error = call.errors.pop(0)
            with naming(place, call.num_prompts):
                raise error
        return finished, num_prompt_tokens or -len(progress)

    def _take(self, request: _Request, new: Progress) -> bool:
        """Add new tokens to a request. Returns whether that ended the request, which it does with its last choice."""
        choice = request.choices[new.choice]
        if choice.has_ended:  # at a stop string; this was under way
            return False
        if choice.logprobs is not None:
            choice.logprobs += new.logprobs
        text = choice.detokenizer
        text.feed(new.token_ids, final=new.finish_reason is not None)
        if text.stopped and new.finish_reason is None:
            one = [new.choice] if len(request.choices) > 1 else []
            self._running().end([new.request_id], "stop", *one)
        choice.has_ended = text.stopped or new.finish_reason is not None
        return all(each.has_ended for each in request.choices)

    def _step_rated(self, call: _Call) -> tuple[list[_Request], int]:
        """Do as `_step`, but count minus the new output tokens if no prompt tokens were computed in this process."""
        finished, count = self._step(call)
        return finished, count if count > 0 else -call.num_new_tokens

    def is_finished(self) -> bool:
        """Whether every request of `add_request` has finished, and `step` has returned or raised that."""
        return not self._added.requests and not self._added.errors

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Return `[{"text": …, "token_ids": […]}]`, in the order of the prompts. The token ids include the end token.

        `SamplingParams.logprobs` adds the key "logprobs": for each token, a dict of token ids and their
        log-probabilities, as in vLLM, where the values have them in `.logprob`. `SamplingParams.prompt_logprobs` adds
        "prompt_logprobs": the same for each prompt token, with None for the first. `SamplingParams.n` adds "outputs":
        all answers to the prompt, as in vLLM; the keys beside it are those of the first answer.

        If the call raises, nothing of it goes on.

        Raises:
            InvalidRequest: (a ValueError) a prompt or parameter can never run (the message names the prompt), or the
                number of parameters is wrong. None of the prompts is computed then.
            LogitsNotFinite: the model gives NaN or infinity for a prompt, which is named if there are several.
            RequestFailed, Unavailable, RequestTimeout: every attempt at a prompt failed, it had no instance, or it took
                too long. In all these cases the other prompts of this call are ended.
            RuntimeError: the LLM has ended, or belongs to another process.
        """
        plain = read_prompts(prompts)
        params = read_params(sampling_params, len(plain))
        todo = list(zip(encode_all(self._tokenizer, plain, params), params, strict=True))
        for place, (token_ids, each) in enumerate(todo):
            with naming(place, len(todo)):
                self._running().check(token_ids, each)
        finished: list[_Request] = []
        with progress_bar(len(todo), is_shown=use_tqdm) as bar:
            rates = _Rates()
            with contextlib.closing(self._follow(todo)) as steps:
                for ended, count in steps:
                    finished += ended
                    bar.set_postfix(rates.after(count))
                    bar.update(len(ended))
        return [each.answer() for each in sorted(finished, key=lambda each: each.number)]

    def _follow(
        self, todo: Sequence[tuple[list[int], SamplingParams]]
    ) -> Generator[tuple[list[_Request], int], None, None]:
        """Add requests as there is room for them, and step until all have ended. Yields the result of each step."""
        call = _Call(len(todo))
        try:
            for place, (token_ids, params) in enumerate(todo):
                self._add(call, token_ids, params, place)
                if call.errors or not call.news.empty():
                    yield self._step_rated(call)
            while call.requests or call.errors:
                yield self._step_rated(call)
        finally:
            if call.requests:  # left over after an error or a Ctrl-C
                with contextlib.suppress(Ended):
                    self._running().end(list(call.requests), "abort")

    def _running(self) -> Backend:
        if self._backend is None:
            raise Ended()
        return self._backend


MEASURED_S = 0.1


class _Rates:
    """The postfix of tqdm's bar, with nano-vllm's names: tokens per second of prefill and of decode, each measured over
    the last steps of that kind that took MEASURED_S together.

    A kind without steps is not shown, such as prefill if other processes compute the prompts.
    """

    def __init__(self) -> None:
        import time

        self._clock = time.perf_counter
        self._last_s = self._clock()
        self._tokens = {"Prefill": 0, "Decode": 0}
        self._time_s = {"Prefill": 0.0, "Decode": 0.0}
        self._shown: dict[str, str] = {}

    def after(self, count: int) -> dict[str, str]:
        now_s = self._clock()
        kind = "Prefill" if count > 0 else "Decode"
        self._tokens[kind] += abs(count)
        self._time_s[kind] += now_s - self._last_s
        self._last_s = now_s
        if kind not in self._shown or self._time_s[kind] >= MEASURED_S:
            self._shown[kind] = f"{int(self._tokens[kind] / max(self._time_s[kind], 1e-9))}tok/s"
            self._tokens[kind], self._time_s[kind] = 0, 0.0
        return self._shown

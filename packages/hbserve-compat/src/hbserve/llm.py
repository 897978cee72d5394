"""LLM: synchronous, and a drop-in for nano-vllm's."""

import atexit
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hbserve.demo_model import model_folder
from hbserve.detokenizer import Detokenizer
from hbserve.tokenizer import Prompt, encode, load_tokenizer
from hbserve_rpc import InvalidRequest, LogitsNotFinite, SamplingParams
from hbserve_rpc.messages import FinishReason

NANO_VLLM_NAMES = {"kvcache_block_size": "block_size", "num_kvcache_blocks": "num_blocks"}
IGNORED = {"hf_config": "it is read from the folder", "eos": "it is read from the folder"}


@dataclass(frozen=True)
class Progress:
    """What is new of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    error: Exception | None = None
    """It failed."""


class Backend(Protocol):
    """What computes: an engine in this process, or prefill and decode instances in others."""

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        """Raises InvalidRequest or Overloaded."""

    def step(self) -> tuple[list[Progress], int]:
        """What one step brought, and how many prompt tokens it computed."""

    def end(self, request_id: str) -> None:
        """A stop string has come: compute it no further."""

    def close(self) -> None: ...


@dataclass
class _Request:
    number: int
    detokenizer: Detokenizer
    error: Exception | None = None


class LLM:
    """One model. By default one engine in this process does everything; with `kv_transfer_backend=` prefill and decode
    run in processes of their own, and the other keywords are those of PdDisaggConfig.
    """

    def __init__(self, model: str | Path | None = None, **keywords: Any) -> None:
        """Takes nano-vllm's keywords too. One that is unknown warns by its name, and is ignored.

        Raises:
            ValueError: a keyword's value cannot be.
            FileNotFoundError: there is no such model folder, or a file is missing in it.
        """
        self._requests: dict[str, _Request] = {}
        self._ended: list[_Request] = []
        """For the next call of `step`."""
        self._numbers = itertools.count()
        self._backend: Backend | None = None
        settings = _translate(keywords)
        if "kv_transfer_backend" in settings:
            from hbserve.pd_disagg.background import DisaggregatedBackend as chosen
        else:
            from hbserve.hybrid import HybridBackend as chosen  # type: ignore[assignment]
        folder = model_folder(model)
        self.tokenizer: Any = load_tokenizer(folder)
        self._backend = chosen(folder, settings)
        atexit.register(self.exit)

    def exit(self) -> None:
        """End everything that was started. May be called twice; also called at the interpreter's end."""
        atexit.unregister(self.exit)
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams) -> None:
        """Queue a prompt: a string, to which no chat template is applied, or token ids.

        Raises:
            InvalidRequest: (a ValueError) it can never run; says why.
        """
        self._add(prompt, sampling_params)

    def _add(self, prompt: Prompt, params: SamplingParams) -> int:
        number = next(self._numbers)
        self._running().add(str(number), encode(self.tokenizer, prompt), params)
        # As nano-vllm does, the text keeps special tokens.
        self._requests[str(number)] = _Request(
            number, Detokenizer(self.tokenizer, params.stop, skip_special_tokens=False)
        )
        return number

    def step(self) -> tuple[list[tuple[int, list[int]]], int]:
        """Compute once: the requests that finished, as (number, output token ids), and how many tokens were computed.

        As in nano-vllm that count is positive for a step with prompt tokens, and minus the number of sequences for a
        step that only decoded.

        Raises:
            LogitsNotFinite, RequestFailed: a request failed. It has ended; what else this step has brought is not lost,
                but comes with the next call.
        """
        ended = self._ended or self._step()[0]
        failed = next((request for request in ended if request.error is not None), None)
        self._ended = [] if failed is None else [request for request in ended if request is not failed]
        if failed is not None and failed.error is not None:
            raise failed.error
        return [(request.number, request.detokenizer.token_ids) for request in ended], self._last_count

    def _step(self) -> tuple[list[_Request], int]:
        progress, num_prompt_tokens = self._running().step()
        self._num_new_tokens = sum(len(each.token_ids) for each in progress)
        finished = []
        for each in progress:
            request = self._requests.get(each.request_id)
            if request is None:  # it ended at a stop string, and this came meanwhile
                continue
            request.error = each.error
            request.detokenizer.feed(each.token_ids, final=each.finish_reason is not None)
            if request.detokenizer.stopped and each.finish_reason is None:
                self._running().end(each.request_id)
            if request.detokenizer.stopped or each.finish_reason or each.error is not None:
                finished.append(self._requests.pop(each.request_id))
        self._last_count = num_prompt_tokens or -len(progress)
        return finished, self._last_count

    _last_count = 0
    _num_new_tokens = 0

    def is_finished(self) -> bool:
        """Whether every request has finished, and `step` has said so."""
        return not self._requests and not self._ended

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """`[{"text": …, "token_ids": […]}]`, in the order of the prompts. The token ids include the end token.

        Raises:
            InvalidRequest: (a ValueError) a prompt or parameter can never run, or a wrong number of parameters; names
                the prompt. None of the prompts is computed then.
            LogitsNotFinite: the model gives NaN or infinity for a prompt, which it names if there are several.
            RequestFailed: every attempt at a prompt failed. In both cases the other prompts of this call are ended.
        """
        from tqdm import tqdm

        from hbserve.answers import is_single, one_each

        every: list[Any] = [prompts] if is_single(prompts) else list(prompts)
        numbers = self._add_all(every, one_each(sampling_params, len(every)))
        results: dict[int, dict[str, Any]] = {}
        try:
            with tqdm(total=len(every), desc="Generating", dynamic_ncols=True, disable=not use_tqdm) as bar:
                rates = _Rates()
                while not all(number in results for number in numbers):
                    finished, count = self._step()
                    bar.set_postfix(rates.after(count if count > 0 else -self._num_new_tokens))
                    self._ended += [request for request in finished if request.number not in numbers]
                    for request in finished:
                        if request.number in numbers:
                            text = _checked(request, numbers).detokenizer
                            results[request.number] = {"text": text.text, "token_ids": text.token_ids}
                            bar.update()
        finally:
            self._drop(numbers)  # what an error or a Ctrl-C has left behind
        return [results[number] for number in numbers]

    def _drop(self, numbers: list[int]) -> None:
        for number in numbers:
            if self._requests.pop(str(number), None) is not None:
                self._running().end(str(number))

    def _add_all(self, prompts: list[Any], params: list[SamplingParams]) -> list[int]:
        numbers: list[int] = []
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            try:
                numbers.append(self._add(prompt, each))
            except ValueError as error:
                self._drop(numbers)
                raise InvalidRequest(f"prompts[{i}]: {error}" if len(prompts) > 1 else str(error)) from error
        return numbers

    def _running(self) -> Backend:
        if self._backend is None:
            raise RuntimeError("this LLM has ended: exit() was called")
        return self._backend


def _checked(request: _Request, numbers: list[int]) -> _Request:
    """Raises its error, if it has one."""
    if isinstance(request.error, LogitsNotFinite) and len(numbers) > 1:
        raise LogitsNotFinite(f"prompts[{numbers.index(request.number)}]: {request.error}") from request.error
    if request.error is not None:
        raise request.error
    return request


MEASURED_S = 0.1


class _Rates:
    """tqdm's postfix, with nano-vllm's names: tokens per second of the last steps of each kind, MEASURED_S together.

    A kind that was not seen has none: prompts that other processes compute are not counted here.
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


def within_model_len(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """As in nano-vllm, a `max_model_len` beyond the model's own means the model's own."""
    from hbserve_core.model_config import load_model_config

    wanted = settings.get("max_model_len")
    if not isinstance(wanted, int):  # None is the model's own; a wrong type is refused with the other keywords
        return settings
    return settings | {"max_model_len": min(wanted, load_model_config(folder).max_model_len)}


def _translate(keywords: dict[str, Any]) -> dict[str, Any]:
    """nano-vllm's keywords in our words; unknown ones warn."""
    from hbserve.pd_disagg.config import PdDisaggConfig

    known = set(PdDisaggConfig.__slots__) - {"model_path"}
    settings: dict[str, Any] = {}
    for name, value in keywords.items():
        if name in IGNORED:
            warnings.warn(f"LLM({name}=...) is not used: {IGNORED[name]}", stacklevel=3)
        elif name == "enforce_eager":
            settings["cuda_graph_enabled"] = not value
        elif (own := NANO_VLLM_NAMES.get(name, name)) in known:
            settings[own] = None if name == "num_kvcache_blocks" and value == -1 else value
        else:
            warnings.warn(f"LLM({name}=...) is unknown and ignored", stacklevel=3)
    return settings

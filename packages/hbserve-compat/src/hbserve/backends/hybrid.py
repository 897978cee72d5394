"""A backend of LLM: one engine in this process."""

from pathlib import Path
from typing import Any

import msgspec

from hbserve.backends.backend import News, Progress, drained
from hbserve.backends.keywords import within_model_len
from hbserve.backends.own_thread import Ended, OwnThread
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.processes.launcher import instance_settings
from hbserve_core import Engine, InstanceConfig, make_runner
from hbserve_core.engine.step import Runner
from hbserve_core.grammars.matcher import Matcher
from hbserve_rpc import InvalidRequest, SamplingParams
from hbserve_rpc.messages import FinishReason

NANO_VLLM_DEFAULTS = {"max_num_batched_tokens": 16384, "max_num_seqs": 512, "max_model_len": 4096, "chunk_size": 4096}
HYBRID = [{"instance_id": "hybrid-0", "instance_type": "hybrid"}]


class HybridBackend:
    """An engine that steps on request, in a thread of its own. Any thread may ask, and nothing interrupts a step."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        wanted = within_model_len(folder, NANO_VLLM_DEFAULTS | settings)
        config = PdDisaggConfig(folder, **(wanted | {"gpu_instances": HYBRID})).to_deployment()
        plain = instance_settings(config, config.gpu_instances[0], folder, log_level="WARNING")
        self._runner: Runner | None = None
        self._engine: Engine | None = None
        self._news: dict[str, tuple[News, set[int]]] = {}
        """The queue for each request's progress, and the indices of its choices that have not ended."""
        self._thread = OwnThread("hbserve-engine")
        try:
            self._thread.call(lambda: self._start(msgspec.convert(plain, InstanceConfig)))
        except BaseException:
            self.close()
            raise

    def _start(self, config: InstanceConfig) -> None:
        self._runner = make_runner(config)
        self._engine = Engine(config, self._runner)

    def check(self, token_ids: list[int], params: SamplingParams) -> None:
        for name in ("priority", "timeout_s"):
            if given := getattr(params, name):
                problem = "is for a deployment; one engine steps when it is asked to, and has no queue in front of it"
                raise InvalidRequest(f"{name}={given}: {problem}")
        engine = self._running()
        engine.limits.sequence("check", token_ids, params)
        engine.grammars.matcher(params)

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams, news: News) -> None:
        matcher = self._running().grammars.matcher(params)
        self._thread.call(lambda: self._add(request_id, token_ids, params, matcher, news))

    def _add(
        self, request_id: str, token_ids: list[int], params: SamplingParams, matcher: Matcher | None, news: News
    ) -> None:
        self._running().add(request_id, token_ids, params, matcher=matcher)
        self._news[request_id] = news, set(range(params.n))

    def step(self, news: News) -> tuple[list[Progress], int]:
        num_prompt_tokens = self._thread.call(lambda: self._step(news))
        return drained(news), num_prompt_tokens

    def _step(self, news: News) -> int:
        engine = self._running()
        if not news.empty():  # another caller's step has brought it already
            return 0
        if not engine.has_work():
            raise InvalidRequest("step: there is no request; add_request() first")
        before = engine.stats().num_prefill_tokens
        for each in engine.step():
            whose, _ = self._news[each.request_id]
            if each.is_last:
                self._forget(each.request_id, each.choice)
            more = each.all_logprobs, each.prompt_logprobs, each.choice
            whose.put(Progress(each.request_id, each.token_ids, each.finish_reason, each.error, *more))
        return engine.stats().num_prefill_tokens - before

    def _forget(self, request_id: str, choice: int) -> None:
        """Drop a choice that has ended, and with the last one its request."""
        _, choices = self._news.get(request_id, (None, set[int]()))
        choices.discard(choice)
        if not choices:
            self._news.pop(request_id, None)

    def end(self, request_ids: list[str], reason: FinishReason, choice: int | None = None) -> None:
        self._thread.call(lambda: self._end(request_ids, choice))

    def _end(self, request_ids: list[str], choice: int | None) -> None:
        for request_id in request_ids:
            if choice is None:
                self._news.pop(request_id, None)
                self._running().release(request_id)
            else:
                self._forget(request_id, choice)
                self._running().release_choice(request_id, choice)

    def close(self) -> None:
        self._thread.end(self._close)

    def _close(self) -> None:
        runner, self._runner, self._engine = self._runner, None, None
        if runner is not None:
            runner.close()

    def _running(self) -> Engine:
        if self._engine is None:
            raise Ended()
        return self._engine

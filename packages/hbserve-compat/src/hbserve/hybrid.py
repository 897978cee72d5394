"""One engine in this process, for LLM."""

from pathlib import Path
from typing import Any

import msgspec

from hbserve.launcher import instance_settings
from hbserve.llm import Progress, within_model_len
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve_core import Engine, InstanceConfig, make_runner
from hbserve_rpc import InvalidRequest, LogitsNotFinite, SamplingParams

NANO_VLLM_DEFAULTS = {"max_num_batched_tokens": 16384, "max_num_seqs": 512, "max_model_len": 4096, "chunk_size": 4096}
HYBRID = [{"instance_id": "hybrid-0", "instance_type": "hybrid"}]


class HybridBackend:
    """Steps when it is asked to."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        wanted = within_model_len(folder, NANO_VLLM_DEFAULTS | settings)
        config = PdDisaggConfig(folder, **(wanted | {"gpu_instances": HYBRID})).to_deployment()
        plain = instance_settings(config, config.gpu_instances[0], folder, log_level="WARNING")
        instance = msgspec.convert(plain, InstanceConfig)
        self._runner = make_runner(instance)
        self._engine = Engine(instance, self._runner)

    def add(self, request_id: str, token_ids: list[int], params: SamplingParams) -> None:
        self._engine.add(request_id, token_ids, params)

    def step(self) -> tuple[list[Progress], int]:
        if not self._engine.has_work():
            raise InvalidRequest("step: there is no request; add_request() first")
        before = self._engine.stats().num_prefill_tokens
        outputs = self._engine.step()
        progress = [
            Progress(
                each.request_id, each.token_ids, each.finish_reason, LogitsNotFinite(each.error) if each.error else None
            )
            for each in outputs
        ]
        return progress, self._engine.stats().num_prefill_tokens - before

    def end(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def close(self) -> None:
        self._runner.close()
        del self._engine, self._runner

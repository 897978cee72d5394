"""Four workloads on one engine, compared with the most that the device could do: `hbserve bench engine`.

    mixed     many requests of random prompt and output lengths, all at once: nano-vllm's own benchmark
    single    one request: the latency of a decode step
    prefill   prompts only
    decode    many requests in step, each with a context of its own
The limits are measured on the same device, in the same run: see device_limits.py and model_work.py.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hbserve_core.bench.device_limits import DeviceLimits, measure_limits
from hbserve_core.bench.model_work import NO_WORK, DecodeLimit, decode_limit, prefill_flops, stored_bytes
from hbserve_core.config import InstanceConfig
from hbserve_core.engine.engine import Engine
from hbserve_core.ranks.make_runner import make_runner
from hbserve_rpc import SamplingParams

WORKLOADS = ("mixed", "single", "prefill", "decode")


@dataclass(frozen=True)
class Sizes:
    """Sizes of each workload. The defaults are nano-vllm's benchmark and its companions."""

    num_requests: int = 256
    shortest: int = 100
    longest: int = 1024
    """Largest number of tokens of prompts and outputs of `mixed`; `shortest` is the smallest."""
    single_len: int = 512
    num_prompts: int = 64
    prompt_len: int = 2048
    context_len: int = 1024
    decode_len: int = 256

    def scaled(self, factor: float) -> "Sizes":
        """Return sizes for slower devices: every number times `factor`, but at least 2."""
        return Sizes(*(max(2, round(getattr(self, name) * factor)) for name in self.__dataclass_fields__))

    @property
    def longest_sequence(self) -> int:
        return max(2 * self.longest, 2 * self.single_len, self.prompt_len + 1, self.context_len + self.decode_len + 1)


@dataclass(frozen=True)
class Measured:
    """Measurement of one run of a workload, from the first request's arrival to the last one's end."""

    time_s: float
    num_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    host_time_s: float
    decode_time_s: float
    """Time from the moment when every request had its first token."""
    num_decode_steps: int
    decode_limit: DecodeLimit
    """Limit of those steps together, if all requests decode in step."""
    flops: float
    """Operations of the products and the attention that prefill must compute."""


def bench_config(model_path: str, sizes: Sizes, **settings: object) -> InstanceConfig:
    """Return the configuration of a hybrid engine with room for all of a workload's requests at once."""
    chosen = {
        "max_num_seqs": max(sizes.num_requests, sizes.num_prompts),
        "max_num_batched_tokens": 16384,
        "chunk_size": 16384,
        "max_chunk_prefill_tokens": 16384,
        "max_model_len": sizes.longest_sequence,
    }
    return InstanceConfig(model_path=model_path, **{**chosen, **settings})  # type: ignore[arg-type]


class EngineBench:
    """Engine, with the workloads on it. Prompts are random and different each time, so none is in the prefix cache."""

    def __init__(self, config: InstanceConfig, sizes: Sizes) -> None:
        begin = time.perf_counter()
        self._runner = make_runner(config)
        self._engine = Engine(config, self._runner)
        self._config, self._sizes = config, sizes
        self._random = random.Random(0)
        self._count = 0
        try:
            self._serve([(self._prompt(min(100, sizes.longest)), 16)])
            self.start_time_s = time.perf_counter() - begin
            """Time from nothing to the first answer: loading, compiling, capturing."""
            self.limits = measure_limits(self._runner.device, self._runner.dtype, config.tensor_parallel_size)
        except BaseException:
            self._runner.close()
            raise

    def measure(self, workload: str) -> Measured:
        sizes = self._sizes
        if workload == "mixed":
            between = (sizes.shortest, sizes.longest)
            lengths = [
                (self._random.randint(*between), self._random.randint(*between)) for _ in range(sizes.num_requests)
            ]
            return self._run([(self._prompt(length), count) for length, count in lengths])
        if workload == "single":
            return self._run([(self._prompt(sizes.single_len), sizes.single_len)])
        if workload == "prefill":
            return self._run([(self._prompt(sizes.prompt_len), 1) for _ in range(sizes.num_prompts)])
        return self._run([(self._prompt(sizes.context_len), sizes.decode_len + 1) for _ in range(sizes.num_requests)])

    def close(self) -> None:
        self._runner.close()

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(self._runner.model_config.vocab_size) for _ in range(length)]

    def _serve(self, requests: list[tuple[list[int], int]]) -> tuple[float, int]:
        """Serve prompts, with the number of tokens that each gets, all at once. Returns when, and after how many steps,
        the last of them had its first token. Raises LogitsNotFinite."""
        engine = self._engine
        for prompt, count in requests:
            self._count += 1
            engine.add(str(self._count), prompt, SamplingParams(0.6, count, ignore_eos=True))
        missing, decode_begin, first_decode = len(requests), 0.0, 0
        while engine.has_work():
            outputs = engine.step()
            for output in outputs:
                output.raise_error()
            firsts = sum(output.token_id is not None and output.index == 0 for output in outputs)
            missing -= firsts
            if firsts and not missing:
                decode_begin, first_decode = time.perf_counter(), engine.stats().num_steps
        return decode_begin, first_decode

    def _run(self, requests: list[tuple[list[int], int]]) -> Measured:
        begin, before = time.perf_counter(), self._engine.stats()
        decode_begin, first_decode = self._serve(requests)
        end, after = time.perf_counter(), self._engine.stats()
        return Measured(
            time_s=end - begin,
            num_steps=after.num_steps - before.num_steps,
            num_prompt_tokens=after.num_prefill_tokens - before.num_prefill_tokens,
            num_output_tokens=after.num_generated_tokens - before.num_generated_tokens,
            host_time_s=after.host_time_s - before.host_time_s,
            decode_time_s=end - decode_begin,
            num_decode_steps=after.num_steps - first_decode,
            decode_limit=self._decode_limit(requests),
            flops=prefill_flops(self._runner.model_config, [len(prompt) for prompt, _ in requests]),
        )

    def _decode_limit(self, requests: list[tuple[list[int], int]]) -> DecodeLimit:
        model, dtype, limit = self._runner.model_config, self._runner.dtype, NO_WORK
        weights = stored_bytes(self._config, model, dtype, self._runner.device)
        for step in range(1, max(count for _, count in requests)):
            contexts = [len(prompt) + step for prompt, count in requests if count > step]
            mean = sum(contexts) / len(contexts)
            limit += decode_limit(model, dtype, len(contexts), mean, self.limits, self._runner.pool.dtype, weights)
        return limit


def report(workload: str, measured: Measured, limits: DeviceLimits) -> str:
    """Format a line with what was reached, and its share of the limit."""
    time_s, steps = measured.time_s, max(1, measured.num_steps)
    host = f"host {1e3 * measured.host_time_s / steps:5.2f} ms"
    if workload == "prefill":
        reached, limit = measured.flops / time_s / 1e12, limits.flops_per_s / 1e12
        share = f"{reached:.3g} TFLOP/s = {reached / limit:.0%} of {limit:.3g}"
        tokens = f"{measured.num_prompt_tokens / time_s:9.0f} in tok/s "
        return f"{workload:8}{tokens}{1e3 * time_s / steps:8.2f} ms a step, {host}  {share}"
    out = f"{measured.num_output_tokens / time_s:9.0f} out tok/s"
    if workload == "mixed":
        return f"{workload:8}{out}{1e3 * time_s / steps:8.2f} ms a step, {host}"
    decode_time_s, least = measured.decode_time_s, measured.decode_limit
    step_ms = 1e3 * decode_time_s / max(1, measured.num_decode_steps)
    share = f"{least.read_bytes / decode_time_s / 1e9:.4g} GB/s, {least.share_of(decode_time_s)}"
    return f"{workload:8}{out}{step_ms:8.2f} ms a decode step, {host}  {share}"


def run_bench(config: InstanceConfig, sizes: Sizes, workloads: Sequence[str], say: Callable[[str], None]) -> None:
    """Measure each workload twice, after a warm-up, and say a line for each run.

    Raises what `make_runner` raises, and LogitsNotFinite if the model gives no numbers: then its steps are not those of
    a request that goes on.
    """
    bench = EngineBench(config, sizes)
    try:
        say(f"start to first token {bench.start_time_s:.1f} s")
        say(f"limits of this device: {bench.limits}")
        for workload in workloads:
            for _ in range(2):
                say(report(workload, bench.measure(workload), bench.limits))
    finally:
        bench.close()

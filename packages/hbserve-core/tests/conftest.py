"""Small random models of every supported kind, and transformers as the oracle of what they say."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name: (transformers' configuration class, what differs from SMALL, size limit of one safetensors file)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}, "1GB"),
    "qwen3-wide-heads": ("Qwen3Config", {"head_dim": 32, "num_key_value_heads": 1}, "1GB"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, "1GB"),
    "qwen2-sharded": ("Qwen2Config", {"num_hidden_layers": 3}, "100KB"),
    "llama": ("LlamaConfig", {"head_dim": 16}, "1GB"),
    "llama-9-heads": (
        "LlamaConfig",
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        "1GB",
    ),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "num_hidden_layers": 3}, "1GB"),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        "1GB",
    ),
    # 64 positions of its own: test prompts are longer. Heads are wide enough for pairs of all three kinds.
    "qwen3-yarn": (
        "Qwen3Config",
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4,
            },
        },
        "1GB",
    ),
    "qwen2-dynamic-rope": (
        "Qwen2Config",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
        "1GB",
    ),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}, "1GB"),
    # Half of each head is rotated.
    "phi3": (
        "Phi3Config",
        {"pad_token_id": 0, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "1GB",
    ),
    # Windows of no whole number of blocks, shorter than a chunk; prompts are up to 77 tokens.
    "mistral-window": ("MistralConfig", {"sliding_window": 21, "num_key_value_heads": 1}, "1GB"),
    "qwen2-last-layers-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
        "1GB",
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 13, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
        | {"query_pre_attn_scalar": 24, "pad_token_id": 0},
        "1GB",
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 13, "num_hidden_layers": 3, "sliding_window_pattern": 3, "pad_token_id": 0}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        "1GB",
    ),
    # The second layer is an ordinary one.
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        }
        | {"norm_topk_prob": True},
        "1GB",
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 21}, "1GB"),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4, "pad_token_id": 0}, "1GB"),
    "olmo2": ("Olmo2Config", {"pad_token_id": 0}, "1GB"),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,  # by 12, as real ones are, a token is followed by itself, whatever it saw
            "residual_multiplier": 0.8,
            "logits_scaling": 8.0,
            "attention_multiplier": 0.1,
            "tie_word_embeddings": True,
        },
        "1GB",
    ),
    # 64 positions before they were extended.
    "olmo3": (
        "Olmo3Config",
        {"head_dim": 16, "sliding_window": 13, "num_hidden_layers": 4, "pad_token_id": 0}
        | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
        "1GB",
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}, "1GB"),
    "ministral": (
        "MinistralConfig",
        {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 13},
        "1GB",
    ),
    "seed-oss": ("SeedOssConfig", {"head_dim": 16, "pad_token_id": 0}, "1GB"),
    # Layer norms with biases, MLPs without gates.
    "opt": (
        "OPTConfig",
        {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": 4, "pad_token_id": 0},
        "1GB",
    ),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 21, "tie_word_embeddings": True}, "1GB"),
    "stablelm": ("StableLmConfig", {"use_qkv_bias": True, "rope_parameters": {"partial_rotary_factor": 0.25}}, "1GB"),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, "1GB"),
}

OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    # 64 positions of its own.
    "phi3-longrope": (
        "Phi3Config",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "long_factor": [1.0, 1.5, 3.0, 8.0],
                "short_factor": [1.0, 1.1, 1.2, 1.3],
            },
        },
        "1GB",
    ),
    "gemma3-local-longrope": (
        "Gemma3TextConfig",
        # Scores are large enough for tokens to depend on positions.
        {"head_dim": 16, "sliding_window": 13, "sliding_window_pattern": 2, "pad_token_id": 0}
        | {"query_pre_attn_scalar": 1, "num_hidden_layers": 3}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 64,
                    "long_factor": [8.0, 9.0] * 4,
                    "short_factor": [1.0, 1.1, 1.2, 1.3] * 2,
                },
            }
        },
        "1GB",
    ),
}
"""Those that not every test can have."""


def _write_model(folder: Path, name: str) -> None:
    import torch
    import transformers

    class_name, changes, shard_size = (MODELS | OTHERS)[name]
    config = getattr(transformers, class_name)(**(SMALL | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            # Large weights make the next token depend on the whole context; norms and biases must not be trivial.
            mean = 1.0 if "norm" in parameter_name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)


@pytest.fixture
def load_small(tmp_path: Path) -> Callable[..., Any]:
    """Called with an architecture's name and what differs from SMALL: the ModelConfig of such a config.json."""
    from hbserve_core.model.model_config import load_model_config

    def load(name: str, **changes: Any) -> Any:
        content = SMALL | {"architectures": [f"{name}ForCausalLM"]} | changes
        (tmp_path / "config.json").write_text(json.dumps(content))
        return load_model_config(tmp_path)

    return load


@pytest.fixture
def little_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device's limits are measured with is many times its cache's size, and takes seconds of a busy core."""
    from hbserve_core.bench import device_limits

    monkeypatch.setitem(device_limits._MEMORY_BYTES, "cpu", 1 << 22)
    monkeypatch.setitem(device_limits._MATRIX_SIZE, "cpu", 128)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random float32 model by name (see MODELS). Token 2 ends a sequence; 512 tokens at most."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        _write_model(path, name)
        return path

    return folder


@dataclass(frozen=True)
class BrokenModel:
    """A model that gives no numbers after one token, whose embedding is NaN; elsewhere it is `whole`.

    That token is not in `sound`, prompts by name, nor in what follows them. It is in `prompt`, or in what follows that.
    """

    whole: str
    folder: Path
    sound: dict[str, list[int]]
    prompt: list[int]
    output: list[int]
    """What comes before the error."""


@pytest.fixture(scope="session")
def broken_model(
    model_folder: Callable[[str], Path],
    greedy_tokens: Callable[[str, Sequence[int], int], list[int]],
    prompt: Callable[..., list[int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], BrokenModel]:
    """A BrokenModel by the number of output tokens before the error. Nobody generates more than 8 tokens."""
    whole = "llama"  # its head is not its embedding

    @cache
    def make(num_output: int) -> BrokenModel:
        import shutil

        from safetensors.torch import load_file, save_file

        sound = {str(length): prompt(length, salt=length) for length in (1, 7, 33)}
        harmless = {t for ids in sound.values() for t in [*ids, *greedy_tokens(whole, ids, 8)]}
        for salt in range(100, 200):
            ids = prompt(20, salt=salt)
            known = [*ids, *greedy_tokens(whole, ids, 8)[:num_output]]
            if known[-1] not in harmless and known[-1] not in known[:-1]:
                break
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(model_folder(whole), folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][known[-1]] = float("nan")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return BrokenModel(whole, folder, sound, ids, known[len(ids) :])

    return make


@pytest.fixture(scope="session")
def numberless_model(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose logits are NaN whatever it reads."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("numberless") / "model"
    shutil.copytree(model_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference_model(model_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' own model, float32, in evaluation mode, by name."""

    @cache
    def model(name: str) -> Any:
        import torch
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32).eval()

    return model


@pytest.fixture(scope="session")
def greedy_tokens(reference_model: Callable[[str], Any]) -> Callable[[str, Sequence[int], int], list[int]]:
    """The `count` tokens that transformers generates greedily after a prompt; end-of-sequence tokens do not stop it."""

    @cache
    def generate(name: str, prompt: tuple[int, ...], count: int) -> list[int]:
        import torch

        given = torch.tensor([prompt])
        out = reference_model(name).generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    return lambda name, prompt, count: generate(name, tuple(prompt), count)


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """Token ids from 3 to 252: no end-of-sequence token, no short period, another row for each salt."""

    def make(length: int, salt: int = 0) -> list[int]:
        return [3 + (7 * i * i + 11 * i + 13 * salt * (i + 1)) % 250 for i in range(length)]

    return make


@pytest.fixture(scope="session", params=MODELS)
def model_name(request: pytest.FixtureRequest) -> str:
    """Runs the test once for each small model."""
    return str(request.param)


class Stepper:
    """Drives a ModelRunner by hand: sequences with blocks of their own, and greedy generation in chunks."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        total = runner.pool.shape[0]
        # Neighbouring blocks of a sequence must not be neighbours in the pool.
        self._free = sorted(range(total), key=lambda i: (i * 7919) % 104729)

    def sequence(self, prompt: Sequence[int], **params: Any) -> Any:
        from hbserve_core.engine.sequence import Sequence as EngineSequence
        from hbserve_rpc import SamplingParams

        given = SamplingParams(**({"temperature": 0, "max_tokens": 64, "ignore_eos": True} | params))
        return EngineSequence("request", list(prompt), len(prompt), given)

    def step(self, work: Sequence[tuple[Any, int]]) -> None:
        """One step that computes so many tokens of each sequence, and appends what it samples."""
        from hbserve_core.engine.sequence import ScheduledChunk

        chunks = []
        for sequence, num_new in work:
            num_tokens = sequence.num_computed_tokens + num_new
            while len(sequence.block_table) * self.runner.config.block_size < num_tokens:
                sequence.block_table.append(self._free.pop())
            chunks.append(ScheduledChunk(sequence, num_new))
        samples = [chunk.samples for chunk in chunks]
        tokens = self.runner.run(chunks).tokens
        assert [token is not None for token in tokens] == samples
        for chunk, token in zip(chunks, tokens, strict=True):
            chunk.sequence.num_computed_tokens += chunk.num_new_tokens
            if token is not None:
                chunk.sequence.token_ids.append(token)

    def generate(self, sequences: Sequence[Any], count: int, chunk_size: int = 1 << 30) -> None:
        """Every sequence in every step, each with at most chunk_size tokens, until all have `count` output tokens."""
        while unfinished := [sequence for sequence in sequences if sequence.num_output_tokens < count]:
            self.step([(s, min(chunk_size, s.num_tokens - s.num_computed_tokens)) for s in unfinished])


@pytest.fixture(scope="session")
def stepper() -> Callable[[Any], Stepper]:
    return Stepper


@contextlib.contextmanager
def _closing_if_it_fails(group: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        group.close()  # so that nobody waits for this rank
        raise


class RanksInThreads:
    """Stands for Workers: the other ranks are threads of this process. All else is real: groups over Gloo, messages,
    runners that follow. Rank 0's runner is `runner`."""

    transfer_addresses = ()

    def __init__(self, make: Callable[[Any], Any], size: int) -> None:
        """make: makes a rank's own runner from its RankGroup."""
        import queue
        import socket
        from concurrent.futures import ThreadPoolExecutor

        from hbserve_core.ranks.distributed_group import host_store
        from hbserve_core.ranks.tensor_parallel_runner import TensorParallelRunner

        listening = socket.create_server(("127.0.0.1", 0))
        self._port = listening.getsockname()[1]
        self._store = host_store(listening.detach(), self._port)
        self._make, self._size = make, size
        self._queues: list[Any] = [queue.SimpleQueue() for _ in range(1, size)]
        self._threads = ThreadPoolExecutor(size)
        self._groups: list[Any] = []
        self._following = [self._threads.submit(self._follow, rank) for rank in range(1, size)]
        group = self._group(0)
        with _closing_if_it_fails(group):
            self.own = self._make(group)
        self.runner = TensorParallelRunner(self.own, self)  # type: ignore[arg-type]

    def _group(self, rank: int) -> Any:
        import torch

        from hbserve_core.model.shard import Shard
        from hbserve_core.ranks.distributed_group import DistributedRankGroup, reach_store

        group = DistributedRankGroup(
            Shard(rank, self._size), torch.device("cpu"), reach_store(self._port), seed=7
        )  # see test_triton_path.py
        self._groups.append(group)
        group.connect()
        return group

    def _follow(self, rank: int) -> None:
        from hbserve_core.ranks.worker_main import follow

        group = self._group(rank)
        with _closing_if_it_fails(group):
            follow(self._make(group), iter(self._queues[rank - 1].get, None), lambda _: None)

    def send(self, message: bytes) -> None:
        for each in self._queues:
            each.put(message)

    def naming_the_lost_rank(self) -> Any:
        return contextlib.nullcontext()

    def close(self) -> None:
        self.send(None)  # type: ignore[arg-type]
        for each in self._following:
            each.result(timeout=60)
        self._threads.shutdown()
        for group in self._groups:
            group.close()


@pytest.fixture
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RanksInThreads]]:
    """Makes RanksInThreads, and ends them. Whoever waits for a rank that has failed says so before the test's own time
    is over, which would end it without a word of the cause."""
    from hbserve_core.ranks import distributed_group

    monkeypatch.setattr(distributed_group, "COLLECTIVE_TIMEOUT_S", 120.0)
    made: list[RanksInThreads] = []

    def make(make_runner: Callable[[Any], Any], size: int) -> RanksInThreads:
        made.append(RanksInThreads(make_runner, size))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def generate() -> Callable[..., dict[str, list[int]]]:
    """Runs named prompts through an engine, greedily unless told otherwise; afterwards every block is free."""
    from hbserve_rpc import SamplingParams

    def run(engine: Any, prompts: dict[str, list[int]], count: int, **params: Any) -> dict[str, list[int]]:
        for name, prompt in prompts.items():
            engine.add(name, prompt, SamplingParams(**({"temperature": 0} | params), max_tokens=count, ignore_eos=True))
        found: dict[str, list[int]] = {name: [] for name in prompts}
        while engine.has_work():
            for output in engine.step():
                found[output.request_id] += output.token_ids
            engine.check_integrity()
        assert engine.blocks.num_free == engine.blocks.num_blocks
        return found

    return run


@pytest.fixture(scope="session")
def beside_a_broken_request() -> Callable[..., tuple[dict[str, list[int]], dict[str, str]]]:
    """Run the prompts of a BrokenModel together: tokens and errors by name. No block is held afterwards."""
    from hbserve_rpc import SamplingParams

    def run(engine: Any, model: BrokenModel, max_tokens: int, temperature: float = 0) -> Any:
        for name, ids in [*model.sound.items(), ("broken", model.prompt)]:
            engine.add(name, ids, SamplingParams(temperature, max_tokens, ignore_eos=True))
        tokens: dict[str, list[int]] = {}
        errors: dict[str, str] = {}
        while engine.has_work():
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                errors |= {output.request_id: str(output.error)} if output.error else {}
            engine.check_integrity()
        assert engine.blocks.num_free == engine.blocks.num_blocks
        return tokens, errors

    return run


def pytest_configure() -> None:
    """Without a GPU our kernels run in Triton's interpreter, which must be said before they are first imported."""
    import os

    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def language_is_interpreted() -> Iterator[None]:
    """What Triton's language means in the interpreter, for all kernels at once; see hbserve_core_quick_interpreter."""
    import os

    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from hbserve_core_quick_interpreter import hasten

    with pytest.MonkeyPatch.context() as patch:
        restore = hasten(patch)
        yield
    restore()


@pytest.fixture
def fewer_programs(language_is_interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For whole steps: the interpreter takes as long for a program, however much of the work it has."""
    if importlib.util.find_spec("triton") is not None:
        from hbserve_core.cuda_runner.kernels import few_rows_linear, prefill_attention

        monkeypatch.setattr(few_rows_linear, "_SMALL_OUTPUTS", (64, 64))
        monkeypatch.setattr(prefill_attention, "_STORED_ROWS", (32, 32))


@pytest.fixture
def one_kernel_at_a_time(language_is_interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is not made for threads; nor is Python 3.11's `ast.parse` (python/cpython#106905), by which
    it rewrites a kernel at its first launch."""
    import threading

    from triton.runtime.interpreter import InterpretedFunction

    import hbserve_core.cuda_runner.decoder  # noqa: F401  # nor is its first import

    lock, run = threading.Lock(), InterpretedFunction.run

    def locked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        with lock:
            return run(self, *arguments, **keywords)

    monkeypatch.setattr(InterpretedFunction, "run", locked)


@pytest.fixture(params=["torch", "cuda kernels"])
def either_runner(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Any:
    """Of a small Qwen3: the CPU's runner, and CUDA's without CUDA."""
    from hbserve_core_interpreted import make_runner

    if request.param == "cuda kernels":
        request.getfixturevalue("fewer_programs")
    return make_runner(model_folder("qwen3"), request.param)

"""For every test of the workspace: models, small random ones made here and the demo model; ports; the end of a load."""

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import Awaitable, Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Models here are too small for a second thread, which would only take the processor from other processes. Inherited.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer over bytes, so that any text, Chinese too, has tokens that decode to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {symbol: 3 + i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


def _write_small_model(folder: Path, architecture: str) -> None:
    import torch
    import transformers

    configurations: dict[str, Any] = {
        "qwen3": lambda: transformers.Qwen3Config(**SMALL, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
        "llama": lambda: transformers.LlamaConfig(**SMALL),
    }
    config = configurations[architecture]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Random models repeat one token; larger weights make the next token depend on the whole context.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    _write_tokenizer(folder)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random float32 model by architecture: qwen3, qwen2 or llama. Token 2 ends a sequence."""

    @cache
    def folder(architecture: str) -> Path:
        path = tmp_path_factory.mktemp(architecture)
        _write_small_model(path, architecture)
        assert json.loads((path / "config.json").read_text())["architectures"]
        return path

    return folder


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """So many ports that nobody listens at, and that the system gives to nobody who asks for any.

    Linux takes those from 32768 on, Mooncake its own from 15000 to 17000.
    """

    def find(count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            with socket.socket() as trying, contextlib.suppress(OSError):
                port = random.SystemRandom().randrange(18000, 32000)
                trying.bind(("127.0.0.1", port))
                found += [port] if port not in found else []
        return found

    return find


Stats = dict[str, Any]


def _leftovers(stats: Stats) -> dict[str, int]:
    """What is not zero although nothing runs, by gauge and instance."""
    scheduler = stats["cpu_scheduler"]
    found = {gauge: scheduler[gauge] for gauge in ("waiting_requests", "running_requests")}
    for instance_id, instance in stats["gpu_instances"].items():
        found[f"{instance_id}: blocks held"] = instance["num_blocks"] - instance["free_blocks"]
        for gauge in ("active_requests", "active_transfers", "buffered_bytes", "quarantined_blocks"):
            found[f"{instance_id}: {gauge}"] = instance[gauge]
    return {name: value for name, value in found.items() if value}


@pytest.fixture(scope="session")
def until_empty() -> Callable[[Any], Awaitable[Stats]]:
    """Wait until all instances of a DisaggregatedLLM answer and hold nothing; returns its stats then.

    A wait, because an instance says the last token of a request before it gives the blocks back.
    """

    async def wait(llm: Any) -> Stats:
        stats: Stats = await llm.refresh_system_stats()
        try:
            async with asyncio.timeout(60):
                while _leftovers(stats) or any(i["status"] != "ready" for i in stats["gpu_instances"].values()):
                    await asyncio.sleep(0.05)
                    stats = await llm.refresh_system_stats()
        except TimeoutError:
            pytest.fail(f"not empty: {_leftovers(stats)}")
        return stats

    return wait


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one, and say so."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))

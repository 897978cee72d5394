"""Small random models of every supported kind, and transformers as the oracle of what they say."""

from collections.abc import Callable, Sequence
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
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, "1GB"),
}


def _write_model(folder: Path, name: str) -> None:
    import torch
    import transformers

    class_name, changes, shard_size = MODELS[name]
    config = getattr(transformers, class_name)(**(SMALL | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            # Large weights make the next token depend on the whole context; norms and biases differ from their defaults.
            mean = 1.0 if "norm" in parameter_name else 0.0
            torch.nn.init.normal_(parameter, mean=mean, std=0.3)
    model.save_pretrained(folder, max_shard_size=shard_size)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a random float32 model by name (see MODELS). Token 2 ends a sequence; 512 tokens at most."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        _write_model(path, name)
        return path

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


def make_prompt(length: int, salt: int = 0) -> list[int]:
    """Token ids from 3 to 252: no end-of-sequence token, no short period, another row for each salt."""
    return [3 + (7 * i * i + 11 * i + 13 * salt * (i + 1)) % 250 for i in range(length)]


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    return make_prompt

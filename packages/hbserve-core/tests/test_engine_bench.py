"""The engine's benchmark: what it counts, and that it runs."""

import re

import pytest
import torch

from hbserve_core.engine_bench import (
    WORKLOADS,
    Sizes,
    bench_config,
    decode_bytes,
    num_layer_weights,
    prefill_flops,
    run_bench,
)
from hbserve_core.model_config import load_model_config
from hbserve_core.weights import load_weights


@pytest.fixture
def model(model_folder):
    return load_model_config(str(model_folder("qwen3-wide-heads")))


def test_the_weights_that_a_decode_step_reads_are_those_of_the_checkpoint(model):
    weights = load_weights(model, "dummy", torch.float32, torch.device("cpu"))
    projections = (getattr(layer, name) for layer in weights.layers for name in ("qkv", "output", "gate_up", "down"))
    loaded = sum(
        each.weight.to_dense().numel() if each.weight.is_mkldnn else each.weight.numel() for each in projections
    )
    assert num_layer_weights(model) == loaded


def test_each_decode_step_reads_weights_once_and_every_context(model):
    first, second = decode_bytes(model, torch.bfloat16, [([0] * 10, 3), ([0] * 5, 2)])
    per_token = 2 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    # The second request has its two tokens after the first step.
    assert first - second == (6 - 1) * per_token
    assert second - 12 * per_token == 2 * (num_layer_weights(model) + model.vocab_size * model.hidden_size)


def test_prefill_computes_two_operations_per_weight_and_token_and_half_of_the_square(model):
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * 30 * 30 / 2
    assert prefill_flops(model, [30]) == 60 * num_layer_weights(model) + attention


def test_all_workloads_run_and_say_what_they_reached(model_folder):
    sizes = Sizes().scaled(1 / 256)
    lines = []
    run_bench(bench_config(str(model_folder("qwen3")), sizes, device="cpu"), sizes, WORKLOADS, lines.append)
    assert re.fullmatch(r"limits of this device: [\d.e+]+ GB/s, [\d.e+]+ TFLOP/s", lines[1])
    assert [line.split()[0] for line in lines[2:]] == [name for name in WORKLOADS for _ in range(2)]
    assert all(re.search(r"= \d+% of", line) for line in lines[4:])

"""What steps must read and compute, beside what was counted by hand."""

from dataclasses import replace

import pytest
import torch

from hbserve_core.bench.device_limits import DeviceLimits
from hbserve_core.bench.model_work import (
    NO_WORK,
    DecodeLimit,
    decode_limit,
    num_layer_weights,
    prefill_flops,
    stored_bytes,
)
from hbserve_core.config import InstanceConfig
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.quantization import Packing
from hbserve_core.model.weights import load_weights

LIMITS = DeviceLimits(read_bytes_per_s=3.2e12, copy_bytes_per_s=3.0e12, flops_per_s=800e12)


@pytest.fixture
def model(model_folder):
    return load_model_config(str(model_folder("qwen3-wide-heads")))


@pytest.fixture
def qwen3_8b(model):
    return replace(
        model, vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32,
        num_kv_heads=8, head_dim=128, tied_embeddings=False, windows=(0,) * 36,
    )  # fmt: skip


def test_the_weights_that_a_decode_step_reads_are_those_of_the_checkpoint(model):
    weights = load_weights(model, "dummy", torch.float32, torch.device("cpu"))
    projections = (getattr(layer, name) for layer in weights.layers for name in ("qkv", "output", "gate_up", "down"))
    loaded = sum(
        each.weight.to_dense().numel() if each.weight.is_mkldnn else each.weight.numel() for each in projections
    )
    assert num_layer_weights(model) == loaded


def test_prefill_computes_two_operations_per_weight_and_token_and_half_of_the_square(model):
    """All but the last layer, which prompts need keys and values of."""
    attention = 4 * (model.num_layers - 1) * model.num_heads * model.head_dim * 30 * 30 / 2
    after_attention = model.hidden_size * (model.num_heads * model.head_dim + 3 * model.intermediate_size)
    assert prefill_flops(model, [30]) == 60 * (num_layer_weights(model) - after_attention) + attention


def test_one_sequence_of_qwen3_8b_takes_the_time_of_its_bytes(qwen3_8b):
    limit = decode_limit(qwen3_8b, torch.bfloat16, 1, 512, LIMITS)
    # 36 layers of 25,165,824 + 16,777,216 + 100,663,296 + 50,331,648 weights, 622,329,856 in the head, 2 bytes each;
    # 147,456 bytes of keys and values a token.
    assert limit.read_bytes == 2 * 7_568_097_280 + 512 * 147_456 == 15_211_692_032
    assert limit.limit_s == pytest.approx(4.753654e-3, rel=1e-6)
    assert limit.copy_s == pytest.approx(5.070564e-3, rel=1e-6)


def test_a_large_batch_of_qwen3_8b_takes_the_operations_of_its_products_and_the_bytes_of_its_contexts(qwen3_8b):
    limit = decode_limit(qwen3_8b, torch.bfloat16, 256, 512, LIMITS)
    # A product of 256 rows has 512 operations a weight, 0.64 ps, and 2 bytes a weight, 0.625 ps.
    products, contexts = 7_568_097_280 * 0.64e-12, 256 * 512 * 147_456 / 3.2e12
    assert limit.limit_s == pytest.approx(products + contexts) == pytest.approx(10.883380e-3, rel=1e-6)
    assert limit.flops == 512 * 7_568_097_280 + 36 * 4 * 32 * 128 * 256 * 512
    # What older tables call the limit is bytes alone.
    assert limit.copy_s == pytest.approx((15_136_194_560 + 19_327_352_832) / 3.0e12)


def test_attention_takes_its_operations_where_many_heads_share_their_keys(qwen3_8b):
    one, other = (
        decode_limit(replace(qwen3_8b, num_kv_heads=1), torch.bfloat16, 64, context, replace(LIMITS, flops_per_s=16e12))
        for context in (1000, 2000)
    )
    # For a key and its value, 32 heads need 4 * 32 * 128 operations, 1.02 ns, and 2 * 128 numbers, 0.16 ns.
    assert other.limit_s - one.limit_s == pytest.approx(36 * 64 * 1000 * 4 * 32 * 128 / 16e12)


def test_float32_is_twice_the_bytes_of_bfloat16_and_as_many_operations(qwen3_8b):
    wide, narrow = (decode_limit(qwen3_8b, dtype, 8, 100, LIMITS) for dtype in (torch.float32, torch.bfloat16))
    assert (wide.read_bytes, wide.flops) == (2 * narrow.read_bytes, narrow.flops)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("quantised", "of_a_weight"),
    [
        ({"scale_block": (128, 128)}, 1), ({"packing": Packing("awq", 64, 0)}, 0.5 + 2.5 / 64),
        ({"packing": Packing("gptq", -1, 1)}, 0.5 + 2.5 / 4096), ({}, 2),
    ],
    ids=str,
)  # fmt: skip
def test_narrow_weights_are_the_bytes_that_they_are_kept_in(qwen3_8b, quantised, of_a_weight, monkeypatch):
    """The head stays in 16 bits."""
    monkeypatch.setattr("hbserve_core.model.loaded_model.has_8_bit_floats", lambda device: True)
    model, config, dtype = replace(qwen3_8b, **quantised), InstanceConfig(model_path="anything"), torch.bfloat16
    assert stored_bytes(config, model, dtype, CUDA) == of_a_weight
    assert stored_bytes(config, model, dtype, torch.device("cpu")) == 2
    widened = InstanceConfig(model_path="anything", widen_weights=True)
    assert stored_bytes(widened, model, dtype, CUDA) == 2
    limit = decode_limit(model, dtype, 1, 512, LIMITS, weight_bytes=of_a_weight)
    assert limit.read_bytes == pytest.approx(6_945_767_424 * of_a_weight + 2 * 622_329_856 + 512 * 147_456)


def test_8_bit_floats_are_counted_wide_on_a_card_that_does_not_know_them(qwen3_8b, monkeypatch):
    monkeypatch.setattr("hbserve_core.model.loaded_model.has_8_bit_floats", lambda device: False)
    config, model = InstanceConfig(model_path="anything"), replace(qwen3_8b, scale_block=(128, 128))
    assert stored_bytes(config, model, torch.bfloat16, CUDA) == 2


def test_limits_of_several_steps_add_up_and_a_share_says_of_what():
    limit = DecodeLimit(0.003, 0.004, 1e9, 2e9) + DecodeLimit(0.005, 0.006, 3e9, 4e9) + NO_WORK
    assert limit == DecodeLimit(0.008, 0.01, 4e9, 6e9)
    assert limit.share_of(0.01) == "share 0.80 (1.00 of a copy's)"


def test_experts_are_read_as_far_as_a_batch_touches_them_and_windows_as_far_as_they_reach(model_folder):
    model = load_model_config(str(model_folder("mixtral")))  # 4 experts, 2 for each token, a window of 21
    expert, others = 3 * 64 * 96, 2 * (2 * 64 * 64 + 2 * 32 * 64) + 320 * 64
    one, many = (decode_limit(model, torch.float32, batch, 100, LIMITS) for batch in (1, 1000))
    keys = 2 * 2 * 2 * 16 * 21
    assert one.read_bytes == pytest.approx(4 * (2 * 2 * expert + others + keys))
    assert many.read_bytes == pytest.approx(4 * (2 * 4 * expert + others + 1000 * keys))
    assert num_layer_weights(model) == 2 * 2 * expert + others - 320 * 64

"""Keys and values in 8-bit floats: in the pool, the prefix cache and transfers, by the scales of the checkpoint."""

import shutil
from typing import Any

import pytest
import torch
from hbserve_core_interpreted import BLOCK, InterpretedRunner
from safetensors.torch import load_file, save_file

from hbserve_core import Engine, InstanceConfig, ModelRunner
from hbserve_core.engine.sequence import ScheduledChunk, Sequence
from hbserve_core.errors import InvalidInstanceConfig, WeightsMismatch
from hbserve_core.model.kv_pool import kv_dtype
from hbserve_core.model.model_config import load_model_config
from hbserve_rpc import SamplingParams

CHUNK = 16


def torch_runner(folder, **settings):
    given: dict[str, Any] = {"block_size": BLOCK, "num_blocks": 60, "chunk_size": CHUNK, "kv_cache_dtype": "fp8"}
    return ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", **(given | settings)))


def engine_of(runner):
    return Engine(runner.config, runner)


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def scaled(model_folder, tmp_path_factory):
    """Folder of qwen3 with scales of keys and values, other ones for each layer; some have the older name."""
    folder = tmp_path_factory.mktemp("scaled") / "model"
    shutil.copytree(model_folder("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    for layer, (key, value) in enumerate(((0.02, 0.05), (0.03, 0.11))):
        attention = f"model.layers.{layer}.self_attn"
        weights[f"{attention}.{'k_proj.' * layer}k_scale"] = torch.tensor(key)
        weights[f"{attention}.v_scale"] = torch.tensor([value])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def computed(runner, ids):
    """The pool's keys and values of a prompt, float32 (layers, 2, tokens, heads, head_dim), not yet scaled."""
    sequence = Sequence("r", list(ids), len(ids), greedy(1))
    sequence.block_table.extend(range(-(-len(ids) // BLOCK)))
    runner.run([ScheduledChunk(sequence, len(ids))])
    blocks = [runner.pool[block].float() for block in sequence.block_table]
    return torch.cat(blocks, dim=2)[:, :, : len(ids)]


@pytest.mark.parametrize("with_scales", [False, True])
def test_the_pool_holds_keys_and_values_rounded_by_their_scales(model_folder, scaled, prompt, with_scales):
    folder = scaled if with_scales else model_folder("qwen3")
    narrow, wide = torch_runner(folder), torch_runner(folder, kv_cache_dtype="auto")
    assert narrow.pool.nbytes * 4 == wide.pool.nbytes
    scales = torch.tensor([[0.02, 0.05], [0.03, 0.11]] if with_scales else [[1.0, 1.0]] * 2)
    given, found = computed(wide, prompt(20)), computed(narrow, prompt(20)) * scales[:, :, None, None, None]
    # The first layer's are computed from the same numbers: they differ by no more than a rounding to 4 bits.
    assert ((found[0] - given[0]).abs() <= given[0].abs() / 16 + scales[0, :, None, None, None] * 2**-10).all()
    assert 0.01 < (found[0] - given[0]).norm() / given[0].norm() < 0.04
    assert (found[1] - given[1]).norm() / given[1].norm() < 0.08, "what was computed from those"


@pytest.mark.parametrize("name", ["qwen3", "mistral-window", "gemma2"])
def test_tokens_do_not_depend_on_chunks_neighbours_caches_and_preemptions(model_folder, prompt, name):
    """A token sees what the pool holds of its own chunk too."""
    prompts = {str(length): prompt(length, salt=length) for length in (1, 20, 50)}
    expected: dict[str, list[int]] = {}
    for key, ids in prompts.items():
        alone = engine_of(torch_runner(model_folder(name), chunk_size=64))
        alone.add(key, ids, greedy(8))
        expected |= run(alone)
    together = engine_of(torch_runner(model_folder(name), chunk_size=7, num_blocks=12))
    for _ in range(2):  # the second time prefixes are cached
        for key, ids in prompts.items():
            together.add(key, ids, greedy(8))
        assert run(together) == expected
    assert together.stats().num_cached_tokens > 0
    together.check_integrity()
    assert together.blocks.num_free == together.blocks.num_blocks


def run(engine):
    tokens: dict[str, list[int]] = {}
    while engine.has_work():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


def test_kernels_give_the_tokens_of_plain_torch(language_is_interpreted, fewer_programs, scaled, prompt):
    pytest.importorskip("triton", reason="torch has Triton on Linux only")
    sizes = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "kv_cache_dtype": "fp8"}
    runners = InterpretedRunner(scaled, True, False, chunk_size=13, **sizes), torch_runner(scaled)
    found = []
    for runner in runners:
        engine = engine_of(runner)
        engine.add("r", prompt(21), greedy(4))
        found.append(run(engine))
    assert found[0] == found[1]


def test_keys_beyond_the_largest_become_the_largest_and_none_stay_none():
    from hbserve_core.torch_runner.attention import narrowed

    found = narrowed(torch.tensor([1e6, -1e6, 448.0, float("nan"), 0.3]), 1.0).float()
    assert found[[0, 1, 2]].tolist() == [448.0, -448.0, 448.0]
    assert found[3].isnan()
    assert narrowed(torch.tensor([1e6]), 1e4).float().tolist() == [96.0]


def test_instances_with_other_scales_or_another_dtype_are_told_apart(model_folder, scaled):
    wide, one, other = (
        torch_runner(model_folder("qwen3"), kv_cache_dtype="auto").fingerprint,
        torch_runner(model_folder("qwen3")).fingerprint,
        torch_runner(scaled).fingerprint,
    )
    assert {name for name in {*wide, *one} if wide.get(name) != one.get(name)} == {"dtype", "kv_scales"}
    assert {name for name in one if one[name] != other[name]} == {"kv_scales"}


@pytest.mark.parametrize("scale", [torch.ones(4), torch.tensor(0.0), torch.tensor(float("nan")), torch.tensor(2)])
def test_what_is_no_scale_is_refused_by_name(model_folder, tmp_path, scale):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_scale"] = scale
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"layers\.1\.self_attn\.v_scale of shape .* is not one number above 0"):
        torch_runner(folder)


def test_a_card_without_8_bit_floats_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    config = InstanceConfig(model_path="", kv_cache_dtype="fp8")
    with pytest.raises(InvalidInstanceConfig, match=r"A100 has compute capability 8\.0, .* need 8\.9"):
        kv_dtype(config, torch.bfloat16, torch.device("cuda", 0))


def test_a_checkpoint_that_quantises_nothing_but_keys_and_values_is_served(model_folder, tmp_path):
    import json

    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    (folder / "config.json").write_text(json.dumps(raw))
    assert load_model_config(folder).scale_block is None

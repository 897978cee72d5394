"""Checkpoints of AWQ and GPTQ beside the weights that they stand for, which are written next to them as floats."""

import re
import shutil

import pytest
import torch
from hbserve_core_quantised import change, write
from safetensors.torch import load_file, save_file

from hbserve_core import Engine, InstanceConfig, ModelRunner, UnsupportedModel, WeightsMismatch
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.shard import Shard
from hbserve_core.model.weights import load_weights
from hbserve_rpc import SamplingParams

KINDS = ["awq", "gptq", "gptq act-order", "gptq_v2", "gptq one group"]


@pytest.fixture(scope="module")
def folders(model_folder, tmp_path_factory):
    """(4-bit folder, folder of the same weights in float32), by name of a model and kind of checkpoint."""
    made = {}

    def make(name, kind):
        if (name, kind) not in made:
            made[name, kind] = write(model_folder(name), tmp_path_factory.mktemp("packed"), kind)
        return made[name, kind]

    return make


@pytest.mark.parametrize(
    ("name", "kind"), [*(("llama", kind) for kind in KINDS), ("phi3", "awq"), ("qwen3-moe", "gptq")]
)
def test_greedy_tokens_are_those_of_transformers_with_the_same_weights_in_floats(folders, prompt, name, kind, caplog):
    import transformers

    narrow, wide = folders(name, kind)
    runner = ModelRunner(InstanceConfig(model_path=str(narrow), device="cpu", dtype="float32", num_blocks=20))
    assert "weights are of 4 bits; they are kept and multiplied in 16 bits or more" in caplog.text
    engine = Engine(runner.config, runner)
    engine.add("r", prompt(21), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    tokens = []
    while engine.has_work():
        for output in engine.step():
            tokens += output.token_ids
    given = torch.tensor([prompt(21)])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    out = oracle.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=6, min_new_tokens=6,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert tokens == out[0, 21:].tolist()


@pytest.mark.parametrize("kind", ["awq", "gptq act-order"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_part_of_the_same_weights(folders, kind, rank):
    narrow, wide = (
        load_weights(load_model_config(folder), "safetensors", torch.float16, torch.device("cpu"), Shard(rank, 2))
        for folder in folders("llama", kind)
    )
    for one, other in zip(narrow.layers, wide.layers, strict=True):
        for name in ("qkv", "output", "gate_up", "down"):
            assert torch.equal(plain(getattr(one, name)), plain(getattr(other, name)))


def plain(linear):
    return linear.weight.to_dense() if linear.weight.is_mkldnn else linear.weight


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_a_format_counts_by_its_newer_key_too_unless_the_older_one_says_otherwise(folders, tmp_path, kind):
    """As transformers has it; the numbers of one are those of the other with other zeros."""
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", kind)[0], folder)
    packing = load_model_config(folder).packing
    change(folder, checkpoint_format=None, format=kind.upper())
    assert load_model_config(folder).packing == packing
    change(folder, checkpoint_format=kind, format="marlin")
    assert load_model_config(folder).packing == packing


def test_a_group_that_is_not_there_is_refused_by_name(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", "gptq")[0], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.g_idx"][5] = 4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"layers\.0\.mlp\.up_proj: g_idx has groups 0 to 4, there are 4"):
        ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", num_blocks=20))


def test_other_numbers_are_other_weights(folders):
    one, other = (
        load_weights(load_model_config(folders("llama", kind)[0]), "safetensors", torch.float32, torch.device("cpu"))
        for kind in ("awq", "gptq")
    )
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gptq", {"bits": 8}, r"\(gptq\) has bits=8; supported: 4"),
        ("awq", {"version": "gemv"}, r"\(awq\) has version='gemv'; supported: 'gemm'"),
        ("awq", {"zero_point": False}, r"\(awq\) has zero_point=False; supported: True"),
        ("gptq", {"checkpoint_format": "marlin"}, r"has checkpoint_format='marlin'; supported: 'gptq' or 'gptq_v2'"),
        ("gptq", {"group_size": 0}, r"has group_size=0, expected a size or -1"),
        ("gptq", {"checkpoint_format": None, "format": "marlin"}, r"has format='marlin'; supported: 'gptq' or 'gptq_"),
        ("awq", {"version": None, "format": "gemv_fast"}, r"has format='gemv_fast'; supported: 'gemm'"),
        ("awq", {"backend": "llm-awq"}, r"\(awq\) has backend='llm-awq', which packs otherwise"),
    ],
)
def test_another_variant_is_refused_by_name_in_one_line(folders, tmp_path, kind, changes, message):
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", kind)[0], folder)
    change(folder, **changes)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        load_model_config(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("scales", None, "scales is missing"),
        ("qzeros", torch.zeros(2, 7, dtype=torch.int32), r"qzeros has shape \(2, 7\), expected \(4, 8\)"),
        ("qweight", torch.zeros(64, 8, dtype=torch.float32), "qweight has dtype F32, expected I32"),
    ],
)
def test_a_packed_weight_that_is_not_whole_is_named(folders, tmp_path, part, tensor, message):
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", "awq")[0], folder)
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.1.self_attn.q_proj.{part}"]
    if tensor is not None:
        weights[f"model.layers.1.self_attn.q_proj.{part}"] = tensor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=rf"model\.layers\.1\.self_attn\.q_proj: {message}"):
        ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", num_blocks=20))


def test_biases_of_zeros_that_older_exporters_add_mean_nothing_and_others_are_named(folders, tmp_path):
    source, folder = folders("llama", "gptq")[0], tmp_path / "model"
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.bias"
    for bias in (torch.zeros(64, dtype=torch.float16), torch.ones(64, dtype=torch.float16)):
        save_file(weights | {name: bias}, folder / "model.safetensors", {"format": "pt"})
        if bias.any():
            with pytest.raises(WeightsMismatch, match=re.escape(f"unexpected: {name}")):
                ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", num_blocks=20))
        else:
            device = torch.device("cpu")
            with_bias, without = (
                load_weights(load_model_config(each), "safetensors", torch.float32, device) for each in (folder, source)
            )
            assert with_bias.digest == without.digest
            assert with_bias.layers[1].qkv.bias is None


def test_an_order_of_inputs_that_is_missing_is_named(folders, tmp_path):
    """Without it the weights would be other ones."""
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", "gptq act-order")[0], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.g_idx"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsMismatch, match=r"model\.layers\.1\.self_attn\.q_proj: g_idx is missing"):
        ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", num_blocks=20))


@pytest.mark.parametrize("layer", ["model.layers.2.self_attn.q_proj", "model.layers.1.self_attn.other"])
def test_packed_weights_that_the_model_has_no_place_for_are_named(folders, tmp_path, layer):
    """As plain ones are: config.json is of another model."""
    folder = tmp_path / "model"
    shutil.copytree(folders("llama", "awq")[0], folder)
    weights = load_file(folder / "model.safetensors")
    extra = {f"{layer}.{part}": weights[f"model.layers.1.self_attn.q_proj.{part}"] for part in ("qweight", "scales")}
    whole = extra | {f"{layer}.qzeros": weights["model.layers.1.self_attn.q_proj.qzeros"]}
    for added, named in (
        (whole, f"unexpected: {layer}.weight"),
        ({f"{layer}.scales": extra[f"{layer}.scales"]}, layer),
    ):
        save_file(weights | {k: v.clone() for k, v in added.items()}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(WeightsMismatch, match=re.escape(named)):
            ModelRunner(InstanceConfig(model_path=str(folder), device="cpu", num_blocks=20))

"""Reading model folders: what is understood, and what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbserve_core.errors import ModelFilesMissing, UnsupportedModel
from hbserve_core.model import config_values
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.rope import inverse_frequencies
from hbserve_core.model.rope_config import read_rope_config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def write(tmp_path):
    def write_config(generation=None, **changes) -> Path:
        content = {key: value for key, value in (BASE | changes).items() if value is not ...}
        (tmp_path / "config.json").write_text(json.dumps(content))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write_config


def test_a_missing_folder_is_named():
    with pytest.raises(ModelFilesMissing, match=r"'/nowhere/model' does not exist"):
        load_model_config("/nowhere/model")


def test_a_folder_without_config_says_what_it_has_instead(tmp_path):
    (tmp_path / "weights.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json \(it has: weights\.gguf\)"):
        load_model_config(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones(write):
    folder = write(architectures=["MambaForCausalLM"])
    with pytest.raises(
        UnsupportedModel, match=r"MambaForCausalLM is not supported; supported: Qwen3.*, Qwen2.*, LlamaForCausalLM"
    ):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        (["vision_config"], "vision"),
        (["vision_config", "audio_config"], "vision and audio"),
        (["audio_config"], "audio"),
    ],
)
def test_a_model_of_more_than_text_is_refused_by_what_it_has_beside_it(write, parts, named):
    folder = write(
        architectures=["Gemma3ForConditionalGeneration"], text_config={}, **{part: {"a": 1} for part in parts}
    )
    with pytest.raises(UnsupportedModel, match=f"it needs parts for {named}, or its language model saved by itself; s"):
        load_model_config(folder)


def test_a_config_without_architectures_is_refused_by_its_model_type(write):
    with pytest.raises(UnsupportedModel, match=r"none named .model_type='gpt2'"):
        load_model_config(write(architectures=..., model_type="gpt2"))


def test_a_config_without_architectures_is_known_by_its_model_type(write):
    assert load_model_config(write(architectures=..., model_type="granite")).architecture == "GraniteForCausalLM"


@pytest.mark.parametrize("name", ["MistralForCausalLM", "SmolLM3ForCausalLM", "Starcoder2ForCausalLM"])
def test_what_a_config_leaves_out_is_as_in_transformers(write, name):
    import transformers

    theirs = getattr(transformers, name.replace("ForCausalLM", "Config"))(hidden_size=64, num_attention_heads=16)
    left_out = {"architectures": [name], "num_attention_heads": 16, "sliding_window": None}
    ours = load_model_config(write(**left_out))
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


OPT = {"architectures": ["OPTForCausalLM"], "intermediate_size": ..., "ffn_dim": 96}


def test_a_config_may_have_its_familys_own_names(write):
    found = load_model_config(write(**OPT, activation_function="relu"))
    assert (found.intermediate_size, found.tied_embeddings, found.rms_norm_eps) == (96, True, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**OPT, "do_layer_norm_before": False},
            "do_layer_norm_before=false of OPT.* it needs norms behind .*OPT-350M",
        ),
        (
            {**OPT, "enable_bias": False},
            "enable_bias=false of OPTForCausalLM is not supported; it needs layers without",
        ),
        ({**OPT, "activation_function": "gelu"}, "activation_function='gelu' is not supported; supported: 'relu'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
        (
            {"architectures": ["StableLmForCausalLM"], "use_parallel_residual": True},
            "use_parallel_residual=true of Stable.* it needs attention and MLP of the same input",
        ),
    ],
)
def test_relatives_that_are_built_otherwise_are_refused_by_what_they_need(write, changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        load_model_config(write(**changes))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "5", "null"])
def test_a_file_that_has_no_object_is_named(write, name, content):
    folder = write()
    (folder / name).write_text(content)
    with pytest.raises(UnsupportedModel, match=rf"{name}: expected a JSON object"):
        load_model_config(folder)


@pytest.mark.parametrize(
    "content",
    ["{", "\xff", "[" * 100_000, '{"dtype": "\\ud800"}'],
    ids=["cut off", "another encoding", "too deep", "half a character"],
)
def test_a_config_that_is_not_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UnsupportedModel, match=r"config\.json is not JSON"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_file_that_cannot_be_read_is_named(write, name):
    folder = write()
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(ModelFilesMissing, match=f"{name} cannot be read: Is a directory"):
        load_model_config(folder)


@pytest.mark.parametrize("size", ["64", 64.0, -64, 0, True])
def test_a_size_that_is_none_is_named_with_its_value(write, size):
    with pytest.raises(UnsupportedModel, match=rf"config\.json: hidden_size={size!r}: expected `int`"):
        load_model_config(write(hidden_size=size))


ODD = ["x", -1, 0, 1.5, float("nan"), None, {"a": 1}, ["a"], 10**20]


@pytest.mark.parametrize("name", ["Gemma3", "Granite", "Mistral", "OPT", "Qwen3Moe", "SmolLM3"])
def test_a_value_of_any_kind_is_read_or_refused_by_its_key_and_never_takes_memory(write, name):
    mixture = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    sizes = {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": 2, "sliding_window": 21, "ffn_dim": 96}
    load_model_config(write(**sizes, **mixture))
    for key in sorted(each.name for each in msgspec.structs.fields(config_values._Values)):
        for value in ODD:
            refused = ""
            try:
                model = load_model_config(write(**sizes | mixture | {key: value}))
            except UnsupportedModel as error:
                refused = str(error)
            if refused:
                assert key in refused or key in ("architectures", "rope_parameters"), (key, value, refused)
            else:
                assert min(model.head_dim, model.num_kv_heads, model.intermediate_size, model.max_model_len) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 128}, "more than hidden_size=64"),
        (
            {
                "architectures": ["MixtralForCausalLM"],
                "num_key_value_heads": 2,
                "num_local_experts": 2,
                "num_experts_per_tok": 3,
            },
            "there are 2 experts",
        ),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "1 entries: expected one for each of 2"),
        ({"num_hidden_layers": 3_000_000}, "num_hidden_layers=3000000: expected `int` <= 10000"),
        ({"quantization_config": {"config_groups": {"g": {"weights": {"num_bits": "8"}}}}}, "num_bits"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "ab"}}, "weight_block_size='ab'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "expected two sizes"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, "expected two sizes"),
        (
            {"quantization_config": {"quant_method": "gptq", "group_size": -2}},
            "has group_size=-2, expected a size or -1",
        ),
        ({"quantization_config": {"quant_method": "gptq", "group_size": "16"}}, "group_size='16', expected a size"),
        ({"quantization_config": {"quant_method": "gptq", "group_size": True}}, "group_size=True, expected a size"),
    ],
)
def test_parts_that_do_not_fit_are_refused(write, changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        load_model_config(write(**changes))


@pytest.mark.parametrize("missing", [..., None])
def test_a_missing_size_is_named(write, missing):
    with pytest.raises(UnsupportedModel, match="'intermediate_size' is missing"):
        load_model_config(write(intermediate_size=missing))


def test_a_null_of_a_key_that_is_not_read_is_no_obstacle(write):
    nothing = dict.fromkeys(("num_experts", "moe_intermediate_size", "logits_scaling", "max_window_layers", "odd"))
    assert load_model_config(write(**nothing)) == load_model_config(write())


@pytest.mark.parametrize("rope_type", ["mrope", "proportional"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_rope_types_are_refused_by_name(write, rope_type, key):
    with pytest.raises(UnsupportedModel, match=f"rope_type='{rope_type}' is not supported; supported: default"):
        load_model_config(write(**{key: {"rope_type": rope_type, "factor": 4.0}}))


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "yarn", "factor": "four"}, r"rope_scaling\.factor='four': expected `float"),
        ({"type": "linear", "factor": 1e300}, r"factor=1e\+300"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}, r"low_freq_factor=4\.0"),
        ({"type": "longrope", "long_factor": [1], "short_factor": [1], "original_max_position_embeddings": 1}, "zero"),
        (
            {"type": "longrope", "long_factor": [1, 2], "short_factor": [1], "factor": 2},
            "2 long and 1 short factors: expected equally many",
        ),
        ({"type": "longrope", "long_factor": [1, 2], "short_factor": [1, -1], "factor": 2}, "above 0"),
        ({"type": "yarn", "factor": 0}, r"factor=0\.0"),
        ({"type": "linear", "factor": float("nan")}, "factor=nan"),
        ({"type": "yarn", "factor": 2, "rope_theta": 0.5}, r"rope_theta=0\.5"),
        ({"type": "linear"}, "'factor' is missing"),
        ({"full_attention": {"rope_type": "default"}}, "for all layers"),
    ],
)
def test_a_scaling_that_cannot_be_is_refused_with_its_values(write, scaling, message):
    with pytest.raises(UnsupportedModel, match=message):
        load_model_config(write(rope_scaling=scaling))


def test_longrope_is_the_short_one_up_to_its_original_length_and_no_further():
    scaling = {"type": "longrope", "factor": 2, "original_max_position_embeddings": 64}
    rope = read_rope_config(
        Path("m"), {"rope_scaling": {**scaling, "long_factor": [3.0], "short_factor": [1.5]}, "rope_theta": 1e4}
    )
    assert [rope.within(length).factors for length in (63, 64, 65)] == [(1.5,), (1.5,), (3.0,)]


SCALINGS = (
    st.fixed_dictionaries(
        {"rope_type": st.just("yarn"), "factor": st.sampled_from([None, 0.5, 1.0, 2, 4.0, 32])},
        optional={
            "original_max_position_embeddings": st.sampled_from([128, 512, 32768]),
            "rope_theta": st.sampled_from([1e4, 1e6]),
            "beta_fast": st.sampled_from([None, 4, 16]),
            "beta_slow": st.sampled_from([0.5, 2]),
            "attention_factor": st.just(1.25),
            "mscale": st.just(0.7),
            "mscale_all_dim": st.just(1.0),
            "truncate": st.booleans(),
        },
    )
    | st.fixed_dictionaries(
        {"rope_type": st.just("longrope"), "long_factor": st.just([1.0, 2.0, 3.5, 8.0] * 8)}
        | {"short_factor": st.just([1.0] * 32), "original_max_position_embeddings": st.sampled_from([128, 512])},
        optional={"attention_factor": st.just(1.25), "factor": st.sampled_from([None, 4.0])},
    )
    | st.fixed_dictionaries(
        {"type": st.just("llama3"), "factor": st.sampled_from([2, 8.0])}
        | {"low_freq_factor": st.just(1.0), "high_freq_factor": st.just(4.0)},
        optional={"original_max_position_embeddings": st.sampled_from([128, 8192])},
    )
)


@settings(deadline=None)
@given(scaling=SCALINGS, key=st.sampled_from(["rope_scaling", "rope_parameters"]), head_dim=st.sampled_from([16, 64]))
def test_frequencies_and_magnitude_are_those_of_transformers(tmp_path_factory, scaling, key, head_dim):
    # Known elsewhere: vLLM #10293.
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = tmp_path_factory.mktemp("rope")
    for name in {"long_factor", "short_factor"} & scaling.keys():
        scaling = scaling | {name: scaling[name][: head_dim // 2]}
    content = BASE | {"model_type": "llama", "head_dim": head_dim, "rope_theta": 5e5, key: scaling}
    (folder / "config.json").write_text(json.dumps(content))
    theirs = AutoConfig.from_pretrained(folder)
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs)
    ours = load_model_config(folder).rope.within(1)  # theirs, made without a length, is that of short sequences
    torch.testing.assert_close(inverse_frequencies(ours, head_dim), frequencies, rtol=1e-6, atol=0)
    assert ours.magnitude == pytest.approx(magnitude)


QWEN_CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("given_length", "scaling", "expected"),
    [
        (40960, QWEN_CARD, 131072),  # Qwen3: the file's own length is neither of the two
        (32768, QWEN_CARD, 131072),  # Qwen2.5: it is of before the scaling
        (131072, QWEN_CARD, 131072),  # and here of after it
        (32768, {"type": "yarn", "factor": 4.0}, 131072),
        (131072, {"type": "yarn", "original_max_position_embeddings": 32768, "factor": None}, 131072),
        (4096, {"type": "linear", "factor": 4.0}, 16384),
        (4096, {"type": "dynamic", "factor": 4.0}, 4096),
        (131072, {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}, 131072),
    ],
)
def test_the_longest_sequence_is_what_the_scaling_extends_the_model_to(write, given_length, scaling, expected):
    # Known elsewhere: vLLM #2565.
    folder = write(max_position_embeddings=given_length, rope_scaling=scaling)
    assert load_model_config(folder).max_model_len == expected


def test_a_scaling_from_a_model_card_beside_the_files_own_rope_parameters_counts_and_keeps_the_base(write):
    card, own = QWEN_CARD, {"rope_type": "default", "rope_theta": 1e6}
    both = load_model_config(write(rope_parameters=own, rope_scaling=card)).rope
    assert both == load_model_config(write(rope_theta=1e6, rope_scaling=card)).rope


def test_old_and_new_rope_keys_mean_the_same(write):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    old = load_model_config(write(rope_theta=5e5, rope_scaling=scaling | {"type": "llama3"})).rope
    new = load_model_config(write(rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5})).rope
    assert old == new
    assert old.theta == 5e5


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}])
def test_frequencies_fall_with_the_dimension_and_the_factor(write, rope):
    config = load_model_config(write(rope_parameters=rope | {"rope_theta": 100.0})).rope
    expected = torch.tensor([100.0 ** (-i / 4) for i in range(4)]) / rope.get("factor", 1.0)
    torch.testing.assert_close(inverse_frequencies(config, 8), expected)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        (
            {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 128}
            | {"layer_types": ["full_attention", "sliding_attention"]},
            (0, 128),
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1}
            | {"sliding_window": 128},
            (0, 128),
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 100, "num_key_value_heads": 2}, (100, 100)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None, "num_key_value_heads": 2}, (0, 0)),
        ({"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, (0, 0)),  # Llama has none
        ({"architectures": ["Gemma2ForCausalLM"], "sliding_window": 64}, (64, 0)),
    ],
)
def test_each_layer_has_its_window(write, changes, windows):
    assert load_model_config(write(**changes)).windows == windows


def test_layers_of_another_kind_are_refused_by_name(write):
    kinds = ["full_attention", "chunked_attention"]
    with pytest.raises(UnsupportedModel, match="2 layer_types with chunked_attention: expected 2 of full_attention"):
        load_model_config(write(sliding_window=128, layer_types=kinds))


def test_a_sliding_window_that_no_layer_uses_is_harmless(write):
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    assert load_model_config(write(use_sliding_window=False, **qwen)).windows == (0, 0)
    assert load_model_config(write(use_sliding_window=True, max_window_layers=2, **qwen)).windows == (0, 0)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
        },
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "int"}}}},
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float"}}}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"weights": {"num_bits": 8, "type": "float"}},
                "b": {"weights": {"num_bits": 4, "type": "int"}},
            },
        },
        {"quant_method": "compressed-tensors"},
    ],
)
def test_weights_that_need_other_products_are_refused(write, quantization):
    method = quantization["quant_method"]
    with pytest.raises(
        UnsupportedModel, match=rf"quantization_config .{method}. is not supported; supported: awq, gptq, fp8, and"
    ):
        load_model_config(write(quantization_config=quantization))


def test_blocks_that_share_a_scale_are_those_of_the_group_that_names_some(write):
    groups: dict[str, dict[str, Any]] = {
        "a": {"weights": {"num_bits": 8, "type": "float"}},
        "b": {"weights": {"num_bits": 8, "type": "float", "block_structure": [1, 32]}},
        "c": {"weights": None},
    }
    described = {"quant_method": "compressed-tensors", "config_groups": groups}
    assert load_model_config(write(quantization_config=described)).scale_block == (1, 32)


@pytest.mark.parametrize(("group_size", "is_ordered"), [(None, False), (1, False), (-1, True)])
def test_inputs_that_all_share_a_scale_are_in_order_whatever_else_is_said(write, group_size, is_ordered):
    described = {"quant_method": "gptq", "bits": 4, "desc_act": True}
    if group_size is not None:
        described["group_size"] = group_size
    packing = load_model_config(write(quantization_config=described)).packing
    assert packing is not None
    assert (packing.group_size, packing.is_ordered, packing.zero_offset) == (group_size or 128, is_ordered, 1)


def test_end_of_sequence_ids_come_from_both_files(write):
    assert load_model_config(write(eos_token_id=2)).eos_token_ids == (2,)
    assert load_model_config(write(generation={"eos_token_id": [7, 2]}, eos_token_id=2)).eos_token_ids == (7, 2)
    assert load_model_config(write(generation={"eos_token_id": 7}, eos_token_id=[3, 4])).eos_token_ids == (7, 3, 4)
    assert load_model_config(write(generation={}, eos_token_id=None)).eos_token_ids == ()


def test_an_end_token_that_the_model_cannot_say_is_left_out(write):
    assert load_model_config(write(eos_token_id=[-1, 320, 319, 10**30])).eos_token_ids == (319,)


def test_biases_follow_the_architecture_and_its_config(write):
    def of(**changes):
        found = load_model_config(write(**changes)).switches
        return found.qkv_bias, found.output_bias, found.mlp_bias, found.qk_norm

    assert of(attention_bias=True) == (True, True, False, "")
    assert of(architectures=["Qwen2ForCausalLM"]) == (True, False, False, "")
    assert of(architectures=["Qwen3ForCausalLM"]) == (False, False, False, "head")


def test_head_dim_defaults_as_the_architecture_does(write):
    assert load_model_config(write()).head_dim == 16
    assert load_model_config(write(head_dim=32)).head_dim == 32
    assert load_model_config(write(architectures=["Qwen3ForCausalLM"])).head_dim == 128


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_checkpoint_dtype_is_read_from_either_key(write, key):
    assert load_model_config(write(**{key: "bfloat16"})).dtype == torch.bfloat16
    for spelling, dtype in {"torch.float16": torch.float16, "bf16": torch.bfloat16, "half": torch.float16}.items():
        assert load_model_config(write(**{key: spelling})).dtype == dtype
    with pytest.raises(UnsupportedModel, match="dtype='int8' is not supported"):
        load_model_config(write(**{key: "int8"}))


def test_olmo_3_as_it_is_published_has_the_rotations_that_transformers_writes_for_it(model_folder, tmp_path):
    """Published are one rope_theta and one rope_scaling; windowed layers do not have the latter."""
    written = json.loads((model_folder("olmo3") / "config.json").read_text())
    both = written.pop("rope_parameters")
    published = dict(both["full_attention"])
    theta = published.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(written | {"rope_theta": theta, "rope_scaling": published}))
    assert both["sliding_attention"] == {"rope_theta": theta, "rope_type": "default"}
    found, expected = (load_model_config(folder) for folder in (tmp_path, model_folder("olmo3")))
    assert replace(found, path=expected.path) == expected

"""Configs that contradict themselves, or that their family understands otherwise than others: served as transformers
does, or refused by what they have."""

import pytest

from hbserve_core.errors import UnsupportedModel

WINDOWED = {"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]}
EIGHT_BITS = {"config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}
ROTATED = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"v": {}}}, **EIGHT_BITS}
LONGROPE = {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "factor": 2.0}
LONGROPE_IN_WINDOWS = {"full_attention": {"rope_type": "default"}, "sliding_attention": LONGROPE}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Starcoder2"])
def test_layer_types_that_transformers_does_not_read_are_refused(load_small, name):
    """Of such a family it has a window in all layers, or in none."""
    with pytest.raises(UnsupportedModel, match=f"layer_types of its own beside sliding_window=128 .* of {name}"):
        load_small(name, **WINDOWED)
    assert load_small(name, **WINDOWED | {"sliding_window": None}).windows == (0, 0)
    assert load_small(name, **WINDOWED | {"sliding_window": 512}).windows == (0, 0)


@pytest.mark.parametrize("name", ["Mistral", "Phi3", "Mixtral"])
def test_a_window_stays_although_another_familys_key_says_that_it_is_off(load_small, name):
    assert load_small(name, sliding_window=128, use_sliding_window=False).windows == (128, 128)
    assert load_small(name, sliding_window=512, use_sliding_window=False).windows == (0, 0)


def test_a_window_that_is_off_beside_layers_that_have_one_is_refused(load_small):
    """transformers looks at the layers and the window alone."""
    with pytest.raises(UnsupportedModel, match=r"use_sliding_window=false beside .*=128 .*=null means no"):
        load_small("SmolLM3", **WINDOWED, use_sliding_window=False)


def test_a_mixture_of_qwen3_has_its_window_in_all_layers(load_small):
    """transformers does not read max_window_layers there."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    found = load_small("Qwen3Moe", **experts, use_sliding_window=True, sliding_window=128, max_window_layers=1)
    assert found.windows == (128, 128)
    assert load_small("Qwen3Moe", **experts, use_sliding_window=False, sliding_window=128).windows == (0, 0)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_older_names_of_longrope_mean_it(load_small, name):
    scaling = {"long_factor": [1.5] * 8, "short_factor": [1.1] * 8}
    expected = load_small("Phi3", rope_scaling={**scaling, "type": "longrope"}).rope
    assert load_small("Phi3", rope_scaling={**scaling, "type": name}).rope == expected


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral", "Olmoe"])
def test_either_name_for_the_number_of_experts_counts(load_small, name):
    """transformers takes them for each other; files that it has written have only one of them."""
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    for key in ("num_experts", "num_local_experts"):
        assert load_small(name, **experts, **{key: 5}).switches.experts.count == 5


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Llama", {"head_dim": 7}, "head_dim=7, of which partial_rotary_factor=1.0 rotates 7: expected an even"),
        ("Llama", {"head_dim": 1}, "head_dim=1, of which .* rotates 1"),
        ("Phi3", {"head_dim": 6, "partial_rotary_factor": 0.5}, "head_dim=6, of which .*=0.5 rotates 3: expected an"),
        ("StableLm", {"head_dim": 4, "partial_rotary_factor": 0.1}, "head_dim=4, of which .* rotates 0"),
        (
            "Gemma3",
            {"head_dim": 16, "rope_parameters": LONGROPE_IN_WINDOWS},
            "4 long and short factors of longrope: expected 8, one for each pair",
        ),
        ("Phi3", {"rope_scaling": LONGROPE}, "4 long and short factors of longrope: expected 8, one for each pair"),
        ("Qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 of Qwen2For.* it rotates whole heads"),
        ("Llama", {"quantization_config": ROTATED}, r"\(compressed-tensors\) has transform_config; it needs rotations"),
        ("Gemma3", {"head_dim": 16, "attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0 of Gemma3ForCausalLM"),
        *(
            ("Granite", {f"{kind}_multiplier": value}, f"{kind}_multiplier={value}: expected `float` > 0")
            for kind in ("residual", "attention", "embedding")
            for value in (0, -0.5)
        ),
    ],
)
def test_what_cannot_be_computed_as_transformers_does_is_refused(load_small, name, changes, problem):
    with pytest.raises(UnsupportedModel, match=problem) as caught:
        load_small(name, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "own", "foreign"),
    [("StableLm", "layer_norm_eps", "rms_norm_eps"), ("Starcoder2", "norm_epsilon", "rms_norm_eps")],
)
def test_another_familys_name_for_the_same_means_nothing(load_small, name, own, foreign):
    assert load_small(name, **{own: 1e-3, foreign: 1e-6}).rms_norm_eps == 1e-3
    assert load_small(name, **{foreign: 1e-6, own: 1e-3}).rms_norm_eps == 1e-3
    assert load_small(name, **{foreign: 1e-6}).rms_norm_eps == 1e-5


def test_what_exporters_write_where_there_is_no_rotation_is_none(load_small):
    plain = {**ROTATED, "transform_config": {}}
    assert load_small("Llama", quantization_config=plain).scale_block == (128, 128)

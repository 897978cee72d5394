"""Values of a config.json that only some architectures read, or read otherwise: as transformers has it, or refused."""

from typing import Any

import pytest

from hbserve_core.errors import UnsupportedModel

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
BY_KIND = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
}


@pytest.fixture
def load(load_small):
    """With what all of the families here need."""
    sizes = {"num_hidden_layers": 4, "num_key_value_heads": 4, "ffn_dim": 96, "sliding_window": 21}
    return lambda name, **changes: load_small(name, **sizes | changes)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("Mistral", "rope_local_base_freq", 50.0),
        ("Gemma2", "rope_local_base_freq", 50.0),
        ("Mistral", "use_sliding_window", False),
        ("Gemma3", "use_sliding_window", False),
        ("Starcoder2", "use_sliding_window", None),
        ("Starcoder2", "rms_norm_eps", 0.5),
        ("StableLm", "rms_norm_eps", 0.5),
        ("OPT", "intermediate_size", 33),
        ("OPT", "hidden_act", "gelu"),
        ("OPT", "rms_norm_eps", 0.5),
        ("OPT", "head_dim", 32),
        ("OPT", "num_key_value_heads", 1),
        ("OPT", "hidden_activation", "silu"),
        ("OPT", "layer_types", ["sliding_attention"] * 2 + ["full_attention"] * 2),
        ("OPT", "rope_theta", 77.0),
        ("OPT", "rope_scaling", {"rope_type": "unknown"}),
        ("OPT", "rope_parameters", {"rope_type": "linear", "factor": 4.0}),
        ("OPT", "partial_rotary_factor", 0.3),
        ("Llama", "hidden_act", "swish"),  # transformers' other name for "silu"
    ],
)
def test_what_only_other_architectures_read_means_nothing(load, name, key, value):
    assert load(name, **{key: value}) == load(name)


def test_what_is_missing_is_named_as_its_architecture_has_it(load):
    with pytest.raises(UnsupportedModel, match="'ffn_dim' is missing"):
        load("OPT", ffn_dim=None)


@pytest.mark.parametrize("name", ["Gemma3", "Olmo3"])
def test_a_scaling_beside_parameters_for_each_kind_of_layer_is_for_those_that_see_all(load, name):
    for scaling in (YARN, {"type": "yarn"} | {key: value for key, value in YARN.items() if key != "rope_type"}):
        found = load(name, rope_parameters=BY_KIND, rope_scaling=scaling)
        assert found.rope == load(name, rope_theta=5e5, rope_scaling=scaling).rope
        assert found.rope.rope_type == "yarn"
        assert (found.local_rope.rope_type, found.local_rope.theta) == ("default", 5e4)


def test_the_base_of_layers_is_transformers_default(load):
    from transformers import Olmo3Config

    theirs: Any = Olmo3Config().rope_parameters
    found = load("Olmo3")
    assert found.rope.theta == theirs["full_attention"]["rope_theta"]
    assert found.local_rope.theta == theirs["sliding_attention"]["rope_theta"]


def test_the_base_in_the_file_is_that_of_olmo_3s_windowed_layers_too(load):
    """transformers 5 has 5e5 there, whatever the file says."""
    found = load("Olmo3", rope_theta=1e4, rope_scaling=YARN)
    assert (found.rope.theta, found.rope.rope_type) == (1e4, "yarn")
    assert (found.local_rope.theta, found.local_rope.rope_type) == (1e4, "default")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama", {"rope_parameters": BY_KIND}, "expected the same for all layers"),
        ("Mistral", {"rope_parameters": BY_KIND}, "expected the same for all layers"),
        (
            "Gemma3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "of full_attention and of sliding",
        ),
        ("Olmo3", {"rope_parameters": {"full_attention": YARN}}, "of full_attention and of sliding"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 .* rotates whole heads"),
        ("Qwen3", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("Gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true .* another mask"),
        ("Llama", {"is_causal": False}, "is_causal=false .* another mask"),
        ("Granite", {"residual_multiplier": 0}, "residual_multiplier=0: expected `float` > 0"),
        ("Granite", {"residual_multiplier": -1}, "residual_multiplier=-1"),
        ("Granite", {"embedding_multiplier": 0}, "embedding_multiplier=0"),
        ("Granite", {"attention_multiplier": 0}, "attention_multiplier=0"),
        ("Gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0: expected `float` > 0"),
        ("Gemma2", {"final_logit_softcapping": -5.0}, "final_logit_softcapping=-5"),
    ],
)
def test_what_would_be_other_tokens_is_refused_by_its_key(load, name, changes, message):
    with pytest.raises(UnsupportedModel, match=message) as refusal:
        load(name, **changes)
    assert "\n" not in str(refusal.value)

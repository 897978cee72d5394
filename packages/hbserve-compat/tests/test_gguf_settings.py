"""Settings of a model in a GGUF file: the engine finds the same ones in the folder to which the file is converted."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from hbserve.models import conversion
from hbserve.models.gguf_settings import left_out
from hbserve_core.model.model_config import load_model_config
from hbserve_core.model.rope import angle_table
from hbserve_core.model.weights import load_weights
from hbserve_testing.narrowing import present

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LONG, SHORT = [1.0, 1.5, 3.0, 8.0, 9.0, 9.5], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "long_factor": LONG,
    "short_factor": SHORT,
    "attention_factor": 1.19,
}


def reader(architecture, fields, tensors=None):
    """Make what gguf.GGUFReader would return for a file with these fields and tensors."""
    named = {"general.architecture": architecture, **{f"{architecture}.{name}": each for name, each in fields.items()}}
    return SimpleNamespace(
        fields={name: SimpleNamespace(contents=lambda value=value: value) for name, value in named.items()},
        tensors=[SimpleNamespace(name=name, data=data) for name, data in (tensors or {}).items()],
    )


@pytest.fixture
def load(tmp_path):
    """Function that returns the engine's config for what transformers writes for such values, completed from a file."""

    def load(name, given, file=None):
        config = getattr(transformers, f"{name}Config")(**SIZES | given)
        raw = json.loads(config.to_json_string()) | {"architectures": [f"{name.removesuffix('Text')}ForCausalLM"]}
        if file is not None:
            raw |= left_out(config.to_dict(), file)
        (tmp_path / "config.json").write_text(json.dumps(raw))
        return load_model_config(tmp_path)

    return load


def factors_of_llama3():
    """Return what llama.cpp's converter puts into rope_freqs: the factor by which each pair of 16 dimensions is slowed
    down."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3)
    plain = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]).numpy()


CASES = {
    "llama3": ("Llama", LLAMA3, "llama", {"rope.freq_base": 5e5, "rope.dimension_count": 16}, "freqs"),
    "yarn": (
        "Qwen2", YARN, "qwen2",
        {"rope.freq_base": 1e6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.0}, "",
    ),
    "linear": (
        "Llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, "llama",
        {"rope.freq_base": 1e4, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "",
    ),
    "longrope": (
        "Phi3", LONGROPE, "phi3",
        {"rope.dimension_count": 12, "rope.freq_base": 1e4, "rope.scaling.attn_factor": 1.19,
         "rope.scaling.original_context_length": 64}, "factors",
    ),
    "a base that transformers does not read": (
        "Starcoder2", {"rope_type": "default", "rope_theta": 1e5}, "starcoder2", {"rope.freq_base": 1e5}, "",
    ),
    "part of each head": (
        "StableLm", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "stablelm",
        {"rope.dimension_count": 8}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", [64, 512])
def test_heads_are_rotated_as_the_original_has_it(load, case, limit):
    name, rope, architecture, fields, kind = CASES[case]
    more = {"original_max_position_embeddings": 64} if kind == "factors" else {}
    tensors = {"freqs": {"rope_freqs.weight": factors_of_llama3()}} if kind == "freqs" else {}
    tensors["factors"] = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
    original = load(name, {"rope_parameters": rope, **more}).within(limit).rope
    assert (original.rope_type, original.partial) != ("default", 1.0) or original.theta == 1e5
    found = load(name, {}, reader(architecture, fields, tensors.get(kind))).within(limit).rope
    torch.testing.assert_close(angle_table(found, 16, 512), angle_table(original, 16, 512), rtol=0, atol=3e-5)


def test_a_scaling_of_gemma3_is_of_the_layers_that_see_all(load):
    fields = {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    found = load("Gemma3Text", {"head_dim": 16}, reader("gemma3", fields))
    assert (found.rope.rope_type, found.rope.factor, found.rope.theta) == ("linear", 8.0, 1e6)
    assert (found.local_rope.rope_type, found.local_rope.theta) == ("default", 1e4)


def test_windows_caps_and_the_scale_of_scores_are_those_of_the_file(load):
    found = load("Phi3", {}, reader("phi3", {"attention.sliding_window": 47}))
    assert found.windows == (47, 47)
    assert load("Phi3", {}, reader("phi3", {"attention.sliding_window": 0})).windows == (0, 0)
    caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "attention.sliding_window": 13}
    found = load("Gemma2", {"head_dim": 32, "num_hidden_layers": 46}, reader("gemma2", caps))
    assert (found.switches.attention_cap, found.switches.logits_cap, max(found.windows)) == (20.0, 10.0, 13)
    assert found.attention_scale == 0.25  # of 27B: 64 / 4 of each head, although heads are wider
    assert load("Gemma2", {"head_dim": 32}, reader("gemma2", {})).attention_scale == 256**-0.5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 4.0}, r"rope\.scaling of .*'ntk'.* has no such RoPE"),
        ({"rope.scaling.type": "linear"}, r"'factor': 0\.0"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, "1.5"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 3.0}, "yarn_ext"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count=8: transformers rotates all 16 of a head"),
        ({"attention.sliding_window": 100}, r"llama\.attention\.sliding_window=100: transformers has none of a llama"),
    ],
)
def test_what_has_no_key_in_a_config_is_named(load, fields, named):
    with pytest.raises(ValueError, match=named) as caught:
        load("Llama", {}, reader("llama", fields))
    assert "\n" not in str(caught.value)


def test_experts_have_their_own_names_in_the_folder(tmp_path):
    """transformers keeps experts stacked, like the file."""
    gguf, np = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    pytest.importorskip("accelerate")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3moe")
    tokens = ["t", "1", "t1", *(f"x{i}" for i in range(61))]
    for add, value in {
        "block_count": 1, "context_length": 128, "embedding_length": 32, "feed_forward_length": 48, "head_count": 4,
        "head_count_kv": 2, "key_length": 16, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e6, "expert_count": 2,
        "expert_used_count": 1, "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens,
        "token_merges": ["t 1"], "token_types": [1] * len(tokens), "bos_token_id": 1, "eos_token_id": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    shapes = {
        "token_embd": (64, 32), "output_norm": (32,), "output": (64, 32), "blk.0.attn_q": (64, 32),
        "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 64), "blk.0.attn_q_norm": (16,),
        "blk.0.attn_k_norm": (16,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate_inp": (2, 32),
        "blk.0.ffn_gate_exps": (2, 768, 32), "blk.0.ffn_up_exps": (2, 768, 32), "blk.0.ffn_down_exps": (2, 32, 768),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    written = {name: generator.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, numbers in written.items():
        writer.add_tensor(f"{name}.weight", numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    conversion._write_model(tmp_path / "x.gguf", tmp_path / "folder")
    found = load_weights(load_model_config(tmp_path / "folder"), "safetensors", torch.float32, torch.device("cpu"))
    experts = present(found.layers[0].experts)
    expected = np.concatenate((written["blk.0.ffn_gate_exps"], written["blk.0.ffn_up_exps"]), 1)
    assert torch.equal(experts.gate_up, torch.from_numpy(expected))
    assert torch.equal(experts.down, torch.from_numpy(written["blk.0.ffn_down_exps"]))

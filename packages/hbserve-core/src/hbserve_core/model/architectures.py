"""Supported architectures, and the switches of the one decoder by which they differ apart from their sizes.

A value that a config.json leaves out has its architecture's default, the same as in transformers.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """Names of a layer's norms in a checkpoint, by their places; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    """Norm of attention's result, before it is added to attention's input."""
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    def names(self) -> list[str]:
        every = self.before_attention, self.after_attention, self.before_mlp, self.after_mlp
        return [name for name in every if name is not None]


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts in place of the MLP of some layers."""

    count: int
    per_token: int
    intermediate_size: int
    """Inner width of one expert, or of one rank's part of it if ranks have parts of all experts."""
    renormalises: bool
    """Whether the weights of a token's experts are scaled to add up to 1."""
    layers: tuple[int, ...]
    block: str = "mlp"
    """Name of the router and its experts in a checkpoint."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    whole_on_ranks: bool = False
    """Whether each rank has some of the experts as a whole (expert parallelism), and not a part of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """Everything in which a model differs from Llama. The defaults are Llama's."""

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "projection"] = ""
    """Kind of norm of queries and keys: "head" norms each head by itself, "projection" all query heads together and all
    key heads together; "" if none."""
    is_fused: bool = False
    """Whether q, k and v are one tensor in the checkpoint, and gate and up are another."""
    norms: LayerNorms = field(default_factory=LayerNorms)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logits_divisor: float = 1.0
    attention_multiplier: float | None = None
    """Factor of attention's scores; None for 1 / sqrt(head_dim)."""
    plain_layers: tuple[int, ...] = ()
    """Layers that do not rotate queries and keys (NoPE)."""
    windowed_layers: tuple[int, ...] = ()
    """Layers that only see the last `sliding_window` positions, if there is such a window."""
    activation: Literal["silu", "gelu", "relu"] = "silu"
    """Activation of the MLP, applied to its gates if `is_gated`; "gelu" is the approximation with tanh."""
    is_gated: bool = True
    """Whether the MLP is act(gate) * up (SwiGLU, GeGLU); otherwise it is act(up) and has no gate_proj."""
    layer_norms: bool = False
    """Whether norms subtract the mean and have biases. `weights.py` says how they become RMS norms."""
    learned_positions: int = 0
    """Number of rows of the table of learned positions, which from its third row on are added to the embeddings by
    position; 0 if there is none."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of names in a checkpoint, and what replaces them in our names, in the order of replacement."""
    norms_from_one: bool = False
    """Whether norms multiply by 1 + weight, as Gemma's do."""
    attention_cap: float = 0.0
    """Soft cap of attention's scores: a score s becomes cap * tanh(s / cap). 0 means no cap."""
    logits_cap: float = 0.0
    experts: Experts | None = None


def _qwen3(raw: Mapping[str, Any]) -> Switches:
    attention = bool(raw.get("attention_bias", False))
    return Switches(qkv_bias=attention, output_bias=attention, qk_norm="head", windowed_layers=_last_layers(raw))


def _qwen2(raw: Mapping[str, Any]) -> Switches:
    return Switches(qkv_bias=True, windowed_layers=_last_layers(raw))


def _last_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    """Return Qwen's layers with a window: those from max_window_layers on, if windows are in use."""
    count = raw["num_hidden_layers"]
    return tuple(range(raw["max_window_layers"], count)) if raw["use_sliding_window"] else ()


def _llama(raw: Mapping[str, Any]) -> Switches:
    return Switches(**_biases(raw))


def _mistral(raw: Mapping[str, Any]) -> Switches:
    return Switches(windowed_layers=tuple(range(raw["num_hidden_layers"])))


def _phi3(raw: Mapping[str, Any]) -> Switches:
    return Switches(is_fused=True, windowed_layers=tuple(range(raw["num_hidden_layers"])))


def _smollm3(raw: Mapping[str, Any]) -> Switches:
    count = raw["num_hidden_layers"]
    rotates = raw.get("no_rope_layers")  # the name says the opposite of what is in it
    if rotates is None:
        interval = raw["no_rope_layer_interval"]
        rotates = [(index + 1) % interval for index in range(count)]
    plain = tuple(i for i in range(count) if not rotates[i])
    return Switches(plain_layers=plain, windowed_layers=plain if raw["use_sliding_window"] else (), **_biases(raw))


def _olmo2(raw: Mapping[str, Any]) -> Switches:
    norms = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
    return Switches(qk_norm="projection", norms=norms, **_biases(raw, of_mlp=False))


def _olmo3(raw: Mapping[str, Any]) -> Switches:
    return replace(_olmo2(raw), windowed_layers=tuple(i for i in range(raw["num_hidden_layers"]) if (i + 1) % 4))


def _seed_oss(raw: Mapping[str, Any]) -> Switches:
    return replace(_llama(raw), output_bias=bool(raw["attention_out_bias"]))


def _granite(raw: Mapping[str, Any]) -> Switches:
    return Switches(
        embedding_multiplier=float(raw.get("embedding_multiplier", 1.0)),
        residual_multiplier=float(raw.get("residual_multiplier", 1.0)),
        logits_divisor=float(raw.get("logits_scaling", 1.0)),
        attention_multiplier=float(raw.get("attention_multiplier", 1.0)),
        **_biases(raw),
    )


def _gemma2(raw: Mapping[str, Any]) -> Switches:
    return _gemma(raw, every=2)


def _gemma3(raw: Mapping[str, Any]) -> Switches:
    return replace(_gemma(raw, every=raw["sliding_window_pattern"]), qk_norm="head")


def _gemma(raw: Mapping[str, Any], every: int) -> Switches:
    """every: distance between layers that see all positions."""
    return Switches(
        norms=LayerNorms(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        ),
        norms_from_one=True,
        activation="gelu",
        embedding_multiplier=float(raw["hidden_size"]) ** 0.5,
        attention_multiplier=float(raw["query_pre_attn_scalar"]) ** -0.5,
        attention_cap=float(raw["attn_logit_softcapping"] or 0),
        logits_cap=float(raw["final_logit_softcapping"] or 0),
        windowed_layers=tuple(i for i in range(raw["num_hidden_layers"]) if (i + 1) % every),
        **_biases(raw, of_mlp=False),
    )


def _qwen3_moe(raw: Mapping[str, Any]) -> Switches:
    dense, step = raw["mlp_only_layers"] or (), raw["decoder_sparse_step"]
    experts = Experts(
        count=raw["num_experts"],
        per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["moe_intermediate_size"],
        renormalises=bool(raw["norm_topk_prob"]),
        layers=tuple(i for i in range(raw["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0),
    )
    windowed = tuple(range(raw["num_hidden_layers"])) if raw["use_sliding_window"] else ()
    return replace(_qwen3(raw), experts=experts, windowed_layers=windowed)


def _olmoe(raw: Mapping[str, Any]) -> Switches:
    experts = Experts(
        count=raw["num_experts"],
        per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["intermediate_size"],
        renormalises=bool(raw["norm_topk_prob"]),
        layers=tuple(range(raw["num_hidden_layers"])),
    )
    return Switches(qk_norm="projection", experts=experts, **_biases(raw, of_mlp=False))


def _mixtral(raw: Mapping[str, Any]) -> Switches:
    experts = Experts(
        count=raw["num_experts"],
        per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["intermediate_size"],
        renormalises=True,
        layers=tuple(range(raw["num_hidden_layers"])),
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
    )
    return replace(_mistral(raw), experts=experts)


def _opt(raw: Mapping[str, Any]) -> Switches:
    return Switches(
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation="relu",
        is_gated=False,
        layer_norms=True,
        plain_layers=tuple(range(raw["num_hidden_layers"])),
        learned_positions=raw["max_position_embeddings"] + 2,
        renamed=(
            ("decoder.final_layer_norm", "norm"),
            ("decoder.", ""),
            ("self_attn_layer_norm", "input_layernorm"),
            ("final_layer_norm", "post_attention_layernorm"),
            ("self_attn.out_proj", "self_attn.o_proj"),
            ("fc1", "mlp.up_proj"),
            ("fc2", "mlp.down_proj"),
        ),
    )


def _starcoder2(raw: Mapping[str, Any]) -> Switches:
    bias = bool(raw["use_bias"])
    return Switches(
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        activation="gelu",
        is_gated=False,
        layer_norms=True,
        windowed_layers=tuple(range(raw["num_hidden_layers"])),
        renamed=(("mlp.c_fc", "mlp.up_proj"), ("mlp.c_proj", "mlp.down_proj")),
    )


def _stablelm(raw: Mapping[str, Any]) -> Switches:
    return Switches(qkv_bias=bool(raw["use_qkv_bias"]), layer_norms=True)


def _biases(raw: Mapping[str, Any], of_mlp: bool = True) -> dict[str, Any]:
    attention = bool(raw.get("attention_bias", False))
    mlp = of_mlp and bool(raw.get("mlp_bias", False))
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": mlp}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Description of one architecture: how its config.json is read, and which switches it has."""

    model_type: str
    """Name of the architecture in a config.json without `architectures`."""
    switches: Callable[[Mapping[str, Any]], Switches]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of keys that a config.json leaves out. Keys in `_OF_SOME` are only read if they have a default here."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """This architecture's own names in a config.json, and the names that others have for the same values. The latter
    mean nothing in its config.json."""
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Keys that may have only one value: that value, and what another one would need."""
    by_layer: bool = False
    """Whether layer_types decide which layers have a window. In other architectures all layers have one, or none."""
    part_of_head: bool = False
    """Whether partial_rotary_factor is supported."""
    unread: Set[str] = frozenset()
    """Keys that this architecture ignores although almost all others read them."""

    def completed(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json with the common names and with defaults for what it leaves out, without keys of other
        architectures."""
        others = {*self.renamed.values(), *self.unread, *(_OF_SOME - self.defaults.keys())}
        names = {"num_local_experts": "num_experts", **self.renamed}  # either name will do, as in transformers
        own = {names.get(name, name): value for name, value in raw.items() if name not in others}
        return {**self.defaults, **own}


_OF_SOME = {"use_sliding_window", "rope_local_base_freq"}
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096}
_PHI3 = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": None}
_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
ARCHITECTURES: dict[str, Architecture] = {
    # Qwen3's head size is 128 whatever the hidden size; the others' is the hidden size divided among the heads.
    "Qwen3ForCausalLM": Architecture("qwen3", _qwen3, {"head_dim": 128, **_QWEN}, by_layer=True),
    "Qwen2ForCausalLM": Architecture("qwen2", _qwen2, _QWEN, by_layer=True),
    "LlamaForCausalLM": Architecture("llama", _llama),
    "MistralForCausalLM": Architecture("mistral", _mistral, _MISTRAL),
    "Phi3ForCausalLM": Architecture("phi3", _phi3, _PHI3, part_of_head=True),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        _smollm3,
        {"num_key_value_heads": 4, "rope_theta": 2e6, "no_rope_layer_interval": 4, "tie_word_embeddings": True}
        | {"use_sliding_window": False, "sliding_window": None},
        by_layer=True,
    ),
    "Olmo2ForCausalLM": Architecture("olmo2", _olmo2, {"rms_norm_eps": 1e-5}),
    # Where RoPE is scaled, it is scaled only in layers that see all positions.
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        _olmo3,
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096, "scales_windowed_layers": False},
        by_layer=True,
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        _olmoe,
        {"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False},
        only={"clip_qkv": (None, "queries, keys and values that are clipped")},
    ),
    "MinistralForCausalLM": Architecture("ministral", _mistral, _MISTRAL, by_layer=True),
    "SeedOssForCausalLM": Architecture(
        "seed_oss",
        _seed_oss,
        {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False},
    ),
    "GraniteForCausalLM": Architecture("granite", _granite),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        _qwen3_moe,
        {"num_key_value_heads": 4, "mlp_only_layers": None, "decoder_sparse_step": 1, "norm_topk_prob": False, **_QWEN},
    ),
    "MixtralForCausalLM": Architecture(
        "mixtral",
        _mixtral,
        _MISTRAL
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_experts_per_tok": 2, "num_experts": 8},
    ),
    "OPTForCausalLM": Architecture(
        "opt",
        _opt,
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
        {
            "do_layer_norm_before": (True, "norms behind the additions, and projections around the layers (OPT-350M)"),
            "enable_bias": (True, "layers without biases, and norms with them"),
            "layer_norm_elementwise_affine": (True, "norms without weights"),
            "_remove_final_layer_norm": (False, "layers without a norm behind them"),
        },
        unread={"rms_norm_eps", "head_dim", "num_key_value_heads", "hidden_activation", "layer_types", *_ROPE},
    ),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2",
        _starcoder2,
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "use_bias": True, "sliding_window": None}
        | {"rms_norm_eps": 1e-5},
        {"norm_epsilon": "rms_norm_eps"},
    ),
    "StableLmForCausalLM": Architecture(
        "stablelm",
        _stablelm,
        {"num_key_value_heads": 32, "rms_norm_eps": 1e-5, "use_qkv_bias": False, "partial_rotary_factor": 0.25},
        {"layer_norm_eps": "rms_norm_eps"},
        {
            "use_parallel_residual": (False, "attention and MLP of the same input"),
            "qk_layernorm": (False, "layer norms of queries and keys"),
        },
        part_of_head=True,
    ),
    "Gemma2ForCausalLM": Architecture("gemma2", _gemma2, _GEMMA | _CAPS, by_layer=True),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        _gemma3,
        _GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": 6}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
        only={"attn_logit_softcapping": (None, "scores that are capped, and transformers leaves them")},
        by_layer=True,
    ),
}

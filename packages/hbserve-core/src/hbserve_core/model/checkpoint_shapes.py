"""Names and shapes of the tensors that a model needs from a checkpoint."""

from hbserve_core.model.architectures import Experts
from hbserve_core.model.model_config import ModelConfig

POSITIONS = "model.embed_positions.weight"
NO_POSITIONS = 2
"""Number of rows at the beginning of the table of learned positions that belong to no position."""


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the model needs."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in _layer_shapes(config, index).items()}
    shapes |= _norm_shapes(config, "model.norm")
    if config.switches.learned_positions:
        shapes[POSITIONS] = (config.switches.learned_positions, hidden)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def _layer_shapes(config: ModelConfig, index: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    switches = config.switches
    linears = [
        *(("self_attn", name, sum(rows), hidden, switches.qkv_bias) for name, rows in qkv_tensors(config).items()),
        ("self_attn", "o_proj", hidden, query, switches.output_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    if switches.experts is not None and index in switches.experts.layers:
        shapes |= _expert_shapes(switches.experts, hidden)
    else:
        gate_up = gate_up_tensors(config).items()
        linears += [("mlp", name, sum(rows), hidden, switches.mlp_bias) for name, rows in gate_up]
        linears.append(("mlp", "down_proj", hidden, inner, switches.mlp_bias))
    for block, name, outputs, inputs, has_bias in linears:
        shapes[f"{block}.{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{block}.{name}.bias"] = (outputs,)
    if switches.qk_norm:
        sizes = (query, key) if switches.qk_norm == "projection" else (config.head_dim, config.head_dim)
        shapes |= {f"self_attn.{name}.weight": (size,) for name, size in zip(("q_norm", "k_norm"), sizes, strict=True)}
    for name in switches.norms.names():
        shapes |= _norm_shapes(config, name)
    return shapes


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    kinds = ("weight", "bias") if config.switches.layer_norms else ("weight",)
    return {f"{name}.{kind}": (config.hidden_size,) for kind in kinds}


def _expert_shapes(experts: Experts, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{experts.block}.gate.weight": (experts.count, hidden)}
    gate, up, down = experts.projections
    for i in range(experts.count):
        shapes |= {
            f"{experts.block}.experts.{i}.{name}.weight": (experts.intermediate_size, hidden) for name in (gate, up)
        }
        shapes[f"{experts.block}.experts.{i}.{down}.weight"] = (hidden, experts.intermediate_size)
    return shapes


Rows = tuple[int, ...]
"""Numbers of rows of the projections that are stacked in one tensor of the checkpoint."""


def qkv_tensors(config: ModelConfig) -> dict[str, Rows]:
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    if config.switches.is_fused:
        return {"qkv_proj": (query, key, key)}
    return {"q_proj": (query,), "k_proj": (key,), "v_proj": (key,)}


def gate_up_tensors(config: ModelConfig) -> dict[str, Rows]:
    inner = config.intermediate_size
    if not config.switches.is_gated:
        return {"up_proj": (inner,)}
    return (
        {"gate_up_proj": (inner, inner)} if config.switches.is_fused else {"gate_proj": (inner,), "up_proj": (inner,)}
    )

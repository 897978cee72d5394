"""Configuration of rotary position embeddings, read from a model's config.json. torch is not imported: whoever only
asks whether a model can be served does not wait for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hbserve_core.errors import UnsupportedModel

_SUPPORTED = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
_OWN_LENGTH = ("llama3", "yarn", "longrope")
"""Types that have a parameter of their own for the length before it was extended."""


_OTHER_NAMES = {"su": "longrope"}
"""Names of types in older files, and their present names."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base and scaling of the rotation angles.

    "dynamic" changes its frequencies when a sequence gets longer than the model's own limit. This engine does not go
    beyond that limit, within which "dynamic" is the same as "default". "longrope" changes them beyond its original
    length. Cached keys cannot follow, so all sequences have the frequencies of the longest one that the engine takes,
    as in vLLM: see `within`. "none" rotates nothing.
    """

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """Turns within the original length below which pairs are slowed down by the whole factor, for "llama3"."""
    high_freq_factor: float = 4.0
    """Turns within the original length above which pairs keep their frequencies, for "llama3"."""
    original_max_position_embeddings: int = 0
    """Length before it was extended, for "llama3", "yarn" and "longrope" only."""
    beta_fast: float = 32.0
    """Turns within the original length above which pairs keep their frequencies, for "yarn"."""
    beta_slow: float = 1.0
    """Turns within the original length below which pairs are slowed down by the whole factor, for "yarn"."""
    truncate: bool = True
    """Whether the bounds between these pairs are rounded to whole pairs, for "yarn"."""
    magnitude: float = 1.0
    """Factor of the rotated parts of queries and keys; only "yarn" and "longrope" have one other than 1."""
    factors: tuple[float, ...] = ()
    """Divisors of each pair's frequency, for "longrope"."""
    short_factors: tuple[float, ...] = ()
    """Value of `factors` if no sequence is longer than the original length, for "longrope"."""
    partial: float = 1.0
    """Share of a head's dimensions, counted from the first, that are rotated. See `head_order`."""

    def without_rotation(self) -> "RopeConfig":
        return RopeConfig("none", self.theta)

    def num_rotated(self, head_dim: int) -> int:
        """Return how many of a head's dimensions are rotated."""
        return int(head_dim * self.partial)

    def check_fits(self, folder: Path, head_dim: int) -> None:
        """Raise UnsupportedModel unless pairs of a head's dimensions can be rotated in this way."""
        rotated = self.num_rotated(head_dim)
        if rotated < 2 or rotated % 2 or head_dim % 2:
            raise UnsupportedModel(
                f"{folder}: head_dim={head_dim}, of which partial_rotary_factor={self.partial} rotates {rotated}: "
                "expected an even number of both"
            )
        if self.factors and len(self.factors) != rotated // 2:
            raise UnsupportedModel(
                f"{folder}: {len(self.factors)} long and short factors of longrope: expected {rotated // 2}, one for "
                f"each pair of the {rotated} dimensions that are rotated"
            )

    def within(self, max_model_len: int) -> "RopeConfig":
        """Return the same configuration for an engine whose sequences are no longer than this."""
        is_short = self.rope_type == "longrope" and max_model_len <= self.original_max_position_embeddings
        return replace(self, factors=self.short_factors) if is_short else self


def read_rope_configs(folder: Path, raw: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig | None]:
    """Read the rotation of a model's layers, and that of its layers with a window if it is a different one (Gemma 3,
    OLMo 3). Raises what `read_rope_config` raises.

    If rope_parameters has an entry for each kind of layer, rope_scaling applies to the layers that see all positions,
    as in transformers.
    """
    own, local = raw.get("rope_parameters") or {}, raw.get("rope_local_base_freq")
    differs = local is not None or not raw.get("scales_windowed_layers", True)
    kinds = [own[name] for name in ("full_attention", "sliding_attention") if own.get(name)]
    if own and differs != (len(kinds) == 2):
        expected = "those of full_attention and of sliding_attention" if differs else "the same for all layers"
        raise UnsupportedModel(f"{folder}: rope_parameters={dict(own)} is not supported; expected {expected}")
    if kinds:
        full, sliding = ({**raw, "rope_scaling": None, "rope_parameters": each} for each in kinds)
        if scaling := raw.get("rope_scaling"):
            full["rope_scaling"] = {"rope_theta": kinds[0].get("rope_theta"), **scaling}
        return read_rope_config(folder, full), read_rope_config(folder, sliding)
    rope = read_rope_config(folder, raw)
    if differs and local is None:
        # This is what vLLM does. transformers 5 removes rope_theta for the full layers, and uses its default of 5e5 for
        # windowed ones whatever the file says, which is only the same for files with that value.
        local = rope.theta
    return rope, None if local is None else RopeConfig("default", float(local))


def read_rope_config(folder: Path, raw: Mapping[str, Any]) -> RopeConfig:
    """Read a config.json with the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    As in transformers, rope_scaling counts if both are given, because model cards say what to put there. If
    rope_scaling has no base, the base is the one elsewhere in the file.

    Raises:
        UnsupportedModel: a RoPE type, or a partly rotated head, that this engine does not have; or a parameter that is
            not possible.
        KeyError: the named scaling parameter is missing.
    """
    own = raw.get("rope_parameters") or {}
    parameters = raw.get("rope_scaling") or own
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    rope_type = _OTHER_NAMES.get(rope_type, rope_type)
    if rope_type == "yarn" and parameters.get("long_factor"):  # older files of Phi-3 call longrope so
        rope_type = "longrope"
    if rope_type not in _SUPPORTED or any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModel(
            f"{folder}: rope_type={rope_type!r} is not supported; supported: {', '.join(_SUPPORTED)}, for all layers"
        )
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    partial = 1.0 if partial is None else float(partial)
    if not 0 < partial <= 1:
        raise UnsupportedModel(f"{folder}: partial_rotary_factor={partial}: expected above 0, at most 1")
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or own.get("rope_theta") or 10000.0)
    if rope_type == "default":
        return RopeConfig(rope_type, theta, partial=partial)
    try:
        return replace(_read_scaling(rope_type, theta, parameters, raw), partial=partial)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedModel(f"{folder}: rope scaling {dict(parameters)}: {error}") from error


def _read_scaling(rope_type: str, theta: float, parameters: Mapping[str, Any], raw: Mapping[str, Any]) -> RopeConfig:
    original = 0
    if rope_type in _OWN_LENGTH:
        given = raw.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
        original = int(given or raw["max_position_embeddings"])
    if rope_type in ("yarn", "longrope") and parameters.get("factor") is None:
        factor = raw["max_position_embeddings"] / original
    else:
        factor = float(parameters["factor"])
    if not 0 < factor <= 1e6 or not 1 < theta < math.inf:
        raise ValueError(f"factor={factor}, rope_theta={theta}: expected at most 1e6 and above 0, and above 1")
    if rope_type == "yarn":
        return _read_yarn(theta, factor, original, parameters)
    if rope_type == "longrope":
        return _read_longrope(theta, factor, original, parameters)
    if rope_type == "llama3":
        low, high = (float(parameters[name]) for name in ("low_freq_factor", "high_freq_factor"))
        if not low < high:
            raise ValueError(f"low_freq_factor={low}: expected less than high_freq_factor={high}")
        return RopeConfig(rope_type, theta, factor, low, high, original)
    return RopeConfig(rope_type, theta, factor)


def _read_yarn(theta: float, factor: float, original: int, parameters: Mapping[str, Any]) -> RopeConfig:
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        mscale, all_dims = (parameters.get(name) for name in ("mscale", "mscale_all_dim"))
        magnitude = (
            _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, all_dims)
            if mscale and all_dims
            else _yarn_magnitude(factor)
        )
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max_position_embeddings=original,
        magnitude=float(magnitude),
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
    )


def _read_longrope(theta: float, factor: float, original: int, parameters: Mapping[str, Any]) -> RopeConfig:
    long, short = (tuple(map(float, parameters[f"{name}_factor"])) for name in ("long", "short"))
    if len(long) != len(short) or not all(0 < each < math.inf for each in long + short):
        raise ValueError(f"{len(long)} long and {len(short)} short factors: expected equally many, above 0")
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        "longrope",
        theta,
        factor,
        original_max_position_embeddings=original,
        magnitude=float(magnitude),
        factors=long,
        short_factors=short,
    )


def _yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(max(factor, 1.0)) + 1.0


def extended_length(config: RopeConfig, max_position_embeddings: int) -> int:
    """Return the largest number of tokens of a sequence, to which the scaling extends the model, as in vLLM.

    For "llama3" that is max_position_embeddings itself. For "yarn" max_position_embeddings may be the length before the
    scaling or after it, so the original length is what counts.
    """
    own = config.original_max_position_embeddings if config.rope_type == "yarn" else max_position_embeddings
    return int(own * max(config.factor, 1.0)) if config.rope_type in ("yarn", "linear") else max_position_embeddings

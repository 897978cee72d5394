"""Rotary position embeddings: their configuration, frequencies, and application to query and key heads.

Shapes: T tokens of one step, H heads, D head_dim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hbserve_core.errors import UnsupportedModel

_SUPPORTED = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base and scaling of the rotation angles. The last three fields belong to rope_type "llama3"."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


def read_rope_config(folder: Path, raw: Mapping[str, Any]) -> RopeConfig:
    """From a config.json, with the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises:
        UnsupportedModel: a RoPE type, or a partly rotated head, that this engine does not have.
        KeyError: the named scaling parameter is missing.
    """
    parameters = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in _SUPPORTED:
        raise UnsupportedModel(
            f"{folder}: rope_type={rope_type!r} is not supported; supported: {', '.join(_SUPPORTED)}"
        )
    partial = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModel(f"{folder}: partial_rotary_factor={partial} is not supported; supported: 1.0")
    theta = float(parameters.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if rope_type == "default":
        return RopeConfig(rope_type, theta)
    if rope_type == "linear":
        return RopeConfig(rope_type, theta, float(parameters["factor"]))
    return RopeConfig(
        rope_type,
        theta,
        factor=float(parameters["factor"]),
        low_freq_factor=float(parameters["low_freq_factor"]),
        high_freq_factor=float(parameters["high_freq_factor"]),
        original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
    )


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Rotation per position of each pair of dimensions, float32 (D / 2,), on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, frequencies)
    return frequencies


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed down by `factor`, short ones are kept, and those between are blended."""
    waves_in_context = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    kept = ((waves_in_context - config.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


def angle_table(config: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """(num_positions, D) float32, on the CPU: cosines of each pair's rotation, then sines."""
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    turns = positions[:, None] * inverse_frequencies(config, head_dim)
    return torch.cat((turns.cos(), turns.sin()), dim=-1)


class Rope:
    """Rotates heads by their tokens' positions."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._half = head_dim // 2
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines of one step, (T, 1, D) each, from positions (T,): the same for every layer."""
        turns = positions[:, None].float() * self._frequencies
        cos, sin = turns.cos(), turns.sin()
        return (
            torch.cat((cos, cos), dim=-1)[:, None].to(self._dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(self._dtype),
        )

    def rotate(self, heads: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> None:
        """Write the rotated heads (T, H, D) to `out`, which may be `heads` itself.

        With x = (a, b) in halves, the result is (a cos - b sin, b cos + a sin): swapping the halves and giving the
        first one a negative sine makes that two products.
        """
        cos, signed_sin = angles
        swapped = heads.roll(self._half, dims=-1)
        torch.mul(heads, cos, out=out)
        out.addcmul_(swapped, signed_sin)

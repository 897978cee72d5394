"""Rotary position embeddings: their frequencies, and application to query and key heads.

Shapes: T tokens of one step, H heads, D head_dim.
"""

import math

import torch

from hbserve_core.model.rope_config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the rotation per position of each pair of dimensions, float32 (D / 2,), on the CPU; 0 for pairs that do
    not rotate."""
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float32, device="cpu")
    if config.rope_type != "none":
        rotated = config.num_rotated(head_dim)
        frequencies[: rotated // 2] = _rotating(config, rotated)
    return frequencies


def _rotating(config: RopeConfig, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, frequencies)
    if config.rope_type == "yarn":
        return _yarn(config, frequencies)
    if config.rope_type == "longrope":
        return 1.0 / (torch.tensor(config.factors, device="cpu") * config.theta**exponents)
    return frequencies


def _magnitudes(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """Return the factor of each pair of dimensions, float32 (D / 2,), on the CPU."""
    magnitudes = torch.ones(head_dim // 2, dtype=torch.float32, device="cpu")
    magnitudes[: config.num_rotated(head_dim) // 2] = config.magnitude
    return magnitudes


def head_order(config: RopeConfig, head_dim: int) -> torch.Tensor | None:
    """Return the order in which rows of query and key projections are kept, (D,) int64, or None if it is unchanged.

    Here dimension i is rotated with i + D / 2. In checkpoints it is rotated with i + R / 2, if only the first R of D
    dimensions rotate. Scores do not depend on the order.
    """
    rotated = config.num_rotated(head_dim)
    if rotated == head_dim:
        return None
    places = torch.arange(head_dim, device="cpu")
    first, second = places[:rotated].chunk(2)
    others, more = places[rotated:].chunk(2)
    return torch.cat((first, others, second, more))


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, and blend those in between."""
    waves_in_context = config.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    kept = ((waves_in_context - config.low_freq_factor) / span).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


def _yarn(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Slow down long wavelengths like llama3, but blend by the pair's number, between the pairs that turn beta_fast and
    beta_slow times (YaRN, Peng et al. 2023)."""
    head_dim = 2 * len(frequencies)

    def pair(turns: float) -> float:
        """Return the number of the pair, not necessarily whole, that turns this often within the original length."""
        wave = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wave) / (2 * math.log(config.theta))

    low, high = pair(config.beta_fast), pair(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    slowed = ((torch.arange(len(frequencies), dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return frequencies / config.factor * slowed + frequencies * (1 - slowed)


def angle_table(config: RopeConfig, head_dim: int, num_positions: int) -> torch.Tensor:
    """Compute a table (num_positions, D), float32, on the CPU: cosines of each pair's rotation, then sines, times the
    magnitude."""
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    turns = positions[:, None] * inverse_frequencies(config, head_dim)
    magnitudes = _magnitudes(config, head_dim)
    return torch.cat((turns.cos() * magnitudes, turns.sin() * magnitudes), dim=-1)


class Rope:
    """Rotation of heads by the positions of their tokens."""

    def __init__(self, config: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config, head_dim).to(device)
        self._half = head_dim // 2
        self._magnitudes = _magnitudes(config, head_dim).to(device)
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the cosines and signed sines of one step, (T, 1, D) each, from positions (T,). They are the same for
        every layer."""
        turns = positions[:, None].float() * self._frequencies
        cos, sin = turns.cos() * self._magnitudes, turns.sin() * self._magnitudes
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

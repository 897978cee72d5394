"""Next tokens on the device: greedy, temperature, top-k and top-p, for all rows of a step at once and without the host.

A token is drawn by the Gumbel-max rule: the argmax of logit + temperature * g, where the g are independent standard
Gumbel numbers, has the distribution of the softmax (Gumbel 1954; Maddison et al. 2014). So one pass over the logits is
enough, no probabilities are stored, and every g depends only on the request's seed, the token's index and the token's
id: the same request gets the same tokens in any batch.

Top-k and top-p are a threshold on the logits, found by bisection over the bits of a float. Logits may be anything: what
torch_runner/sampler.py says of those that are not finite also holds here. No maximum is taken of a NaN, because its
result on a device is not specified.

Shapes: R rows, V vocab_size.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import INTERPRETED, LAUNCH, begin
from hbserve_core.engine.sequence import COLDEST, HOTTEST, NOT_FINITE

_PART = 4096
_COLDEST, _HOTTEST = tl.constexpr(COLDEST), tl.constexpr(HOTTEST)
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _mix(x):
    """Apply a bijection of 32-bit integers whose output bits all depend on all input bits (Wellons's lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def _gumbel(seed_low, seed_high, index, tokens):
    key = _mix(seed_low ^ _mix(seed_high ^ _mix(index)))
    bits = _mix(_mix(tokens.to(tl.uint32) ^ key) + _mix(key + 0x9E3779B9))
    uniform = (bits.to(tl.float32) + 0.5) * 2.0**-32
    # An exponential number; near 0, where the winners are, 1 - uniform would lose its digits.
    exponential = tl.where(uniform < 1e-3, uniform * (1.0 + 0.5 * uniform), -_log(tl.maximum(1.0 - uniform, 1e-10)))
    return -_log(exponential)


@triton.jit
def _log(x):
    """Compute log(x) by the device's own approximation (to 2^-22). Triton would call a function of twenty instructions,
    with which drawing is bound by arithmetic."""
    if INTERPRETED:
        return tl.log(x)
    bits = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return bits * _LOG_2


@triton.jit
def _temperature(choices, row):
    """Load the temperature of a row: 0, or a number by which logits can be divided and multiplied."""
    given = tl.load(choices + row).to(tl.float32, bitcast=True)
    return tl.where(given > 0, tl.minimum(tl.maximum(given, _COLDEST), _HOTTEST), 0.0)


@triton.jit(do_not_specialize=["stride"])
def _best_of_part(
    logits, thresholds, choices, stride, best_scores, best_tokens, V: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    # choices: temperature (float bits), seed low, seed high, index of the token; a row each. The best score is a finite
    # number; or -inf, if no token may be drawn; or inf, if a logit is inf or NaN.
    begin()
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = _temperature(choices, row)
    tokens = part * PART + tl.arange(0, PART)
    given = tl.load(logits + row.to(tl.int64) * V + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
    scores = given
    if temperature > 0:
        scores = tl.where(given >= tl.load(thresholds + row), given, float("-inf"))
        seed_low = tl.load(choices + stride + row).to(tl.uint32, bitcast=True)
        seed_high = tl.load(choices + 2 * stride + row).to(tl.uint32, bitcast=True)
        index = tl.load(choices + 3 * stride + row).to(tl.uint32, bitcast=True)
        scores += temperature * _gumbel(seed_low, seed_high, index, tokens)
    # A NaN is not below infinity either.
    scores = tl.where(given < float("inf"), scores, float("inf"))
    best, place = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best_scores + row * tl.num_programs(1) + part, best)
    tl.store(best_tokens + row * tl.num_programs(1) + part, part * PART + place)


@triton.jit
def _best_of_row(best_scores, best_tokens, sampled, PARTS: tl.constexpr, PADDED: tl.constexpr):
    begin()
    row, parts = tl.program_id(0), tl.arange(0, PADDED)
    scores = tl.load(best_scores + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
    best, place = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
    # The first of equal scores is best: `place` is one of the parts, and if `best` is finite, its token is in the
    # vocabulary.
    token = tl.load(best_tokens + row * PARTS + place)
    tl.store(sampled + row, tl.where((best > float("-inf")) & (best < float("inf")), token, _NOT_FINITE))


@triton.jit
def _float_of(key):
    """Return the float at place `key` in the order of all floats, which is the order of these 32-bit integers."""
    bits = tl.where(key >> 31 != 0, key ^ 0x80000000, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mass_above(row_logits, least, floor, highest, temperature, BY_COUNT: tl.constexpr, V: tl.constexpr,
                PART: tl.constexpr):  # fmt: skip
    """Count the logits that are at least `least` and `floor`, or add up their weights exp((logit - highest) / t)."""
    total = 0.0
    for start in range(0, V, PART):
        tokens = start + tl.arange(0, PART)
        given = tl.load(row_logits + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
        counted = (given >= least) & (given >= floor)
        weights = tl.where(counted, 1.0 if BY_COUNT else tl.exp((given - highest) / temperature), 0.0)
        total += tl.sum(weights, 0)
    return total


@triton.jit
def _bisect(row_logits, wanted, floor, highest, temperature, BY_COUNT: tl.constexpr, V: tl.constexpr,
            PART: tl.constexpr):  # fmt: skip
    """Find the largest float such that the logits from it on reach `wanted`, which is above 0; -inf if there is
    none."""
    key = tl.full((), 0, tl.uint32)
    for bit in range(31, -1, -1):
        candidate = key | (tl.full((), 1, tl.uint32) << bit)
        least = _float_of(candidate)
        # Beyond the infinities are the NaNs, for which every comparison is false: the mass there is 0.
        if _mass_above(row_logits, least, floor, highest, temperature, BY_COUNT, V, PART) >= wanted:
            key = candidate
    found = _float_of(key)
    return tl.where(found == found, found, float("-inf"))


@triton.jit(do_not_specialize=["stride"])
def _find_threshold(logits, choices, stride, thresholds, V: tl.constexpr, PART: tl.constexpr):
    # choices: temperature (float bits), …, top_k (row 4), top_p (float bits, row 5).
    begin()
    row = tl.program_id(0)
    temperature = _temperature(choices, row)
    top_k = tl.load(choices + 4 * stride + row)
    top_p = tl.load(choices + 5 * stride + row).to(tl.float32, bitcast=True)
    floor = float("-inf")
    row_logits = logits + row.to(tl.int64) * V
    if (temperature > 0) & (((top_k > 0) & (top_k < V)) | (top_p < 1.0)):
        highest = float("-inf")
        for start in range(0, V, PART):
            tokens = start + tl.arange(0, PART)
            part = tl.load(row_logits + tokens, mask=tokens < V, other=float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, tl.max(tl.where(part < float("inf"), part, float("-inf")), 0))
        if (top_k > 0) & (top_k < V):
            floor = _bisect(row_logits, top_k.to(tl.float32), floor, highest, temperature, True, V, PART)
        if top_p < 1.0:
            total = _mass_above(row_logits, floor, floor, highest, temperature, False, V, PART)
            # Rounding must not ask for more than there is, nor for nothing; the most likely token always stays.
            wanted = tl.minimum(tl.maximum(top_p * total, 1e-30), total)
            floor = tl.minimum(_bisect(row_logits, wanted, floor, highest, temperature, False, V, PART), highest)
    tl.store(thresholds + row, floor)


def sample(logits: torch.Tensor, choices: torch.Tensor, sampled: torch.Tensor) -> None:
    """Write one token per row of `logits` (R, V), or NOT_FINITE, to the first R places of `sampled`, int32.

    choices: (6, R) int32: temperature (bits of a float32; 0 is greedy), low and high half of the seed, index of the
    token among the request's output, top_k (0: all), top_p (bits of a float32).
    """
    rows, vocab_size = logits.shape
    device = logits.device
    parts = triton.cdiv(vocab_size, _PART)
    thresholds = torch.empty(rows, dtype=torch.float32, device=device)
    _find_threshold[(rows,)](logits, choices, choices.stride(0), thresholds, vocab_size, _PART, num_warps=8, **LAUNCH)
    scores = torch.empty((rows, parts), dtype=torch.float32, device=device)
    tokens = torch.empty((rows, parts), dtype=torch.int32, device=device)
    _best_of_part[(rows, parts)](
        logits, thresholds, choices, choices.stride(0), scores, tokens, vocab_size, _PART, num_warps=4, **LAUNCH
    )
    _best_of_row[(rows,)](scores, tokens, sampled, parts, triton.next_power_of_2(parts), num_warps=1, **LAUNCH)


def seed_halves(seeds: Sequence[int]) -> npt.NDArray[np.int32]:
    """Split seeds into low and high halves, (2, N), as in `choices`."""
    whole = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype="<u8")
    return whole.view("<i4").reshape(-1, 2).T

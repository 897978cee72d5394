"""Invented weights, for load_format "dummy": the same on every kind of device, for every number of ranks.

A number follows from the tensor's name and from its place in the whole tensor, not from the one before, so a rank makes
no more than its part, on its own device. Only integer arithmetic and float operations that every device rounds alike
are used: a logarithm or a cosine differs from one mathematical library to the next, and torch's generators from one
device to the next.
"""

import hashlib
from typing import Literal

import torch

from hbserve_core.model.checkpoint.tensor_source import Shapes, TensorPart, row_pieces, sampled_places

_STD = 0.02
# A sum of four bytes that are uniform and independent: its mean, and its standard deviation.
_MEAN_OF_SUM = 510
_STD_OF_SUM = (4 * (256**2 - 1) / 12) ** 0.5
# How many are made at once, at some 16 bytes each on the way. On a CPU fewer than torch would share among its threads:
# on a busy machine, threads that meet after every short operation wait for each other most of the time.
_CPU_PIECE = (1 << 15) - 1
_GPU_PIECE = 1 << 22


class DummyCheckpoint:
    """Of weights with these names and shapes: norms are 1, biases 0, all else is about normal, of deviation 0.02.

    "About": each is a sum of four uniform numbers, so there are 1021 different ones, none beyond 3.5 deviations. In
    tensors of more than 2^32 elements they repeat.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def read(self, part: TensorPart, target: torch.Tensor) -> None:
        constant = _constant(part.name)
        if constant is not None:
            target.fill_(constant)
            return
        shape = self._shapes[part.name]
        keys = _keys(part.name)
        rows, columns = part.ranges(shape)
        within_row = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=target.device)
        most = _CPU_PIECE if target.device.type == "cpu" else _GPU_PIECE
        for piece in row_pieces(len(rows), len(columns), most):
            first = torch.arange(rows[piece].start, rows[piece].stop, dtype=torch.int64, device=target.device)
            places = (first * shape[1]).to(torch.int32)[:, None] + within_row
            target[piece].copy_(_numbers(places, keys))

    def read_narrow(self, part: TensorPart, device: torch.device) -> None:
        """All of them are invented in the widths of a model that is not quantised."""

    def sample(self, name: str) -> torch.Tensor:
        places = sampled_places(self._shapes[name])
        constant = _constant(name)
        if constant is not None:
            return torch.full((len(places),), constant, dtype=torch.float32, device="cpu")
        return _numbers(torch.tensor(places, dtype=torch.int64, device="cpu").to(torch.int32), _keys(name))

    def kv_scale(self, attention: str, kind: Literal["k", "v"]) -> float:
        return 1.0

    def close(self) -> None:
        """Nothing to end."""


def _constant(name: str) -> float | None:
    if name.endswith(".bias"):
        return 0.0
    return 1.0 if "norm" in name else None


def _keys(name: str) -> tuple[int, int]:
    digest = hashlib.sha256(name.encode()).digest()
    first, second = (int.from_bytes(digest[i : i + 4], "big", signed=True) for i in (0, 4))
    return first, second


def _numbers(places: torch.Tensor, keys: tuple[int, int]) -> torch.Tensor:
    """Float32, of places in a tensor: int32, counted modulo 2^32. Overwrites them."""
    bits = _mix(places, keys)
    sums = (bits & 0x00FF00FF) + ((bits >> 8) & 0x00FF00FF)
    sums += sums >> 16
    sums &= 0x7FF
    sums -= _MEAN_OF_SUM
    # The conversion is exact, so the product is all that is rounded.
    return sums.to(torch.float32).mul_(_STD / _STD_OF_SUM)


def _mix(x: torch.Tensor, keys: tuple[int, int]) -> torch.Tensor:
    """Wellons's lowbias32 in place, as in kernels/sampling.py, with a key before it and one within.

    One before it would not do: tensors would then hold parts of each other's numbers, in another order.
    torch shifts int32 arithmetically: the masks take away copies of the sign. Its products wrap.
    """
    x += keys[0]
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= keys[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x

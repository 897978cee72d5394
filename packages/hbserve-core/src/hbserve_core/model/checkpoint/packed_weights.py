"""Weights of 4 bits, eight to an int32, as in AWQ and GPTQ checkpoints: reading, and widening by scales and zeros.

In place of `X.weight` (O, I) there are the following, with I / G groups of G inputs that share a scale and a zero:
                  AWQ                                     GPTQ
    X.qweight     (I, O / 8), packed along outputs        (I / 8, O), packed along inputs
    X.qzeros      (I / G, O / 8), packed as its weights   (I / G, O / 8), packed along outputs, often one too small
    X.scales      (I / G, O)                              (I / G, O)
    X.g_idx                                               (I,): the group of each input, in any order (act-order)
A weight is (number - zero) * scale. The lowest four bits come first; AWQ has a permutation of eight neighbours.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from hbserve_core.model.checkpoint.safetensors_file import DTYPES, StoredTensor
from hbserve_core.model.checkpoint.tensor_source import SplitGroups, check_whole_groups
from hbserve_core.model.narrow_weight import NarrowWeight, can_be_read_by_groups, packed, step_of
from hbserve_core.model.quantization import Packing

_IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Places of eight adjacent numbers in their int32, as AWQ packs them."""
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class PackedWeight(NamedTuple):
    """Packed weight matrix."""

    shape: tuple[int, int]
    """Shape of the matrix, (O, I)."""
    parts: Mapping[str, StoredTensor]
    packing: Packing

    def widened(self, rows: range, columns: range, device: torch.device) -> torch.Tensor:
        """Return a part (rows, columns) of the weight, float32. The whole weight is read for that."""
        numbers, zeros, scales, groups = self._unpacked(device)
        inputs, outputs = slice(columns.start, columns.stop), slice(rows.start, rows.stop)
        own = groups[inputs]
        return ((numbers[inputs, outputs] - zeros[own][:, outputs]) * scales.float()[own][:, outputs]).t()

    def narrow(self, name: str, rows: range, columns: range, device: torch.device) -> NarrowWeight | None:
        """Return a part of the weight in 4 bits, or None if kernels cannot read its groups. The whole weight is read
        for that.

        Raises:
            SplitGroups: the columns are not whole groups, or not in order.
        """
        numbers, zeros, scales, groups = self._unpacked(device)
        size, num_inputs = self.shape[1] // len(scales), self.shape[1]
        if not can_be_read_by_groups(size if len(scales) > 1 else len(columns)):
            return None
        outputs, order = slice(rows.start, rows.stop), None
        if not torch.equal(groups, torch.arange(num_inputs, device=device) // size):
            if len(columns) < num_inputs:
                raise SplitGroups(f"{name}: inputs that share a scale are not next to each other (act-order)")
            order = torch.argsort(groups, stable=True)
            if not torch.equal(groups[order], torch.arange(num_inputs, device=device) // size):
                return None
            numbers = numbers[order]
        own = slice(None)
        if len(scales) > 1:
            check_whole_groups(name, columns, size, num_inputs)
            own = slice(columns.start // size, columns.stop // size)
        else:
            size = len(columns)
        values = packed(numbers[columns.start : columns.stop, outputs].t(), step_of(size))
        zeros = zeros[own, outputs].to(torch.uint8).contiguous()
        return NarrowWeight(values, scales[own, outputs].contiguous(), zeros, size, order)

    def _unpacked(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Read and unpack the numbers (I, O), zeros and scales (I / G, O), and groups (I,)."""
        places = _AWQ_PLACES if self.packing.method == "awq" else _IN_ORDER
        stored = {name: each.whole().to(device) for name, each in self.parts.items()}
        if self.packing.method == "awq":
            numbers = _unpacked(stored["qweight"], places)
        else:
            numbers = _unpacked(stored["qweight"].t(), places).t()
        zeros = _unpacked(stored["qzeros"], places) + self.packing.zero_offset
        groups = stored.get("g_idx")
        if groups is None:
            groups = torch.arange(self.shape[1], device=device) // (self.shape[1] // len(stored["scales"]))
        return numbers, zeros, stored["scales"], groups.long()

    def sample(self, count: int) -> torch.Tensor:
        """Return some of its numbers, float32, that distinguish it from other weights: at most `count` of each part."""
        some = [each.pick(range(0, each.size, 1 + each.size // count)).double() for each in self.parts.values()]
        return torch.cat(some).float()


def find_packed(stored: Mapping[str, StoredTensor], packing: Packing) -> tuple[dict[str, PackedWeight], list[str]]:
    """Find packed weights. Returns them by the names that they would have as plain weights, and a list of what is wrong
    with them."""
    found, problems = {}, []
    for name in stored:
        layer, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        parts = {part: stored[f"{layer}.{part}"] for part in _PARTS if f"{layer}.{part}" in stored}
        problem = _problem(parts, packing)
        if problem:
            problems.append(f"{layer}: {problem}")
        else:
            found[f"{layer}.weight"] = PackedWeight(_shape(parts["qweight"], packing), parts, packing)
    return found, problems


def without_parts(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the stored tensors that do not belong to a packed weight."""
    layers = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    parts = {f"{layer}.{part}" for layer in layers for part in _PARTS}
    return {name: each for name, each in stored.items() if name not in parts}


def empty_biases(stored: Mapping[str, StoredTensor], packed: Mapping[str, PackedWeight]) -> set[str]:
    """Return the names of biases that are zero. Older exporters of GPTQ write one for each packed weight of any
    model."""
    names = (name for name in stored if name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in packed)
    return {name for name in names if stored[name].dtype in DTYPES and not stored[name].whole().any()}


def _shape(qweight: StoredTensor, packing: Packing) -> tuple[int, int]:
    first, second = qweight.shape
    return (8 * second, first) if packing.method == "awq" else (second, 8 * first)


def _problem(parts: Mapping[str, StoredTensor], packing: Packing) -> str:
    needed = ("qweight", "qzeros", "scales", *(() if packing.is_ordered else ("g_idx",)))
    if missing := [name for name in needed if name not in parts]:
        return f"{missing[0]} is missing"
    if wrong := [name for name, part in parts.items() if name != "scales" and part.dtype != "I32"]:
        return f"{wrong[0]} has dtype {parts[wrong[0]].dtype}, expected I32"
    if parts["scales"].dtype not in DTYPES or len(parts["qweight"].shape) != 2:
        return f"scales of dtype {parts['scales'].dtype} for numbers of shape {parts['qweight'].shape}"
    outputs, inputs = _shape(parts["qweight"], packing)
    size = inputs if packing.group_size == -1 else packing.group_size
    if inputs % size or outputs % 8:
        return f"{inputs} inputs and {outputs} outputs are not whole groups of {size}, and of 8"
    expected = {"qzeros": (inputs // size, outputs // 8), "scales": (inputs // size, outputs), "g_idx": (inputs,)}
    for name, shape in expected.items():
        if name in parts and parts[name].shape != shape:
            return f"{name} has shape {parts[name].shape}, expected {shape}"
    if "g_idx" in parts and (groups := parts["g_idx"].whole()).numel():
        least, most = int(groups.min()), int(groups.max())
        if least < 0 or most >= inputs // size:
            return f"g_idx has groups {least} to {most}, there are {inputs // size}"
    return ""


def _unpacked(packed: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    """Unpack int32 words (N, M) into numbers from 0 to 15, (N, 8 M) int32."""
    shifts = torch.tensor(places, dtype=torch.int32, device=packed.device) * 4
    return ((packed[:, :, None] >> shifts) & 15).flatten(1)

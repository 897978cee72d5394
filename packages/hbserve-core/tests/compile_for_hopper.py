"""Compiles the launches of hbserve_core/cuda_runner/kernels for sm_90, without a GPU; a process of
test_kernel_compilation.py.

Our own functions launch, with tensors that have no memory (torch's "meta"), on a device that is not there: what would
be loaded onto it is measured instead. So signatures, sizes and options are those of real launches. Prints JSON:
`kernels`, a list, and `failures`, messages by case.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from hbserve_testing.narrowing import present

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
PROCESSORS = 132
BLOCK_SIZE = 16
LAYER = ("qkv", "output", "gate_up", "down")
# hidden_size, intermediate_size, heads, key heads, head_dim, vocab_size, layers, whether heads are normed
MODELS = {
    "Qwen3-0.6B": (1024, 3072, 16, 8, 128, 151936, 28, True),
    "Qwen3-8B": (4096, 12288, 32, 8, 128, 151936, 36, True),
    "SmolLM2-135M": (576, 1536, 9, 3, 64, 49152, 30, False),
}


class AbsentHopper(DriverBase):
    """Takes launches, and does nothing but look at what it is to load. `loaded`: of the case that runs."""

    def __init__(self):
        self.loaded = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024}, load_binary=self._load,
            unload_module=lambda module: None,
        )  # fmt: skip

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError("launches are not built")

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError("nothing runs")

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        """What Triton calls before it loads a kernel; gives what it calls to launch it."""
        self._metadata = metadata
        return lambda *arguments: None

    def _load(self, name, binary, shared, device):
        self.loaded.append(
            {"kernel": name, "warps": self._metadata.num_warps, "shared": shared, "pdl": self._metadata.launch_pdl}
            | resources(binary)
        )
        return "module", "function", 0, 0, 1024


def resources(binary):
    """Registers, and bytes of stack, of each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    registers, stack = present(re.search(r"REG:(\d+) STACK:(\d+)", said)).groups()
    return {"registers": int(registers), "stack": int(stack)}


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape):
    return empty(*shape, dtype=torch.int32)


@triton.jit
def _of_two_types(out, count):
    """What Triton refuses and its interpreter does not see."""
    number = tl.load(out)
    if count > 0:
        number = tl.full((), 1, tl.float32)
    tl.store(out, number)


# ---- launches --------------------------------------------------------------------------------------------------------


def attention_arguments(model, dtype, rows, narrow):
    """qkv, out, pool, layer, cos_sin and norm, of so many rows. narrow: the pool is of 8-bit floats."""
    _, _, heads, key_heads, head_dim, _, layers, has_norm = MODELS[model]
    qkv = empty(rows, (heads + 2 * key_heads) * head_dim, dtype=dtype)
    out = empty(rows, heads * head_dim, dtype=dtype)
    pool = empty(64, layers, 2, BLOCK_SIZE, key_heads, head_dim, dtype=FP8 if narrow else dtype)
    norm = (empty(heads + key_heads, head_dim, dtype=dtype), 1e-6) if has_norm else None
    return qkv, out, pool, 1, empty(4096, head_dim, dtype=F32), norm


def decode(model, pieces, dtype=BF16, narrow=False, **scores):
    from hbserve_core.cuda_runner.kernels.decode_attention import DecodeWorkspace, decode_attention

    _, _, heads, key_heads, head_dim, *_ = MODELS[model]
    workspace = DecodeWorkspace(64, pieces, (heads, key_heads, head_dim), torch.device("meta"))
    paged = ints(64 * 256), ints(1), ints(6, pieces)
    arguments = *attention_arguments(model, dtype, 64, narrow), *paged, workspace
    decode_attention(*arguments, scores=made(scores))


def made(scores):
    from hbserve_core.cuda_runner.kernels.attention_parts import Scores

    return Scores(0.1, **scores) if scores else None


def prefill(model, dtype=BF16, narrow=False, rows=2048, **scores):
    from hbserve_core.cuda_runner.kernels.prefill_attention import prefill_attention, store_kv

    qkv, out, pool, layer, cos_sin, norm = attention_arguments(model, dtype, rows, narrow)
    store_kv(qkv, ints(rows), ints(rows), cos_sin, norm, pool, layer, scores=made(scores))
    paged = ints(64 * 256), ints(1), ints(2, 48), ints(3, 32)
    prefill_attention(qkv, out, pool, layer, cos_sin, norm, *paged, scores=made(scores))


def products(model, rows, *names, dtype=BF16):
    """Those of a step that are not cuBLAS's, as CudaProducts computes them."""
    hidden, inner, heads, key_heads, head_dim, vocabulary, *_ = MODELS[model]
    launches = {
        "qkv": partial(product, (heads + 2 * key_heads) * head_dim, hidden, reads_norm=True),
        "output": partial(product, hidden, heads * head_dim, adds=True),
        "gate_up": partial(product, 2 * inner, hidden, reads_norm=True, gated=True),
        "down": partial(product, hidden, inner, adds=True),
        "head": partial(product, vocabulary, hidden, reads_norm=True),
    }
    for name in names:
        launches[name](rows, dtype)


def product(outputs, inputs, rows, dtype, reads_norm=False, adds=False, gated=False):
    from hbserve_core.cuda_runner.kernels.few_rows_linear import (
        ScaledRows,
        SkinnyWorkspace,
        add_skinny_linear,
        num_tiles,
        skinny_linear,
        small_linear,
    )
    from hbserve_core.cuda_runner.products import Kind, choose

    kind: Kind = "gated" if gated else "normed" if reads_norm else "plain"
    choice = choose(rows, (outputs, inputs), dtype.itemsize, kind, PROCESSORS)
    x, weight, norm = empty(rows, inputs, dtype=dtype), empty(outputs, inputs, dtype=dtype), empty(inputs, dtype=dtype)
    target = empty(rows, outputs, dtype=dtype) if adds else None
    if choice.kernel == "small":
        small_linear(x, weight, norm=(norm, 1e-6) if reads_norm else None, add_to=target, gated=gated)
    elif choice.kernel == "skinny":
        tiling: dict[str, Any] = {"padded_rows": choice.padded_rows, "splits": choice.splits}
        tiling["workspace"] = SkinnyWorkspace(PROCESSORS, 64, torch.device("meta"))
        if target is not None:
            add_skinny_linear(target, x, weight, next_norm=empty(outputs, dtype=dtype), **tiling)
        else:
            squares = empty(num_tiles(inputs, False), choice.padded_rows, dtype=F32)
            skinny_linear(ScaledRows(x, squares) if reads_norm else x, weight, eps=1e-6, gated=gated, **tiling)


def gated():
    from hbserve_core.cuda_runner.kernels.hopper_gated import hopper_gated

    hidden, inner, *_ = MODELS["Qwen3-8B"]
    hopper_gated(empty(2048, hidden), empty(2 * inner, hidden))


NARROW = {"8 bits": 8, "4 bits": 4}


def narrow_matrix(kind, outputs, inputs):
    from hbserve_core.cuda_runner.kernels.narrow_linear import NarrowMatrix
    from hbserve_core.model.narrow_weight import NarrowWeight

    group, groups = 128, inputs // 128
    if NARROW[kind] == 8:
        words = empty(outputs, inputs // 2, dtype=torch.int16)
        weight = NarrowWeight(words, empty(groups, outputs, dtype=F32), None, group)
    else:
        scales, zeros = empty(groups, outputs, dtype=torch.float16), empty(groups, outputs, dtype=torch.uint8)
        weight = NarrowWeight(empty(outputs, inputs // 4, dtype=torch.int16), scales, zeros, group)
    return NarrowMatrix(weight)


def narrow_products(kind, rows):
    """Of Qwen3-8B, skinny: of one row, gates and ups of a norm that has begun; of more, down and the norm behind it."""
    from hbserve_core.cuda_runner.kernels.few_rows_linear import (
        ScaledRows,
        SkinnyWorkspace,
        add_skinny_linear,
        num_tiles,
        skinny_linear,
    )

    hidden, inner, *_ = MODELS["Qwen3-8B"]
    padded = max(16, 1 << (rows - 1).bit_length())
    tiling: dict[str, Any] = {"padded_rows": padded, "workspace": SkinnyWorkspace(PROCESSORS, 64, torch.device("meta"))}
    if rows == 1:
        begun = ScaledRows(empty(rows, hidden), empty(num_tiles(hidden, False), padded, dtype=F32))
        skinny_linear(begun, narrow_matrix(kind, 2 * inner, hidden), gated=True, splits=1, eps=1e-6, **tiling)
    else:
        target, down = empty(rows, hidden), narrow_matrix(kind, hidden, inner)
        add_skinny_linear(target, empty(rows, inner), down, next_norm=empty(hidden), splits=2, **tiling)


def many_narrow_rows(kind):
    """In tiles, of 8-bit rows as well; norms that leave such; and the widening of weights."""
    from hbserve_core.cuda_runner.kernels.eight_bit_rows import EightBitForm
    from hbserve_core.cuda_runner.kernels.experts import ExpertParts
    from hbserve_core.cuda_runner.kernels.narrow_linear import eight_bit_linear, tiled_linear, widen

    hidden, inner, *_ = MODELS["Qwen3-8B"]
    matrix = narrow_matrix(kind, hidden, inner)
    tiled_linear(empty(256, inner), matrix, None, empty(256, hidden), adds=True)
    widen(matrix, BF16)
    if matrix.takes_8_bits():
        eight_bit_linear(empty(256, inner), matrix, None, empty(256, hidden), adds=True)
        parts = ExpertParts(empty(256 * 8, hidden), ints(256, 8), 0, 128)
        EightBitForm(matrix.group, matrix.run).of_normed(empty(256, hidden), empty(hidden), 1e-6, parts)


def others(dtype):
    """A step's beginning and end, and what stands beside products of cuBLAS."""
    from hbserve_core.cuda_runner.kernels.pointwise import embed, gate_mul, host_copy, rms_norm
    from hbserve_core.cuda_runner.kernels.sampling import sample

    hidden, inner, *_, vocabulary, _, _ = MODELS["Qwen3-0.6B"]
    host_copy(ints(2048), ints(2048))
    embed(ints(128), ints(128), ints(128), empty(vocabulary, hidden, dtype=dtype))
    rms_norm(empty(128, hidden, dtype=dtype), empty(hidden, dtype=dtype), 1e-6)
    gate_mul(empty(128, 2 * inner, dtype=dtype))
    gate_mul(empty(128, 2 * inner, dtype=dtype), gelu=True)
    sample(empty(128, vocabulary, dtype=dtype), ints(6, 128), ints(128))


def experts(rows, dtype=BF16):
    """Qwen3-30B-A3B's."""
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts

    gate_up, down = empty(128, 2 * 768, 2048, dtype=dtype), empty(128, 2048, 768, dtype=dtype)
    routing = Routing(128, 8, True)
    given, logits = empty(rows, 2048, dtype=dtype), empty(rows, 128, dtype=dtype)
    combined(expert_parts(given, logits, ints(rows), gate_up, down, routing), dtype=dtype)


def experts_of_one_row(dtype, begun):
    from hbserve_core.cuda_runner.kernels.experts import Routing
    from hbserve_core.cuda_runner.kernels.few_experts import few_expert_mlps
    from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows

    gate_up, down = empty(128, 2 * 768, 2048, dtype=dtype), empty(128, 2048, 768, dtype=dtype)
    rows = empty(1, 2048, dtype=dtype)
    given = ScaledRows(rows, empty(32, 16, dtype=F32)) if begun else rows
    logits, add_to = empty(1, 128, dtype=dtype), empty(1, 2048, dtype=dtype) if begun else None
    few_expert_mlps(given, logits, ints(1), gate_up, down, Routing(128, 8, True), eps=1e-6, add_to=add_to)


def narrow_experts(kind, rows):
    from hbserve_core.cuda_runner.kernels import narrow_experts as kernels
    from hbserve_core.cuda_runner.kernels.experts import Routing, combined, expert_parts
    from hbserve_core.cuda_runner.kernels.narrow_experts import NarrowExperts

    # Scales that are nowhere cannot be looked at.
    kernels.has_blocks = lambda matrix, outputs: matrix.takes_8_bits()
    gate_up, down = (NarrowExperts(narrow_matrix(kind, *each), 128) for each in ((128 * 1536, 2048), (128 * 2048, 768)))
    parts = expert_parts(empty(rows, 2048), empty(rows, 128), ints(rows), gate_up, down, Routing(128, 8, True))
    combined(parts, dtype=BF16)


def few_experts(kind):
    from hbserve_core.cuda_runner.kernels import narrow_experts as kernels
    from hbserve_core.cuda_runner.kernels.experts import Routing
    from hbserve_core.cuda_runner.kernels.few_rows_linear import ScaledRows
    from hbserve_core.cuda_runner.kernels.narrow_experts import NarrowExperts

    kernels.has_blocks = lambda matrix, outputs: matrix.takes_8_bits()
    gate_up, down = (NarrowExperts(narrow_matrix(kind, *each), 128) for each in ((128 * 1536, 2048), (128 * 2048, 768)))
    begun, routing = ScaledRows(empty(1, 2048), empty(128, 16, dtype=F32)), Routing(128, 8, True)
    gate_up.few_mlps(
        begun, empty(1, 128), ints(1), down, routing, eps=1e-6, add_to=empty(1, 2048), next_norm=empty(2048)
    )


def sums(dtype, ranks, **how):
    """Of few rows and of many, and of what experts have found."""
    from hbserve_core.cuda_runner.kernels.experts import ExpertParts
    from hbserve_core.cuda_runner.kernels.rank_sum import MOST_PROGRAMS, SharedMemory, rank_sum

    shared = empty(ranks, dtype=torch.int64), ints(MOST_PROGRAMS), ints(1), ints(1)
    memory = SharedMemory(ranks - 1, ranks, *shared, few_bytes=1 << 20, many_bytes=32 << 20)
    rank_sum(empty(8, 4096, dtype=dtype), memory, **how)
    rank_sum(empty(8, 4096, dtype=dtype), memory, start=memory.many_start, **how)
    parts = ExpertParts(empty(8 * 8, 4096, dtype=F32), ints(8, 8), 0, 128)
    rank_sum(empty(8, 4096, dtype=dtype), memory, parts=parts, **how)


CASES: dict[str, Callable[[], object]] = {
    "experts 1": partial(experts, 1),
    "experts 2048": partial(experts, 2048),
    "experts 16384": partial(experts, 16384),
    "float32 experts": partial(experts, 8, F32),
    "few experts": partial(experts_of_one_row, BF16, True),
    "float32 few experts": partial(experts_of_one_row, F32, False),
    **{f"narrow {kind} {rows}": partial(narrow_products, kind, rows) for kind in NARROW for rows in (1, 8, 64, 128)},
    **{
        f"narrow experts {kind} {rows}": partial(narrow_experts, kind, rows)
        for kind in NARROW
        for rows in (1, 256, 512, 2048)
    },
    **{f"narrow few experts {kind}": partial(few_experts, kind) for kind in NARROW},
    **{f"many narrow {kind}": partial(many_narrow_rows, kind) for kind in NARROW},
    "sums that are added and normed": partial(sums, BF16, 2, add_to=empty(8, 4096), norm=(empty(4096), 1e-6)),
    "float32 sums": partial(sums, F32, 4),
    "two types": lambda: _of_two_types[(1,)](ints(1), 2),
    # Meta tensors count as being on 4 processors: up to 12 programs are few.
    "decode few Qwen3-0.6B": partial(decode, "Qwen3-0.6B", 1),
    "decode many Qwen3-0.6B": partial(decode, "Qwen3-0.6B", 2),
    "decode many Qwen3-8B": partial(decode, "Qwen3-8B", 2),
    "decode few SmolLM2-135M": partial(decode, "SmolLM2-135M", 1),
    "float32 decode": partial(decode, "SmolLM2-135M", 5, F32),
    "8-bit KV: decode": partial(decode, "Qwen3-8B", 2, narrow=True, key_scale=0.5),
    "8-bit KV: prefill": partial(prefill, "Qwen3-8B", narrow=True, value_scale=0.5),
    "prefill Qwen3-0.6B": partial(prefill, "Qwen3-0.6B"),
    "prefill Qwen3-8B in parts of tiles": partial(prefill, "Qwen3-8B", rows=128),
    "prefill SmolLM2-135M, window, cap": partial(prefill, "SmolLM2-135M", window=1024, cap=50.0),
    "float32 prefill": partial(prefill, "SmolLM2-135M", F32),
    "window, cap: decode": partial(decode, "SmolLM2-135M", 5, window=1024, cap=50.0),
    "products 1 Qwen3-0.6B": partial(products, "Qwen3-0.6B", 1, *LAYER, "head"),
    "products 4 Qwen3-0.6B": partial(products, "Qwen3-0.6B", 4, "output", "down"),
    "products 1 Qwen3-8B": partial(products, "Qwen3-8B", 1, *LAYER, "head"),
    "products 64 Qwen3-8B": partial(products, "Qwen3-8B", 64, "gate_up", "down"),
    "products 128 Qwen3-8B": partial(products, "Qwen3-8B", 128, "qkv", "gate_up"),
    "products 2048 Qwen3-8B": gated,
    "float32 products": partial(products, "SmolLM2-135M", 1, *LAYER, dtype=F32),
    "others": partial(others, BF16),
    "float32 others": partial(others, F32),
}


def main():
    hopper = AbsentHopper()
    triton.runtime.driver.set_active(hopper)
    # The kernels ask once, when they are imported, whether they may start each other.
    torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda device=None: (9, 0)
    kernels, failures = [], {}
    for case, launch in CASES.items():
        try:
            launch()
        except Exception as error:
            failures[case] = f"{type(error).__name__}: {error}"
        kernels += [{"case": case} | each for each in hopper.loaded]
        hopper.loaded.clear()
    json.dump({"kernels": kernels, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main()

"""Every Triton kernel compiles for Hopper, and those of a decode step stay in registers. No GPU is needed.

The other tests run kernels in Triton's interpreter where there is no GPU, and that sees no types: a variable that gets
another type in a branch, or a mask of integers, is found here. See compile_for_hopper.py for how. What the compiler
makes of a kernel depends on its version. Bounds here hold for the lock's, 3.9, and for 3.6, compiled in the same way;
what 3.6 gave on the card that docs/performance-kernels.md tells of was the same, as far as it was looked at: decode
attention.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hbserve_core

triton = pytest.importorskip("triton", reason="torch has Triton on Linux only")

KERNELS = Path(hbserve_core.__file__).parent / "cuda_runner" / "kernels"
COMPILE = Path(__file__).with_name("compile_for_hopper.py")
SHARED_MEMORY = 228 * 1024
"""Bytes of a processor, of which each program takes 1024 more than it asks for."""
PROGRAMS = 4


@pytest.fixture(scope="module")
def compiled():
    for tool in ("ptxas", "cuobjdump"):
        try:
            _ = getattr(triton.knobs.nvidia, tool).path
        except RuntimeError as error:
            pytest.skip(f"this Triton has no {tool}: {error}")
    # What Triton has compiled before it finds in its own folder, by its version, sources, options and target.
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}
    done = subprocess.run([sys.executable, COMPILE], env=settings, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of_cases(compiled, beginning):
    found = [kernel for kernel in compiled["kernels"] if kernel["case"].startswith(beginning)]
    assert found
    return found


def test_every_launch_compiles_and_fits_a_processor(compiled):
    failures = {case: message for case, message in compiled["failures"].items() if case != "two types"}
    assert failures == {}


def test_a_variable_of_two_types_does_not_compile(compiled):
    assert "redefines it as fp32" in compiled["failures"]["two types"]


def test_every_kernel_that_is_launched_anywhere_is_compiled(compiled):
    launched = {
        node.func.value.id
        for source in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and isinstance(node.func.value, ast.Name)
    }
    assert len(launched) > 5
    assert {kernel["kernel"] for kernel in compiled["kernels"]} == launched


def test_what_is_compiled_is_what_hopper_runs_kernels_that_start_early(compiled):
    assert {kernel["kernel"] for kernel in compiled["kernels"] if not kernel["pdl"]} == {"_host_copy"}


def test_four_programs_of_decode_attention_share_a_processor_where_there_are_many(compiled):
    for kernel in of_cases(compiled, "decode many"):
        assert kernel["shared"] <= SHARED_MEMORY // PROGRAMS - 1024


def test_decode_attention_has_two_warps_so_that_four_programs_may_have_all_registers(compiled):
    assert {kernel["warps"] for kernel in of_cases(compiled, "decode")} == {2}


@pytest.mark.parametrize(
    ("beginning", "most_bytes"),
    [
        ("decode many", 40),  # 32, and all 255 registers, by Triton 3.9
        ("products", 0),
        ("narrow", 8),  # none but 8 of a product of 8 rows in 8 bits, by Triton 3.9
        ("many narrow", 0),
        ("decode few", 40),  # none, and 211 registers, by Triton 3.6; 24, and all 255 registers, by 3.9
        ("prefill", 320),  # may have 128 registers: 32 by Triton 3.6, 312 by 3.9
    ],
)
def test_what_steps_in_16_bits_run_leaves_few_bytes_outside_its_registers(compiled, beginning, most_bytes):
    assert [kernel for kernel in of_cases(compiled, beginning) if kernel["stack"] > most_bytes] == []


def test_all_kinds_of_product_are_among_them(compiled):
    assert {kernel["kernel"] for kernel in of_cases(compiled, "products")} == {
        "_small_linear",
        "_skinny_linear",
        "_hopper_gated",
    }

"""Compiles the kernel that copies blocks for sm_90, without a GPU: a process of test_block_copy.py, where Triton
interprets. Prints how many bytes a thread loads at once."""

import re
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hbserve_kv.memory.block_copy import _copy

NUMBERS = ("num_units", "num_pieces", "num_chunks", "source_ratio", "target_ratio")


def widest_load(word: str, aligned: int) -> int:
    signature = {"source": word, "target": word, "pieces": "*i64", "units": "*i64"} | dict.fromkeys(NUMBERS, "i32")
    constants = {"PIECE": 7, "ALIGNED": aligned, "WORDS": 4096}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    values = {(list(signature).index(name),): value for name, value in constants.items()}
    source = ASTSource(_copy, signature, values, attributes)
    made = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": 8})
    loads = re.findall(r"ld\.global(?:\.v(\d))?\.b(\d+)", made.asm["ptx"])
    return max(int(count or 1) * int(bits) // 8 for count, bits in loads)


def main() -> None:
    sys.stdout.write(f"compiled: {widest_load('*i64', 2)} {widest_load('*i64', 1)} {widest_load('*u8', 1)}\n")


if __name__ == "__main__":
    main()

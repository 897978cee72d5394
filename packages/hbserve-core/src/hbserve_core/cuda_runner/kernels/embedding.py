"""The step's first kernel: token ids, some of them known to the device only, to rows of the embedding table.

Shapes: T rows of one step, E hidden_size.
"""

import torch
import triton
import triton.language as tl

from hbserve_core.cuda_runner.kernels.dependent_launch import LAUNCH, begin_step


@triton.jit
def _embed(ids, sources, sampled, table, first, num_tokens, out, SIZE: tl.constexpr, PADDED: tl.constexpr):
    begin_step()
    row = tl.program_id(0)
    source = tl.load(sources + row)
    token = tl.load(ids + row)
    if source >= 0:
        token = tl.load(sampled + source)
    token -= first
    columns = tl.arange(0, PADDED)
    size = tl.where((token >= 0) & (token < num_tokens), SIZE, 0)
    values = tl.load(table + token.to(tl.int64) * SIZE + columns, mask=columns < size, other=0.0)
    tl.store(out + row.to(tl.int64) * SIZE + columns, values, mask=columns < SIZE)


def embed(
    ids: torch.Tensor, sources: torch.Tensor, sampled: torch.Tensor, table: torch.Tensor, first_token: int = 0
) -> torch.Tensor:
    """(T, E) rows of `table` (V, E), which holds tokens from `first_token` on; zeros for others.

    ids, sources: (T,) int32. Row t is token ids[t], or, where sources[t] is not negative, sampled[sources[t]]: what the
    step before has sampled, and nobody has read yet. sampled: (R,) int32.
    """
    size = table.shape[1]
    out = torch.empty((len(ids), size), dtype=table.dtype, device=table.device)
    _embed[(len(ids),)](
        ids, sources, sampled, table, first_token, len(table), out, size, triton.next_power_of_2(size), num_warps=4,
        **LAUNCH,
    )  # fmt: skip
    return out

"""vLLM's KV caches as a pool of blocks, whose dimensions are known by their shapes.

Attention backends of vLLM 0.24 have 5 dimensions: [2, blocks, tokens, heads, dim] or [blocks, 2, tokens, heads, dim].
All backends of later versions have 4: [blocks, heads, tokens, content], where the content of a token is its key and its
value. Latents (MLA) have 3: [blocks, tokens, content]. Strides may be any: both versions permute what lies in memory
(NHD, HND, blocks outermost).
"""

from collections.abc import Mapping, Sequence

import torch

from hbserve_kv.memory.pool_layout import PoolLayout

BY_BLOCKS_FIRST = {3: "blocks tokens dim", 4: "blocks heads tokens key+value", 5: "blocks kv tokens heads dim"}


def axes_of(shape: Sequence[int], num_blocks: int) -> str:
    """Return the names of the dimensions, for a PoolLayout.

    Raises:
        ValueError: the shape is unknown.
    """
    is_first = shape[0] % num_blocks == 0
    if len(shape) in BY_BLOCKS_FIRST and is_first and (len(shape) < 5 or shape[1] == 2):
        return BY_BLOCKS_FIRST[len(shape)]
    if len(shape) == 5 and shape[0] == 2 and shape[1] % num_blocks == 0:
        return "kv blocks tokens heads dim"
    raise ValueError(
        f"a KV cache of shape {tuple(shape)} for {num_blocks} blocks: HBServeConnector does not know its dimensions; "
        "use another attention backend (--attention-backend)"
    )


def pool_of(caches: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[PoolLayout, int]:
    """Return the pool, and how many of its blocks make one of vLLM's: kernels may want smaller blocks.

    Raises:
        ValueError: the tensors have an unknown shape, or they differ.
    """
    tensors = list({tensor.data_ptr(): tensor for tensor in caches.values()}.values())  # layers may share a tensor
    kinds = {axes_of(tensor.shape, num_blocks) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"KV caches of several kinds: {sorted(kinds)}; HBServeConnector moves one kind")
    (axes,) = kinds
    return PoolLayout(tensors, axes), tensors[0].shape[axes.split().index("blocks")] // num_blocks

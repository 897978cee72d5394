"""vLLM's KV caches, as a pool of blocks: what the dimensions of its tensors are.

Shapes, by the number of dimensions: [2, blocks, tokens, heads, dim] or [blocks, 2, tokens, heads, dim], of attention
backends of vLLM 0.24; [blocks, heads, tokens, content], of all backends of later versions, where the content of a token
is its key and its value; [blocks, tokens, content], of latents (MLA). Strides may be any: both versions permute what
lies in memory (NHD, HND, blocks outermost).
"""

from collections.abc import Mapping, Sequence

import torch

BY_BLOCKS_FIRST = {3: "blocks tokens dim", 4: "blocks heads tokens dim", 5: "blocks kv tokens heads dim"}


def axes_of(shape: Sequence[int], num_blocks: int) -> str:
    """Names of the dimensions, for a PoolLayout.

    Raises:
        ValueError: nobody knows such a shape.
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


def pool_of(caches: Mapping[str, torch.Tensor], num_blocks: int) -> tuple[torch.Tensor, str, int]:
    """The pool, the names of the caches' dimensions, and how many blocks of the pool are one of vLLM's: kernels may
    want smaller ones.

    Raises:
        ValueError: nobody knows such tensors, they differ, or a block's layers do not lie together.
    """
    tensors = list({tensor.data_ptr(): tensor for tensor in caches.values()}.values())  # layers may share one
    kinds = {axes_of(tensor.shape, num_blocks) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"KV caches of several kinds: {sorted(kinds)}; HBServeConnector moves one kind")
    (axes,) = kinds
    where = axes.split().index("blocks")
    size, first = tensors[0].shape[where], min(tensors, key=lambda tensor: tensor.data_ptr())
    block_bytes = sum(tensor.nbytes // size for tensor in tensors)
    ends = {tensor.data_ptr() - first.data_ptr() + tensor.nbytes // size for tensor in tensors}
    strides = {tensor.stride(where) * tensor.element_size() for tensor in tensors}
    if strides != {block_bytes} or max(ends) > block_bytes:
        raise ValueError("the layers of a block do not lie together")
    storage = torch.empty(0, dtype=torch.uint8, device=first.device).set_(first.untyped_storage())
    offset = first.storage_offset() * first.element_size()
    return storage.as_strided((size, block_bytes), (block_bytes, 1), offset), axes, size // num_blocks

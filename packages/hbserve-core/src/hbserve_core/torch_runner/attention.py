"""Attention over the paged pool in plain torch, which runs everywhere.

Shapes: T tokens of one step, S sequences of one group, Q new tokens of each, C context tokens (the new ones included),
N heads of queries, K heads of keys and values, G = N / K queries per key head, D head_dim.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F

from hbserve_core.engine.sequence import ScheduledChunk
from hbserve_core.model.model_config import ModelConfig

# Sequences with different contexts share a call if padding makes it no more than this much larger and their gathered
# keys and values are no larger than this. Splitting costs nothing above 1 MiB.
_MOST_PADDING = 1.25
_MOST_GATHERED_BYTES = 16 << 20


class TorchAttention:
    """Attention that gathers the blocks of each sequence and calls torch's attention.

    A sequence only reads its own blocks, and a step clears the part of a new block that it leaves unwritten. So nothing
    that other requests left in a block, even infinities, can reach the sequence, although masked positions take part in
    products.
    """

    def __init__(
        self, pool: torch.Tensor, model: ModelConfig, dtype: torch.dtype, kv_scales: Sequence[tuple[float, float]]
    ) -> None:
        """model: configuration with the sizes of this rank's part. dtype: dtype of queries. kv_scales: see
        `LayerWeights`."""
        self._is_narrow = pool.dtype != dtype
        # torch only gathers and scatters 8-bit floats as bytes.
        self._pool = pool.view(torch.uint8) if self._is_narrow else pool
        self._model = model
        self._reach = model.reach
        self._kv_scales = kv_scales
        self._workspace = torch.empty(0, dtype=self._pool.dtype, device=pool.device)
        self._wide = torch.empty(0, dtype=dtype, device=pool.device)
        """Numbers of the workspace in the dtype of queries, for a pool of 8-bit floats."""

    def plan(self, chunks: Sequence[ScheduledChunk]) -> "AttentionPlan":
        """Plan a step that computes `chunks`, whose tokens follow one another in this order.

        Chunks must be sorted by number of new tokens, so that decodes come first and equal ones are adjacent.
        """
        self._clear_unwritten_slots(chunks)
        block_elements = self._pool[0, 0].numel()
        most_blocks = _MOST_GATHERED_BYTES // (block_elements * self._pool.dtype.itemsize)
        groups = list(_groups(chunks, self._pool.shape[3], self._reach, most_blocks))
        elements = max(group.num_sequences * group.num_blocks for group in groups) * block_elements
        if self._workspace.numel() < elements:
            self._workspace = torch.empty(elements, dtype=self._pool.dtype, device=self._pool.device)
            self._wide = self._wide.new_empty(elements) if self._is_narrow else self._workspace
        return AttentionPlan(self._pool, self._model, (self._workspace, self._wide), self._kv_scales, chunks, groups)

    def _clear_unwritten_slots(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Clear the parts that a step leaves unwritten of the blocks that it begins: at most the last block of each
        sequence."""
        block_size = self._pool.shape[3]
        for chunk in chunks:
            computed = chunk.sequence.num_computed_tokens
            last_block, used = divmod(computed + chunk.num_new_tokens, block_size)
            if used and computed <= last_block * block_size:
                self._pool[chunk.sequence.block_table[last_block], :, :, used:].zero_()


@dataclass(frozen=True, slots=True)
class _Group:
    """Adjacent chunks that one call computes, with the same number of new tokens and a similar number of context
    tokens."""

    first_token: int
    """Row of the group's first token among the step's tokens."""
    num_new_tokens: int
    contexts: list[int]
    """Number of context tokens of each sequence, including the new ones, from the first block that a layer sees."""
    block_tables: list[list[int]]
    """Blocks of that context, for each sequence."""
    num_blocks: int
    """Number of blocks of the longest context. The others are padded to it with their own first block."""

    @property
    def num_sequences(self) -> int:
        return len(self.contexts)


def _groups(chunks: Sequence[ScheduledChunk], block_size: int, reach: int, most_blocks: int) -> Iterator[_Group]:
    first_token = 0
    for num_new, same in groupby(chunks, key=lambda chunk: chunk.num_new_tokens):
        for members in _split(same, block_size, reach, most_blocks):
            firsts = [_first_block(member, block_size, reach) for member in members]
            contexts = [
                member.sequence.num_computed_tokens + num_new - first * block_size
                for member, first in zip(members, firsts, strict=True)
            ]
            num_blocks = -(-max(contexts) // block_size)
            # Tables extend beyond the context. Their last blocks are not written yet, and may hold anything.
            tables = [
                list(member.sequence.block_table[first : first - (-context // block_size)])
                for member, first, context in zip(members, firsts, contexts, strict=True)
            ]
            yield _Group(first_token, num_new, contexts, tables, num_blocks)
            first_token += num_new * len(members)


def _first_block(chunk: ScheduledChunk, block_size: int, reach: int) -> int:
    """Return the place of the first block that a layer sees from the chunk's first token."""
    return max(0, chunk.first + 1 - reach) // block_size if reach else 0


def _split(
    chunks: Iterable[ScheduledChunk], block_size: int, reach: int, most_blocks: int
) -> Iterator[list[ScheduledChunk]]:
    """Divide a run of chunks, in order, so that each group, padded to its longest, is small and mostly not padding."""
    piece: list[ScheduledChunk] = []
    longest = total = 0
    for chunk in chunks:
        end = chunk.first + chunk.num_new_tokens
        blocks = -(-end // block_size) - _first_block(chunk, block_size, reach)
        padded = max(longest, blocks) * (len(piece) + 1)
        # A few blocks of padding take less time than another call.
        if piece and (padded > most_blocks or padded > _MOST_PADDING * (total + blocks) + 8):
            yield piece
            piece, longest, total = [], 0, 0
        piece.append(chunk)
        longest, total = max(longest, blocks), total + blocks
    yield piece


class AttentionPlan:
    """Plan of a step's attention, made once per step and used by every layer."""

    def __init__(
        self,
        pool: torch.Tensor,
        model: ModelConfig,
        workspaces: tuple[torch.Tensor, torch.Tensor],
        kv_scales: Sequence[tuple[float, float]],
        chunks: Sequence[ScheduledChunk],
        groups: Sequence[_Group],
    ) -> None:
        num_blocks, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
        self._num_heads = model.num_heads
        self._num_kv_heads = num_kv_heads
        self._token_rows = pool.view(num_blocks * num_layers * 2 * block_size, num_kv_heads * head_dim)
        self._num_tokens = sum(chunk.num_new_tokens for chunk in chunks)
        slots = torch.from_numpy(_slots(chunks, num_layers, block_size))
        # (num_layers, 2, T): rows of the new keys and of the new values, layer by layer.
        offsets = torch.arange(num_layers * 2, device="cpu").view(num_layers, 2, 1) * block_size
        self._new_rows = (slots + offsets).to(pool.device)
        self._windows = model.windows
        self._kv_scales = kv_scales
        self._is_narrow = pool.dtype == torch.uint8
        self._groups = [_GroupPlan(pool, model, workspaces, group) for group in groups]

    def attend(self, layer: int, heads: torch.Tensor, out: torch.Tensor) -> None:
        """Write the new keys and values of `layer` into the pool, then attend.

        heads: (T, N + 2 K, D): rotated queries, rotated keys, values. out: (T, N * D), the result. Rows after those of
        the step's tokens are padding, and are neither read nor written.
        """
        first_key, first_value = self._num_heads, self._num_heads + self._num_kv_heads
        keys, values = heads[: self._num_tokens, first_key:first_value], heads[: self._num_tokens, first_value:]
        for rows, new, scale in zip(self._new_rows[layer], (keys, values), self._kv_scales[layer], strict=True):
            stored = narrowed(new.flatten(1), scale).view(torch.uint8) if self._is_narrow else new.flatten(1)
            self._token_rows.index_copy_(0, rows, stored)
        for group in self._groups:
            group.attend(layer, self._windows[layer], heads, out, self._kv_scales[layer])


def narrowed(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """Convert numbers divided by a scale to 8-bit floats (e4m3). Numbers beyond their range become the largest of
    them."""
    return (numbers.float() * (1 / scale)).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)


def _slots(chunks: Sequence[ScheduledChunk], num_layers: int, block_size: int) -> np.ndarray:
    """Return the row of each new token's key in layer 0, (T,), counted in rows of one token, one layer, key or
    value."""
    slots = []
    for chunk in chunks:
        computed = chunk.sequence.num_computed_tokens
        if chunk.num_new_tokens == 1:
            block = chunk.sequence.block_table[computed // block_size]
            slots.append(block * num_layers * 2 * block_size + computed % block_size)
            continue
        positions = np.arange(computed, computed + chunk.num_new_tokens)
        blocks = np.asarray(chunk.sequence.block_table)[positions // block_size]
        slots.extend(blocks * (num_layers * 2 * block_size) + positions % block_size)
    return np.asarray(slots, dtype=np.int64)


class _GroupPlan:
    """Blocks, mask and place among the step's tokens of one group."""

    def __init__(
        self, pool: torch.Tensor, model: ModelConfig, workspaces: tuple[torch.Tensor, torch.Tensor], group: _Group
    ) -> None:
        num_blocks, num_layers, _, block_size, num_kv_heads, head_dim = pool.shape
        self._group = group
        self._heads = (num_kv_heads, model.num_heads // num_kv_heads, head_dim)
        self._scale = model.attention_scale
        self._end = group.first_token + group.num_sequences * group.num_new_tokens
        self._block_rows = pool.view(num_blocks * num_layers * 2, -1)
        padded = [table + [table[0]] * (group.num_blocks - len(table)) for table in group.block_tables]
        in_layer_0 = torch.tensor(padded, device="cpu").flatten() * (num_layers * 2)
        # (num_layers, 2 * S * blocks): rows of all keys, then of all values.
        offsets = torch.arange(num_layers * 2, device="cpu").view(num_layers * 2, 1)
        self._rows = (in_layer_0 + offsets).view(num_layers, -1).to(pool.device)
        size = self._rows.shape[1] * self._block_rows.shape[1]
        self._gathered, self._wide = (each[:size].view(self._rows.shape[1], -1) for each in workspaces)
        shape = (2, group.num_sequences, group.num_blocks * block_size, num_kv_heads, head_dim)
        # Contexts of equal length are cut to that length; others are masked.
        self._equal = len(set(group.contexts)) == 1
        used = group.contexts[0] if self._equal else shape[2]
        self._keys, self._values = self._wide.view(shape)[:, :, :used].transpose(2, 3)
        self._cap = model.switches.attention_cap
        self._masks = {window: self._make_mask(used, window) for window in set(model.windows)}

    def _make_mask(self, used: int, window: int) -> torch.Tensor | None:
        """Make the mask (S or 1, 1, Q, C) that is added to the scores: a new token sees the context up to itself, or
        the last `window` tokens of it. Returns None if nothing is hidden, or if torch's own causal mask is used."""
        num_new = self._group.num_new_tokens
        all_in_window = not 0 < window < used
        if self._equal and all_in_window and num_new in (1, 0 if self._cap else used):
            return None
        device = self._wide.device
        contexts = torch.tensor(self._group.contexts[:1] if self._equal else self._group.contexts, device=device)
        last = contexts[:, None] - num_new + torch.arange(num_new, device=device)
        positions = torch.arange(used, device=device)
        hidden = positions > last[:, :, None]
        if window:
            hidden |= positions <= last[:, :, None] - window
        mask = torch.zeros(hidden.shape, dtype=self._wide.dtype, device=device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None]

    def attend(
        self, layer: int, window: int, heads: torch.Tensor, out: torch.Tensor, kv_scales: tuple[float, float]
    ) -> None:
        torch.index_select(self._block_rows, 0, self._rows[layer], out=self._gathered)
        key_scale, value_scale = kv_scales
        if self._wide.dtype != self._gathered.dtype:
            self._wide.copy_(self._gathered.view(torch.float8_e4m3fn))
        num_kv_heads, num_queries, head_dim = self._heads
        num_sequences, num_new = self._group.num_sequences, self._group.num_new_tokens
        rows = slice(self._group.first_token, self._end)
        query = heads[rows, : num_kv_heads * num_queries]
        if num_new == 1:
            # Queries that share a key head take the place of the query tokens, of which there is only one.
            packed = query.view(num_sequences, num_kv_heads, num_queries, head_dim)
            out[rows].view(packed.shape).copy_(self._weigh(packed, self._masks[window], self._scale * key_scale))
        else:
            split = query.view(num_sequences, num_new, -1, head_dim).transpose(1, 2)
            result = self._weigh(split, self._masks[window], self._scale * key_scale)
            out[rows].view(num_sequences, num_new, -1, head_dim).copy_(result.transpose(1, 2))
        if value_scale != 1.0:
            out[rows] *= value_scale

    def _weigh(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Compute attention (S, H, Q, D) of queries (S, H, Q, D), whose H heads share the K key heads equally. scale:
        factor of the scores."""
        keys, values = self._keys, self._values
        if not self._cap:
            is_causal = mask is None and self._group.num_new_tokens > 1
            return F.scaled_dot_product_attention(
                query,
                keys,
                values,
                mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
        shared = query.shape[1] // keys.shape[1]
        scores = query @ keys.repeat_interleave(shared, 1).transpose(2, 3) * (scale / self._cap)
        scores = scores.tanh_() * self._cap
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1, dtype=torch.float32)
        return torch.matmul(weights.to(query.dtype), values.repeat_interleave(shared, 1))

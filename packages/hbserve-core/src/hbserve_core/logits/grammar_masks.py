"""Application of grammars' masks of allowed tokens to logits.

Shapes: N rows, V vocab_size, B bytes of a mask, at least V / 8.
"""

from collections.abc import Sequence as Ids

import numpy as np
import torch

from hbserve_core.logits.rows import LogitsRow


class GrammarMasks:
    """Rule that sets the logits of tokens that a request's grammar forbids to -inf. Used when the masks have been
    computed."""

    def __init__(self, device: torch.device) -> None:
        self._bits = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)

    def apply(self, scores: torch.Tensor, rows: Ids[LogitsRow]) -> None:
        """Change logits (N, V) float32, a row for each of `rows`, in place."""
        masks = torch.from_numpy(_masks(rows, -(-scores.shape[1] // 32)))
        if scores.device.type == "cuda":
            masks = masks.pin_memory().to(scores.device, non_blocking=True)
        forbidden = (masks[:, :, None] & self._bits) == 0  # (N, B, 8)
        scores.masked_fill_(forbidden.flatten(1)[:, : scores.shape[1]], float("-inf"))


def _masks(rows: Ids[LogitsRow], width: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Return the masks of the rows, (N, B). All bits are set in rows without a grammar, and in rows whose mask is late:
    nobody reads the tokens of the latter."""
    masks = np.full((len(rows), width), -1, dtype=np.int32)
    for mask, row in zip(masks, rows, strict=True):
        matcher = row.sequence.matcher
        if matcher is not None and matcher.is_ready():
            # The tokenizer may have more tokens than the model.
            mask[:] = matcher.mask[:width]
    return masks.view(np.uint8)

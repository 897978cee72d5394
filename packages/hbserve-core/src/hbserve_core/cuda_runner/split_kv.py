"""How the decodes of a step are cut into pieces of similar length, which kernels/decode_attention.py computes."""

import numpy as np
import numpy.typing as npt

TILE = 64
"""A piece is a multiple of so many tokens of context."""
_MOST_PARTS = 64
_PIECES_PER_PROCESSOR = 2


class DecodePieces:
    """Enough pieces for several programs on every processor, and none longer than that takes.

    So neither a few long sequences among short ones nor a single one leave processors idle. The number of pieces is
    bounded by that of rows: a graph has room for all.
    """

    def __init__(self, num_kv_heads: int, num_processors: int) -> None:
        """A program takes one piece and one key head."""
        self._wanted = max(1, _PIECES_PER_PROCESSOR * num_processors // num_kv_heads)

    def most(self, rows: int) -> int:
        """Pieces of so many rows, at most."""
        return rows + min(self._wanted, (_MOST_PARTS - 1) * rows)

    def cut(self, contexts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """(6, P): row, which part of it, number of its parts, first and last (exclusive) position that the piece takes
        from the pool, the new token's position. A row's parts are neighbours, and the last one has the new token.

        contexts: of each row, at least 1.
        """
        length = max(TILE, -(-int(contexts.sum()) // self._wanted), -(-int(contexts.max()) // _MOST_PARTS))
        spans = -(-contexts // (-(-contexts // length) * TILE)) * TILE
        parts = -(-contexts // spans)
        rows = np.repeat(np.arange(len(contexts)), parts)
        places = np.arange(len(rows)) - (np.cumsum(parts) - parts)[rows]
        positions = contexts[rows] - 1
        firsts = places * spans[rows]
        lasts = np.minimum(firsts + spans[rows], positions)
        return np.stack((rows, places, parts[rows], firsts, lasts, positions)).astype(np.int32)

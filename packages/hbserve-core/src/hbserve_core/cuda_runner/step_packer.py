"""From a batch to the numbers that a device reads, and from the tokens that it samples back to the batch."""

import random
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any

from hbserve_core.config import InstanceConfig
from hbserve_core.cuda_runner.graphs import GraphShapes
from hbserve_core.cuda_runner.split_kv import DecodePieces
from hbserve_core.cuda_runner.step_buffer import StepShape, StepView, order_chunks, write_step
from hbserve_core.engine.runner import StepTokens
from hbserve_core.engine.sequence import ScheduledChunk, Sequence


@dataclass(frozen=True, slots=True)
class PackedStep:
    """What is known on the host of a step that a device computes."""

    shape: StepShape
    used: int
    """How many numbers of its memory are in use."""
    places: list[int | None]
    """For each token that is sampled, its chunk's place in the batch, or None if nobody wants it."""
    batch_size: int

    def tokens(self, sampled: Ids[int]) -> StepTokens:
        """Each chunk's next token, or None; `sampled` are the step's, one for each of `places`."""
        result: StepTokens = [None] * self.batch_size
        for place, token in zip(self.places, sampled, strict=True):
            if place is not None:
                result[place] = token
        return result


class StepPacker:
    """Packs one step after the other. Remembers where the last one puts tokens that nobody has read yet."""

    def __init__(self, config: InstanceConfig, tile_tokens: int, pieces: DecodePieces, seed: int | None = None) -> None:
        """tile_tokens: new tokens that one program of prefill attention takes. pieces: how decodes are cut.

        seed: for requests that bring none of their own; None: another one in each process.
        """
        self.shapes = GraphShapes(config, tile_tokens, pieces)
        self._block_size = config.block_size
        self._tile_tokens = tile_tokens
        self._pieces = pieces
        self._random = random.Random(seed)
        self._sources: dict[Sequence, int] = {}

    def pack(self, batch: Ids[ScheduledChunk], memory: Any) -> PackedStep:
        """Write a step to `memory`, a flat int32 numpy array with room for `shapes.largest` and the tables."""
        order = order_chunks(batch)
        chunks = [batch[place] for place in order]
        shape = self.shapes.choose([chunk.num_new_tokens for chunk in chunks])
        # A step of decodes samples every row, although a chunk of one token may stop short of its prompt's end.
        sampling = [i for i, chunk in enumerate(chunks) if chunk.samples or not shape.tiles]
        used = write_step(
            StepView(memory, shape), chunks, sampling, self._sources, self._random,
            block_size=self._block_size, tile_tokens=self._tile_tokens, pieces=self._pieces,
        )  # fmt: skip
        self._sources = {chunks[i].sequence: row for row, i in enumerate(sampling)}
        return PackedStep(shape, used, [order[i] if chunks[i].samples else None for i in sampling], len(batch))

"""Message in msgpack by which rank 0 tells the other ranks of one step: what a runner reads of each chunk, and no more.

Both ends remember the sequences of the previous step, so their parameters, and the blocks that they had then, are not
sent again. A step of 256 decodes with 80 blocks each takes 16 KB instead of 98 KB, for which a pipe has no room. The
runner also needs the same sequence object: by it, it finds the place of a token that the device has computed and nobody
has read.

Most steps have the same sequences as the previous one, each one token further. Their messages contain new blocks only.
"""

from array import array
from collections.abc import Sequence as Ids
from itertools import repeat

import msgspec

from hbserve_core.engine.sequence import UNREAD, ScheduledChunk, Sequence
from hbserve_rpc import SamplingParams

_BLOCK_BYTES = array("i").itemsize
_NOT_SENT = -3
"""Placeholder for tokens that no runner reads: their keys and values are in the pool, or they come later."""


class _Chunk(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    choice: int
    num_prompt_tokens: int
    num_tokens: int
    first: int
    new_token_ids: list[int]
    """Tokens [first, first + num_new_tokens), at most one of which is UNREAD."""
    num_known_blocks: int
    """Number of blocks from the previous step that are still at the beginning of its table."""
    new_blocks: bytes
    """Rest of its block table, as int32."""
    params: SamplingParams | None
    """Sampling parameters; None if they are those of the previous step."""
    num_scored_tokens: int
    known_token_ids: list[int]
    """All tokens of the request, if `params` is sent and penalizes tokens."""


class _Again(msgspec.Struct, frozen=True):
    """Repetition of the previous step: each of its sequences has sampled a token that nobody has read, and now computes
    it."""

    new_blocks: dict[int, bytes]
    """New blocks, as int32, of sequences whose tables have grown, by their place in the batch."""


class StepWriter:
    """Writer of step messages, on rank 0."""

    def __init__(self, draws: bool) -> None:
        """draws: whether the other ranks must sample as rank 0 does. They need not if rank 0 sends them every token."""
        self._draws = draws
        self._last: dict[Sequence, bytes] = {}
        """Sequences of the last batch, in its order, with their block tables."""
        self._places: list[int] = []
        """Position of the next token of each of those sequences, if it is sampled."""
        self._encoder = msgspec.msgpack.Encoder()

    def write(self, batch: Ids[ScheduledChunk]) -> bytes:
        sequences = [chunk.sequence for chunk in batch]
        tables = [sequence.block_table.tobytes() for sequence in sequences]
        message = self._encoder.encode(
            self._again(sequences, tables) or [self._chunk(*each) for each in zip(batch, tables, strict=True)]
        )
        self._last = dict(zip(sequences, tables, strict=True))
        self._places = [chunk.first + chunk.num_new_tokens for chunk in batch]
        return message

    def _again(self, sequences: list[Sequence], tables: list[bytes]) -> _Again | None:
        """Return the message if the step repeats the previous one; otherwise None."""
        if sequences != [*self._last] or self._places != [each.num_computed_tokens for each in sequences]:
            return None
        # A sequence with more tokens than that computes a part of its prompt.
        ends = [(len(each.token_ids) - 1, each.token_ids[-1]) for each in sequences]
        if ends != [(place, UNREAD) for place in self._places]:
            return None
        new_blocks = {}
        for place, (table, known) in enumerate(zip(tables, self._last.values(), strict=True)):
            if table != known:
                if not table.startswith(known):
                    return None
                new_blocks[place] = table[len(known) :]
        return _Again(new_blocks)

    def _chunk(self, chunk: ScheduledChunk, table: bytes) -> _Chunk:
        sequence, first = chunk.sequence, chunk.first
        params = None if sequence in self._last else sequence.params if self._draws else _greedy(sequence.params)
        new_token_ids = sequence.token_ids[first : first + chunk.num_new_tokens]
        known = self._last.get(sequence, b"")
        if not table.startswith(known):  # it was preempted and has other blocks now, or some are not seen any more
            known = b""
        return _Chunk(
            sequence.request_id,
            sequence.choice,
            sequence.num_prompt_tokens,
            sequence.num_tokens,
            first,
            new_token_ids,
            len(known) // _BLOCK_BYTES,
            table[len(known) :],
            params,
            sequence.num_scored_tokens,
            sequence.token_ids if params is not None and params.has_penalties else [],
        )


def _greedy(params: SamplingParams) -> SamplingParams:
    """Return what another rank needs to know if it does not sample: for which rows all ranks compute logits
    together."""
    return SamplingParams(temperature=0, prompt_logprobs=params.prompt_logprobs)


class StepReader:
    """Reader of step messages, on the other ranks. It restores the batch with sequences that only know the tokens that
    steps have computed since the sequence was last sent as a whole."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Sequence] = {}
        """Sequences of the last batch, in its order, by request and choice."""
        self._decoder = msgspec.msgpack.Decoder(list[_Chunk] | _Again)

    def read(self, message: bytes) -> list[ScheduledChunk]:
        said = self._decoder.decode(message)
        if isinstance(said, _Again):
            return self._again(said)
        batch = [ScheduledChunk(self._sequence(chunk), len(chunk.new_token_ids)) for chunk in said]
        self._last = {(each.request_id, each.choice): chunk.sequence for each, chunk in zip(said, batch, strict=True)}
        return batch

    def _again(self, said: _Again) -> list[ScheduledChunk]:
        sequences = [*self._last.values()]
        for sequence in sequences:
            sequence.num_computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(UNREAD)
        for place, blocks in said.new_blocks.items():
            sequences[place].block_table.frombytes(blocks)
        return [ScheduledChunk(sequence, 1) for sequence in sequences]

    def _sequence(self, chunk: _Chunk) -> Sequence:
        if chunk.params is None:
            sequence = self._last[chunk.request_id, chunk.choice]
        else:
            sequence = Sequence(chunk.request_id, chunk.known_token_ids, chunk.num_prompt_tokens, chunk.params)
        tokens, end = sequence.token_ids, chunk.first + len(chunk.new_token_ids)
        tokens += repeat(_NOT_SENT, chunk.num_tokens - len(tokens))
        tokens[chunk.first : end] = chunk.new_token_ids
        sequence.num_computed_tokens = chunk.first
        sequence.num_scored_tokens = chunk.num_scored_tokens
        del sequence.block_table[chunk.num_known_blocks :]
        sequence.block_table.frombytes(chunk.new_blocks)
        return sequence

"""One step as rank 0 tells it to the other ranks, in msgpack: what a runner reads of each chunk, and no more.

Both ends remember the sequences of the step before: their parameters, and the blocks that they had then, are not said
again: a step of 256 decodes with 80 blocks each is 16 KB and not 98, for which a pipe has no room. And a runner finds
the place of a token that the device has computed, and nobody has read, by the sequence it belongs to.

Most steps are those of the step before again, each one token further: of these the message has new blocks only.
"""

from array import array
from collections.abc import Sequence as Ids
from itertools import repeat

import msgspec

from hbserve_core.engine.sequence import UNREAD, ScheduledChunk, Sequence
from hbserve_rpc import SamplingParams

_BLOCK_BYTES = array("i").itemsize
_NOT_SENT = -3
"""At the places of tokens that no runner reads: their keys and values are in the pool, or they come later."""


class _Chunk(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    choice: int
    num_prompt_tokens: int
    num_tokens: int
    first: int
    new_token_ids: list[int]
    """Tokens [first, first + num_new_tokens); UNREAD is one of them at most."""
    num_known_blocks: int
    """So many of the step before it still has, at the beginning of its table."""
    new_blocks: bytes
    """The rest of its table: int32."""
    params: SamplingParams | None
    """None: those of the step before."""
    num_scored_tokens: int
    known_token_ids: list[int]
    """With params that penalize tokens, all that the request has."""


class _Again(msgspec.Struct, frozen=True):
    """The step before once more: each of its sequences, which sampled a token that nobody has read, computes that."""

    new_blocks: dict[int, bytes]
    """The new blocks, int32, of those whose tables have grown, by their place."""


class StepWriter:
    """Rank 0's end."""

    def __init__(self, draws: bool) -> None:
        """draws: whether the others must sample as rank 0 does. They need not where rank 0 tells them every token."""
        self._draws = draws
        self._last: dict[Sequence, bytes] = {}
        """Their block tables, in the order of that batch."""
        self._places: list[int] = []
        """The position of the next token of each, if it is sampled."""
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
        """None: it is another step."""
        if sequences != [*self._last] or self._places != [each.num_computed_tokens for each in sequences]:
            return None
        # Who has more tokens than these computes a part of its prompt.
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
        if not table.startswith(known):  # it was preempted and has others now, or some are not seen any more
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
    """What another rank has to know where it samples for nobody: of which rows all ranks make logits together."""
    return SamplingParams(temperature=0, prompt_logprobs=params.prompt_logprobs)


class StepReader:
    """The other end: the batch again, of sequences that know only the tokens that steps have computed since they were
    last told as a whole."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], Sequence] = {}
        """By request and choice, in the order of that batch."""
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

"""Penalties for tokens that a request already has: presence and frequency penalties for its output, and the repetition
penalty for its prompt too.

The tokens of each such request are kept on the device from its first special step on, and every step adds one: usually
the one that the previous step has sampled and the host has not read yet. So no data of the size of the vocabulary is
kept or copied, and only the logits of tokens that a request has are read and written. A request that comes from
elsewhere, by a handover, a retry or a preemption, brings its tokens with it.

    kept tokens   [0 .. num_prompt)        the prompt's, each once; none without repetition_penalty
                  [num_prompt .. length)   the output, in order: a token counts as often as it is there
Shapes: N rows, V vocab_size, L most tokens of a row.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import torch

from hbserve_core.engine.sequence import UNREAD, Sequence
from hbserve_core.logits.rows import LogitsRow, on_device

_LEAST_WIDTH = 256


@dataclass(slots=True)
class _Kept:
    slot: int
    num_prompt: int
    length: int


class Penalties:
    """Penalties of the requests of a step. Their tokens are kept for the next step. A request that is left out of a
    step brings its tokens again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.zeros((0, _LEAST_WIDTH), dtype=torch.int32, device=device)
        """Kept tokens, (slots, width)."""
        self._kept: dict[Sequence, _Kept] = {}

    def prepare(self, rows: Ids[LogitsRow], sampled: torch.Tensor | None) -> None:
        """Store new tokens. Called once per step, before the step writes its own tokens to `sampled`.

        sampled: tokens of the previous step; None if the host has read all of them.
        """
        penalized = [each for each in rows if each.sequence.params.has_penalties]
        self._kept = {row.sequence: self._kept[row.sequence] for row in penalized if row.sequence in self._kept}
        used = {kept.slot for kept in self._kept.values()}
        free = iter(slot for slot in range(len(penalized)) if slot not in used)
        new: list[tuple[int, int, int, int]] = []  # slot, column, token, source
        for row in penalized:
            new += self._new_tokens(row, free)
        if new:
            self._make_room()
            self._write(new, sampled)

    def _new_tokens(self, row: LogitsRow, free: Iterator[int]) -> list[tuple[int, int, int, int]]:
        sequence, first = row.sequence, 0
        kept = self._kept.get(sequence)
        prompt: list[int] = []
        if kept is None:
            if sequence.params.repetition_penalty != 1:
                prompt = list(dict.fromkeys(sequence.token_ids[: sequence.num_prompt_tokens]))
            kept = self._kept[sequence] = _Kept(next(free), len(prompt), 0)
        else:
            first = kept.length - kept.num_prompt
        tokens = prompt + sequence.token_ids[sequence.num_prompt_tokens + first :]
        begin, kept.length = kept.length, kept.length + len(tokens)
        assert UNREAD not in tokens or row.source >= 0, "a token that nobody has read is one of the step before"
        return [
            (kept.slot, column, token, row.source if token == UNREAD else -1)
            for column, token in enumerate(tokens, begin)
        ]

    def _make_room(self) -> None:
        slots, width = self._tokens.shape
        slots_needed = 1 + max(kept.slot for kept in self._kept.values())
        width_needed = max(kept.length for kept in self._kept.values())
        if slots_needed > slots or width_needed > width:
            larger = self._tokens.new_zeros(
                max(slots, slots_needed), width if width_needed <= width else max(2 * width, width_needed)
            )
            larger[:slots, :width] = self._tokens
            self._tokens = larger

    def _write(self, new: list[tuple[int, int, int, int]], sampled: torch.Tensor | None) -> None:
        slots, columns, tokens, sources = on_device(list(zip(*new, strict=True)), torch.int64, self._device)
        if sampled is not None:
            tokens = torch.where(sources < 0, tokens, sampled.index_select(0, sources.clamp(min=0)))
        # The sampled value may not be a token. Then the request has ended, but the value must not be used as an index
        # of logits.
        self._tokens[slots, columns] = tokens.clamp(min=0).int()

    def apply(self, scores: torch.Tensor, rows: Ids[LogitsRow]) -> None:
        """Change logits (N, V) float32, a row for each of `rows`, in place."""
        kept = [self._kept.get(each.sequence) or _Kept(0, 0, 0) for each in rows]
        longest = max(each.length for each in kept)
        if longest == 0:
            return
        slots, num_prompt, lengths = on_device(
            [[each.slot for each in kept], [each.num_prompt for each in kept], [each.length for each in kept]],
            torch.int64,
            self._device,
        )
        params = [each.sequence.params for each in rows]
        repetition, presence, frequency = on_device(
            [
                [each.repetition_penalty for each in params],
                [each.presence_penalty for each in params],
                [each.frequency_penalty for each in params],
            ],
            torch.float32,
            self._device,
        )[:, :, None]
        tokens = self._tokens[:, :longest].index_select(0, slots).long()
        columns = torch.arange(longest, device=self._device)
        known = columns < lengths[:, None]
        # Several places of one token write the same value, and so do places beyond the last token, which stand for the
        # first.
        seen = torch.where(known, tokens, tokens[:, :1])
        given = scores.gather(1, seen)
        repeated = torch.where(given > 0, given / repetition, given * repetition)
        scores.scatter_(1, seen, torch.where(lengths[:, None] > 0, repeated, given))
        self._penalize_output(scores, tokens, known & (columns >= num_prompt[:, None]), num_prompt, presence, frequency)

    @staticmethod
    def _penalize_output(
        scores: torch.Tensor,
        tokens: torch.Tensor,
        is_output: torch.Tensor,
        num_prompt: torch.Tensor,
        presence: torch.Tensor,
        frequency: torch.Tensor,
    ) -> None:
        first = num_prompt.clamp(max=tokens.shape[1] - 1)[:, None]
        output = torch.where(is_output, tokens, tokens.gather(1, first))
        given = scores.gather(1, output)
        scores.scatter_(1, output, given - presence * is_output.any(1, keepdim=True))
        scores.scatter_add_(1, output, -frequency * is_output)

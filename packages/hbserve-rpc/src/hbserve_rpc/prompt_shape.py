"""The shape of a prompt, which is all that a scheduler sees of it.

Looking at every token of a long prompt takes longer than everything else that a scheduler does for a request. So it is
done once, where the prompt enters, and outside the event loop if it is long; from there on the shape goes with it.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Annotated

import msgspec

DIGEST_BYTES = 8
"""Length of a block's digest where it only says which instance may hold the block. Two that are equal by chance cost a
request a little time, once in a very long while."""
MOST_REPORTED = 8192
"""Largest number of digests that an instance reports: 64 KiB a second, while they change."""
Digests = Annotated[list[Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]], msgspec.Meta(max_length=1 << 18)]

PromptIds = Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 22)]
"""Token ids of a prompt, in a tuple, which nobody changes, so that nobody need copy it. The garbage collector looks at
a tuple of integers only once, but at lists of them each time, and prompts of waiting requests have millions of them."""


class PromptShape(msgspec.Struct, frozen=True):
    """Length, largest id and digests of a prompt of plain token ids. The instance that computes it checks it again."""

    num_tokens: int
    largest_id: int = 0
    digests: Digests = []
    """First DIGEST_BYTES of each full block's digest, if somebody wants to know where the prompt is cached."""


def shape_of(token_ids: Sequence[int], block_size: int = 0) -> PromptShape:
    """Return the shape of plain token ids. If `block_size` is not 0, it has the digests of blocks of that size."""
    digests: list[bytes] = []
    if block_size:
        extend_digests(digests, token_ids, len(token_ids), block_size)
    return PromptShape(len(token_ids), max(token_ids, default=0), [digest[:DIGEST_BYTES] for digest in digests])


def extend_digests(digests: list[bytes], token_ids: Sequence[int], num_tokens: int, block_size: int) -> None:
    """Add the missing digests of the full blocks in the first `num_tokens` tokens. Digest i depends on blocks 0 to i.

    A digest has 128 bits of BLAKE2b, so two prefixes never have the same one by chance.
    """
    first, last = len(digests) * block_size, num_tokens // block_size * block_size
    tokens = array("q", token_ids[first:last]).tobytes()
    digest, size = digests[-1] if digests else b"", block_size * 8
    for place in range(0, len(tokens), size):
        digest = hashlib.blake2b(digest + tokens[place : place + size], digest_size=16).digest()
        digests.append(digest)

"""The shape of a prompt, which is all that a scheduler sees of it.

To look at every token of a long prompt takes longer than all else that a scheduler does for a request. So that is done
once, where the prompt enters, and beside an event loop if it is long; from there on its shape goes with it.
"""

import hashlib
from array import array
from collections.abc import Sequence
from typing import Annotated

import msgspec

DIGEST_BYTES = 8
"""Of a block's digest, where it only says which instance may hold the block: that two are the same by chance costs the
request a little time, once in a very long while."""
MOST_REPORTED = 8192
"""Digests that an instance reports: 64 KiB a second, while they change."""
Digests = Annotated[list[Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES)]], msgspec.Meta(max_length=1 << 18)]

PromptIds = Annotated[tuple[int, ...], msgspec.Meta(max_length=1 << 22)]
"""Token ids of a prompt. A tuple, which nobody changes, so that nobody need copy it; and the garbage collector, which
goes through all lists of integers that there are each time, looks at a tuple of them once: where requests wait, their
prompts are millions."""


class PromptShape(msgspec.Struct, frozen=True):
    """Length, largest id and digests of a prompt whose token ids are plain. Who computes them checks them again."""

    num_tokens: int
    largest_id: int = 0
    digests: Digests = []
    """The first DIGEST_BYTES of each full block's, if somebody wants to know where it is cached."""


def shape_of(token_ids: Sequence[int], block_size: int = 0) -> PromptShape:
    """The shape of token ids that are plain. With a `block_size`, with the digests of its blocks."""
    digests: list[bytes] = []
    if block_size:
        extend_digests(digests, token_ids, len(token_ids), block_size)
    return PromptShape(len(token_ids), max(token_ids, default=0), [digest[:DIGEST_BYTES] for digest in digests])


def extend_digests(digests: list[bytes], token_ids: Sequence[int], num_tokens: int, block_size: int) -> None:
    """Bring the digests of the full blocks of the first `num_tokens` tokens up to date. Digest i depends on blocks
    0 to i.

    128 bits of BLAKE2b: that two prefixes have the same one by chance does not happen.
    """
    first, last = len(digests) * block_size, num_tokens // block_size * block_size
    tokens = array("q", token_ids[first:last]).tobytes()
    digest, size = digests[-1] if digests else b"", block_size * 8
    for place in range(0, len(tokens), size):
        digest = hashlib.blake2b(digest + tokens[place : place + size], digest_size=16).digest()
        digests.append(digest)

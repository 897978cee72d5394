"""The orders of the scheduler's side of the vLLM connector to the workers' side, once a step. Knows nothing of vLLM.

A request has a *source* on the side that decodes (where its KV is offered), and an *outgoing* transfer on the side that
prefilled it. Blocks are those of vLLM's KV cache manager.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a request's KV is, or will be, offered."""

    transfer_id: str
    ranks: tuple[tuple[str, str], ...]
    """Address and epoch ("" if it is not known) of each rank's manager."""


@dataclass(frozen=True)
class Wanted:
    """Blocks of this side that a request's KV goes to."""

    block_ids: list[int]
    first: int
    """Place of the first of them in the prompt: the blocks before it are here."""
    digest: str
    """Digest of the prompt: see `prompt_digest`."""


@dataclass(frozen=True)
class Computed:
    """Blocks of a prompt that are computed when this step ends, the next of an outgoing transfer."""

    transfer_id: str
    block_ids: list[int]
    digest: str = ""
    """Digest of the whole prompt, which comes with its last blocks; "" before."""


@dataclass
class Orders:
    """What a worker is to do, by request id; it carries them out in this order."""

    offers: dict[str, str] = field(default_factory=dict)
    """Transfer id of one that has arrived here and whose receiver may be there already: the two agree on the transfer
    while the prompt waits and is computed."""
    claims: dict[str, Source] = field(default_factory=dict)
    """Where the KV is of requests that have arrived here."""
    fetches: dict[str, Wanted] = field(default_factory=dict)
    """Requests that have blocks to be fetched. Each is voted for once, when nothing lands in them any more."""
    releases: set[str] = field(default_factory=set)
    """It needs nothing (any more)."""
    finished: dict[str, Computed] = field(default_factory=dict)
    """It has finished here, and these were not pushed yet. Each is voted for once, when its blocks are read no more."""
    withdrawn: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Transfer id and reason of one that has ended before all was computed. Each is voted for, as above."""
    preempted: set[str] = field(default_factory=set)
    """Requests whose blocks are about to be overwritten."""
    computed: dict[str, Computed] = field(default_factory=dict)
    """Blocks that this step fills, of requests whose receiver may be there already."""

    def __bool__(self) -> bool:
        return any(vars(self).values())


Params = dict[str, Any]
"""`kv_transfer_params` of a request: what a router passes on from one server to the other."""

"""Orders that the scheduler's side of the vLLM connector gives the workers' side with each step. Imports no vLLM.

A request has a *source* on the side that decodes (where its KV is offered), and an *outgoing* transfer on the side that
prefilled it. Blocks are those of vLLM's KV cache manager.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """The place where a request's KV is, or will be, offered."""

    transfer_id: str
    ranks: tuple[tuple[str, str], ...]
    """Address and epoch ("" if it is not known) of each rank's manager."""


@dataclass(frozen=True)
class Wanted:
    """Blocks of this side into which a request's KV goes."""

    block_ids: list[int]
    first: int
    """Position of the first of them among the blocks of the prompt. This side has the blocks before it already."""
    digest: str
    """Digest of the prompt: see `prompt_digest`."""


@dataclass(frozen=True)
class Computed:
    """The next blocks of an outgoing transfer: blocks of a prompt that are computed when this step ends."""

    transfer_id: str
    block_ids: list[int]
    digest: str = ""
    """Digest of the whole prompt, which comes with its last blocks; "" before."""


@dataclass
class Orders:
    """Orders for a worker, by request id. It carries them out in the order of these fields."""

    offers: dict[str, str] = field(default_factory=dict)
    """Transfer ids of requests that have arrived here and whose receiver may be there already. The two sides agree on
    the transfer while the prompt waits and is computed."""
    claims: dict[str, Source] = field(default_factory=dict)
    """Sources of the KV of requests that have arrived here."""
    fetches: dict[str, Wanted] = field(default_factory=dict)
    """Blocks of requests that are to be fetched. Each request gets one vote, when nothing lands in them any more."""
    releases: set[str] = field(default_factory=set)
    """Requests that need no KV, or none any more."""
    finished: dict[str, Computed] = field(default_factory=dict)
    """Blocks not pushed yet of requests that have finished here. Each request gets one vote, when its blocks are read
    no more."""
    withdrawn: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Transfer ids of requests that have ended before all was computed, with the reason. They get votes as above."""
    preempted: set[str] = field(default_factory=set)
    """Requests whose blocks are about to be overwritten."""
    computed: dict[str, Computed] = field(default_factory=dict)
    """Blocks that this step fills, of requests whose receiver may be there already."""

    def __bool__(self) -> bool:
        return any(vars(self).values())


Params = dict[str, Any]
"""Type of a request's `kv_transfer_params`, which a router passes on from one server to the other."""

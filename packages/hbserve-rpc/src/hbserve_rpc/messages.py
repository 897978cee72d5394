"""The structs that cross processes between clients, the scheduler and instances, and the methods that carry them.

Schema rules (peers may be of different versions): a new field has a default; a field never changes its type or meaning.

    client ──SCHEDULER_GENERATE──▶ scheduler ──DECODE──▶ decode instance     Granted, then TokenEvents
                                       └──────PREFILL──▶ prefill instance    TokenEvent (the first token), TransferDone
                                       │     (GRANT)──▶                      if it began before there was a grant
                                       └─────GENERATE──▶ hybrid instance     TokenEvents
                                       └─────GENERATE──▶ decode instance     the same, where it computes the prompt
                                          (END_CHOICE)──▶ decode or hybrid    of several choices one needs no more
    Ahead of requests:           scheduler ──CONNECT──▶ prefill instance    to a decode instance
Closing a stream early is how a request is aborted, at every hop.
"""

from typing import Annotated, Literal

import msgspec

from hbserve_rpc.counts import Histogram, HttpCounts, LinkCounts, RpcFaults
from hbserve_rpc.methods import Method, Notification, StreamMethod
from hbserve_rpc.prompt_shape import DIGEST_BYTES, MOST_REPORTED, PromptIds, PromptShape
from hbserve_rpc.sampling_params import LONGEST_TIMEOUT_S, SamplingParams

MOST_TOKENS = 1 << 22
TokenIds = Annotated[list[int], msgspec.Meta(max_length=MOST_TOKENS)]
"""More than any model takes. A longer one is refused before it is decoded, which would take a second and a gigabyte."""
LeftS = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_TIMEOUT_S)] | None
"""Time until a request's deadline as the message was sent: clocks of two processes need not agree. The instance ends
the request by itself then. None: there is none."""
Role = Literal["prefill", "decode", "hybrid"]
TokenLogprobs = dict[int, float]
"""Of one place: the log-probabilities of the most likely tokens, in order, and of the one that is there: if it is none
of those, it comes last."""
FinishReason = Literal["stop", "length", "abort"]
InstanceStatus = Literal["starting", "ready", "suspect", "draining", "failed", "lost"]  # suspect, lost: others say so


class Empty(msgspec.Struct, frozen=True, tag=True):
    """A request or reply that says nothing more than that it came."""


# ---- requests ----------------------------------------------------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, tag=True):
    """Generate after `prompt_token_ids + output_token_ids`.

    `output_token_ids` are tokens of this request that the client already has, from an earlier attempt;
    `params.max_tokens` counts them too, and TokenEvent.index goes on from them.
    """

    request_id: str
    prompt_token_ids: PromptIds
    params: SamplingParams
    output_token_ids: TokenIds = []
    left_s: LeftS = None
    """Of `params.timeout_s`, or of what the deployment allows. To a scheduler it says nothing: there it begins."""
    shape: PromptShape | None = None
    """Of the prompt, a tuple, which need not be looked at again then."""


class DecodeRequest(msgspec.Struct, frozen=True, tag=True):
    """Reserve blocks for a request whose prompt a prefill instance will compute, then decode it."""

    request_id: str
    transfer_id: str
    prompt_token_ids: PromptIds
    params: SamplingParams
    output_token_ids: TokenIds = []
    left_s: LeftS = None
    prefill_instance: str = ""
    """Id of the one whose KV is taken; "" is any."""


class PrefillRequest(msgspec.Struct, frozen=True, tag=True):
    """Compute a prompt, emit its first token, and move its KV to where `grant` says.

    An empty `grant` moves nothing: used when the first token is known to be the last. One that turns out to be the last
    (a stop token, say) ends the transfer in order, without the blocks that were not sent yet.

    With `grant_follows` the grant comes by GRANT, and `grant` is empty until then. The first token is told when the
    grant is there, and where that is after the prompt was computed, when the KV has moved: a request that waits does so
    for its first token, not for its second.
    """

    request_id: str
    transfer_id: str
    prompt_token_ids: PromptIds
    params: SamplingParams
    grant: bytes = b""
    output_token_ids: TokenIds = []
    grant_follows: bool = False
    left_s: LeftS = None


class GrantRequest(msgspec.Struct, frozen=True, tag=True):
    """The grant of a PrefillRequest that said that it follows. Of no effect if there is no such request (any more)."""

    request_id: str
    grant: bytes
    """Empty if nothing is to be moved, because the decode instance has failed: then the first token is told as soon as
    it is there."""


class CachedPrefixesRequest(msgspec.Struct, frozen=True, tag=True):
    """Which blocks of prompts are in the prefix cache?"""

    known: int = -1
    """The version that the client has."""


class CachedPrefixes(msgspec.Struct, frozen=True, tag=True):
    version: int
    """Of this epoch."""
    digests: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES * MOST_REPORTED)] | None = None
    """DIGEST_BYTES of each block's, as of PromptShape; None: the client has this version."""


class ConnectRequest(msgspec.Struct, frozen=True, tag=True):
    """Connect to a decode instance, so that the first request of the pair need not wait for that."""

    kv_endpoint: bytes
    """As its InstanceInfo says it."""


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    reason: FinishReason = "abort"
    """What the request's end will say: "stop" when the client has found a stop string."""
    choice: int | None = None
    """The one of its choices that ends; None: all of them."""


class EndChoice(msgspec.Struct, frozen=True, tag=True):
    """One of several choices is not wanted any more; the stream goes on with the others. Of no effect if there is no
    such request, or none any more."""

    request_id: str
    choice: int


class InstanceDied(msgspec.Struct, frozen=True, tag=True):
    """Known by whoever has started it: nobody need wait for its heartbeats to fail."""

    instance_id: str
    why: str


class Aborted(msgspec.Struct, frozen=True, tag=True):
    found: bool
    """False: no such request, or it had ended."""


# ---- what comes back ---------------------------------------------------------------------------------------------


class Granted(msgspec.Struct, frozen=True, tag=True):
    """First item of a decode stream: the blocks are reserved and the receive is posted."""

    grant: bytes
    """Opaque to the scheduler: made by the decode side's hbserve_kv, read by the prefill side's."""
    num_cached_tokens: int = 0
    """Tokens of the prompt whose KV the decode instance holds already; these are not moved."""


class TokenEvent(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of one choice of a request, from one engine step or several."""

    index: int
    """Place of `token_ids[0]` among the choice's output tokens; 0 is the first.

    A receiver that already has these tokens drops them.
    """
    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=MOST_TOKENS)]
    """Checked where they are read from a wire, and by nobody again."""
    finish_reason: FinishReason | None = None
    """Set on the last event of the choice, and only there."""
    logprobs: list[TokenLogprobs] = []
    """Of each of `token_ids`, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = []
    """With output token 0, if the request asks for them: of each prompt token but the first. Of several choices, with
    the first one."""
    choice: int = 0
    """Of `SamplingParams.n`."""
    num_preemptions: int = 0
    """How often it has given its blocks up to others on its instance so far, and was computed again."""


class Milestone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """How far something had come, some time before the message that tells of it was sent: clocks of two processes need
    not agree, and what is added by the message's way is less than a round trip."""

    age_s: float
    count: int


class TransferDone(msgspec.Struct, frozen=True, tag=True):
    """Last item of a prefill stream that moved KV."""

    num_bytes: int
    num_parts: int
    time_s: float
    """Time during which at least one part of this transfer was moving."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefill instance took from its prefix cache."""
    computed: list[Milestone] = []
    """Tokens of the prompt, after each chunk."""
    pushed: list[Milestone] = []
    """Blocks that were handed to the transfer, after each part."""


class RequestFinished(msgspec.Struct, frozen=True, tag=True):
    """Last item of a client's stream; of `SamplingParams.n` choices, each has one. Times are in seconds, on the
    scheduler's clock."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    queue_time_s: float
    """Submitted to first handed to an instance."""
    ttft_s: float
    """Submitted to first token (time to first token)."""
    tpot_s: float
    """Mean time per output token after the first; 0 when there is only one."""
    e2e_s: float
    """Submitted to finished."""
    handoff_s: float = 0.0
    """First token to second: with prefill and decode apart, how long the request stood still while it changed hands. On
    a hybrid instance a step. 0 when there is no second, or both came at once."""
    kv_bytes: int = 0
    """All that was moved of the request until then. Of several choices each says so, and it was moved once."""
    kv_transfer_time_s: float = 0.0
    num_cached_tokens: int = 0
    num_attempts: int = 1
    prefill_instance: str = ""
    decode_instance: str = ""
    choice: int = 0


class InstanceInfo(msgspec.Struct, frozen=True, tag=True):
    """What an instance is. Constant for one epoch once `status` is no longer "starting"."""

    instance_id: str
    role: Role
    epoch: str
    """One life of the instance: of its process, and in this role."""
    status: InstanceStatus
    model: str = ""
    """Where the model was loaded from."""
    max_model_len: int = 0
    """Most tokens of one sequence, prompt and output together."""
    max_num_seqs: int = 0
    """Most sequences in one step."""
    max_prompt_len: int = 0
    """Most prompt tokens that the instance can take."""
    vocab_size: int = 0
    block_size: int = 0
    num_blocks: int = 0
    kv_backend: str = ""
    kv_endpoint: bytes = b""
    """Where a decode instance receives KV. Opaque to the scheduler: made and read by hbserve_kv."""
    device: str = ""
    dtype: str = ""
    pid: int = 0
    error: str = ""
    """Why `status` is "failed"."""
    serves_generate: bool = False
    """A decode instance that computes prompts too, where there is nobody else for it."""
    started_as: Role | None = None
    """The role that it was started with, if it has another one now: see `members.INSTANCE_FLIP`."""


class InstanceStats(msgspec.Struct, frozen=True, tag=True):
    """A snapshot. Counters count from the start of the process."""

    instance_id: str
    role: Role
    status: InstanceStatus
    epoch: str = ""
    active_requests: int = 0
    """Requests that the instance knows of, in whatever state."""
    waiting_requests: int = 0
    running_requests: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    """Blocks that nobody holds, those kept as prefix cache included."""
    cached_blocks: int = 0
    """Of the free ones, those kept as prefix cache."""
    reserved_blocks: int = 0
    """Of requests that wait for a transfer. One that several of them share counts for each."""
    quarantined_blocks: int = 0
    active_transfers: int = 0
    """Each pair of ranks counts, where instances have several; in failed_transfers too."""
    buffered_bytes: int = 0
    """Bytes of unexpected transfers in the KV lookup buffer."""
    total_requests: int = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    kv_bytes_sent: int = 0
    kv_bytes_received: int = 0
    kv_transfer_time_s: float = 0.0
    failed_transfers: int = 0
    dropped_messages: int = 0
    """Late, duplicate, unknown and stale-epoch transfer messages."""
    iteration_tokens: Histogram | None = None
    """Tokens computed in one step, of all steps so far."""
    loop_lag: Histogram | None = None
    """Seconds that its event loop was late. See loop_lag.py."""
    rpc: RpcFaults = RpcFaults()


class LatencySummary(msgspec.Struct, frozen=True, tag=True):
    """A latency over the requests that ended last."""

    count: int = 0
    p50_s: float = 0.0
    p99_s: float = 0.0


class SchedulerStats(msgspec.Struct, frozen=True, tag=True):
    total_requests: int = 0
    completed_requests: int = 0
    failed_requests: int = 0
    aborted_requests: int = 0
    rejected_requests: int = 0
    waiting_requests: int = 0
    waiting_tokens: int = 0
    """Of prompts that wait in the scheduler."""
    running_requests: int = 0
    retries: int = 0
    refusals: int = 0
    """Places that an instance would not give, having enough to do."""
    local_prefills: int = 0
    """Attempts in which a decode instance computed the prompt itself."""
    success_rate: float = 1.0
    """completed / (completed + failed), in [0, 1]; 1 while nothing has ended. What callers cause does not count."""
    handoff: LatencySummary = LatencySummary()
    """See RequestFinished.handoff_s; of requests that had a second token."""
    prompt_tokens: int = 0
    """Of requests whose first token was delivered."""
    output_tokens: int = 0
    """That were delivered."""
    ended_requests: dict[str, int] = {}
    """By finish reason, or "error"."""
    failed_attempts: dict[str, int] = {}
    """By the name of the error, of those that were tried again too."""
    delay_s: dict[str, float] = {}
    """Time that requests have waited for others, by cause: see RequestRecord.delays."""
    delayed_requests: dict[str, int] = {}
    """Those that were held up for much of their time, by the main cause."""
    histograms: dict[str, Histogram] = {}
    """By the name of the metric: in seconds, bytes or tokens, as it says."""
    links: dict[str, LinkCounts] = {}
    """By "prefill > decode"."""
    http: dict[str, HttpCounts] = {}
    """Of the front ends, by method, path and status."""
    rpc: RpcFaults = RpcFaults()
    """Of the schedulers."""
    instances: list[InstanceStats] = []


class ServiceInfo(msgspec.Struct, frozen=True, tag=True):
    """What a client needs to know of a running deployment."""

    ready: bool
    model_path: str
    max_model_len: int = 0
    instances: list[InstanceInfo] = []
    digest_block_size: int = 0
    """Requests are to bring the digests of their prompts' blocks of so many tokens; 0: of none."""


ClientEvent = TokenEvent | RequestFinished

DESCRIBE: Method[Empty, InstanceInfo] = Method("instance.describe", Empty, InstanceInfo)
CONNECT: Method[ConnectRequest, Empty] = Method("instance.connect", ConnectRequest, Empty)
"""Answered when a transfer would find a link. Idempotent: at once, if there is one."""
CACHED_PREFIXES: Method[CachedPrefixesRequest, CachedPrefixes] = Method(
    "instance.cached_prefixes", CachedPrefixesRequest, CachedPrefixes
)
STATS: Method[Empty, InstanceStats] = Method("instance.stats", Empty, InstanceStats)
GENERATE: StreamMethod[GenerateRequest, TokenEvent] = StreamMethod("instance.generate", GenerateRequest, TokenEvent)
DECODE: StreamMethod[DecodeRequest, Granted | TokenEvent] = StreamMethod(
    "instance.decode", DecodeRequest, Granted | TokenEvent
)
PREFILL: StreamMethod[PrefillRequest, TokenEvent | TransferDone] = StreamMethod(
    "instance.prefill", PrefillRequest, TokenEvent | TransferDone
)
GRANT: Notification[GrantRequest] = Notification("instance.grant", GrantRequest)
END_CHOICE: Notification[EndChoice] = Notification("instance.end_choice", EndChoice)

SCHEDULER_INFO: Method[Empty, ServiceInfo] = Method("scheduler.info", Empty, ServiceInfo)
SCHEDULER_STATS: Method[Empty, SchedulerStats] = Method("scheduler.stats", Empty, SchedulerStats)
SCHEDULER_ABORT: Method[AbortRequest, Aborted] = Method("scheduler.abort", AbortRequest, Aborted)
SCHEDULER_INSTANCE_DIED: Notification[InstanceDied] = Notification("scheduler.instance_died", InstanceDied)
SCHEDULER_GENERATE: StreamMethod[GenerateRequest, ClientEvent] = StreamMethod(
    "scheduler.generate", GenerateRequest, ClientEvent
)

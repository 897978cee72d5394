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
from hbserve_rpc.plain_values import Id
from hbserve_rpc.prompt_shape import DIGEST_BYTES, MOST_REPORTED, PromptIds, PromptShape
from hbserve_rpc.sampling_params import LONGEST_TIMEOUT_S, SamplingParams

MOST_TOKENS = 1 << 22  # more than any model takes
TokenIds = Annotated[list[int], msgspec.Meta(max_length=MOST_TOKENS)]
"""Token ids. A list of over MOST_TOKENS is refused before it is decoded, which would take a second and a gigabyte."""
LeftS = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_TIMEOUT_S)] | None
"""Time left until a request's deadline when the message was sent, because clocks of two processes need not agree. The
instance ends the request by itself at the deadline. None: there is no deadline."""
Role = Literal["prefill", "decode", "hybrid"]
TokenLogprobs = dict[int, float]
"""Log-probabilities at one place, by token id: those of the most likely tokens in order, and last that of the actual
token if it is not one of them."""
FinishReason = Literal["stop", "length", "abort"]
InstanceStatus = Literal["starting", "ready", "suspect", "draining", "failed", "lost"]  # suspect, lost: said by others


class Empty(msgspec.Struct, frozen=True, tag=True):
    """A request or reply without content."""


# ---- requests ----------------------------------------------------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to generate tokens after `prompt_token_ids + output_token_ids`.

    `output_token_ids` are tokens of this request that the client already has, from an earlier attempt;
    `params.max_tokens` counts them too, and TokenEvent.index continues after them.
    """

    request_id: Id
    prompt_token_ids: PromptIds
    params: SamplingParams
    output_token_ids: TokenIds = []
    left_s: LeftS = None
    """Time left of `params.timeout_s`, or of the deployment's limit. A scheduler ignores it: the time begins there."""
    shape: PromptShape | None = None
    """Shape of the prompt, if it is a checked tuple already: its tokens are then not looked at again."""


class DecodeRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to reserve blocks for a prompt that a prefill instance will compute, and then to decode."""

    request_id: Id
    transfer_id: Id
    prompt_token_ids: PromptIds
    params: SamplingParams
    output_token_ids: TokenIds = []
    left_s: LeftS = None
    prefill_instance: Id = ""
    """Id of the prefill instance whose KV is accepted; "" is any."""


class PrefillRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to compute a prompt, emit its first token, and move its KV to where `grant` says.

    An empty `grant` moves nothing; it is used when the first token is known to be the last. A first token that turns
    out to be the last (a stop token, say) ends the transfer in order, without the blocks that were not sent yet.

    With `grant_follows` the grant comes by GRANT, and `grant` is empty. The first token is sent once the grant is
    there, or if the prompt was computed before that, once the KV has moved: a request that has to wait should wait for
    its first token, not for its second.
    """

    request_id: Id
    transfer_id: Id
    prompt_token_ids: PromptIds
    params: SamplingParams
    grant: bytes = b""
    output_token_ids: TokenIds = []
    grant_follows: bool = False
    left_s: LeftS = None


class GrantRequest(msgspec.Struct, frozen=True, tag=True):
    """The grant for a PrefillRequest with `grant_follows`. Has no effect if there is no such request (any more)."""

    request_id: Id
    grant: bytes
    """The grant; empty if nothing is to be moved because the decode instance has failed. The first token is then sent
    as soon as it is there."""


class CachedPrefixesRequest(msgspec.Struct, frozen=True, tag=True):
    """Request for the digests of the blocks that are in the prefix cache."""

    known: int = -1
    """Version that the client has already; -1: none."""


class CachedPrefixes(msgspec.Struct, frozen=True, tag=True):
    version: int
    """Version of the digests; versions are counted within one epoch."""
    digests: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES * MOST_REPORTED)] | None = None
    """Digests of the cached blocks, as in PromptShape, DIGEST_BYTES each; None: the client has this version."""


class ConnectRequest(msgspec.Struct, frozen=True, tag=True):
    """Request to connect to a decode instance, so that the first request of the pair need not wait for that."""

    kv_endpoint: bytes
    """KV endpoint in the decode instance's InstanceInfo."""


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: Id
    reason: FinishReason = "abort"
    """Finish reason that the request will have: "stop" when the client has found a stop string."""
    choice: int | None = None
    """Choice of the request that ends; None: all of them."""


class EndChoice(msgspec.Struct, frozen=True, tag=True):
    """Notice that one of several choices is no longer wanted. Has no effect if there is no such request (any more)."""

    request_id: Id
    choice: int


class InstanceDied(msgspec.Struct, frozen=True, tag=True):
    """Notice of an instance's death from whoever started it, so that nobody need wait for its heartbeats to fail."""

    instance_id: Id
    why: str


class Aborted(msgspec.Struct, frozen=True, tag=True):
    found: bool
    """Whether there was such a request that had not ended."""


# ---- what comes back ---------------------------------------------------------------------------------------------


class Granted(msgspec.Struct, frozen=True, tag=True):
    """First item of a decode stream: the blocks are reserved and the receive is posted."""

    grant: bytes
    """Grant made by the decode side's hbserve_kv and read by the prefill side's; opaque to the scheduler."""
    num_cached_tokens: int = 0
    """Number of prompt tokens whose KV the decode instance holds already; it is not moved."""


class TokenEvent(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of one choice of a request, from one engine step or several."""

    index: int
    """Place of `token_ids[0]` among the choice's output tokens; 0 is the first.

    A receiver that already has these tokens drops them.
    """
    token_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=MOST_TOKENS)]
    """New tokens. They are checked where they are read from a wire, and nowhere again."""
    finish_reason: FinishReason | None = None
    """Reason why the choice ended; set on its last event, and only there."""
    logprobs: list[TokenLogprobs] = []
    """Log-probabilities at each of `token_ids`, if the request asks for them."""
    prompt_logprobs: list[TokenLogprobs] = []
    """Log-probabilities at each prompt token but the first, if the request asks for them. They come with output token
    0; of several choices, with that of the first one."""
    choice: int = 0
    """Number of the choice, from 0 to `SamplingParams.n` - 1."""
    num_preemptions: int = 0
    """Number of times that it gave its blocks up to others on its instance so far, and was computed again."""


class Milestone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Progress some time before the message about it was sent. The time is an age, because clocks of two processes need
    not agree; the message's way adds less than a round trip to it."""

    age_s: float
    count: int


class TransferDone(msgspec.Struct, frozen=True, tag=True):
    """Last item of a prefill stream that moved KV."""

    num_bytes: int
    num_parts: int
    time_s: float
    """Time during which at least one part of this transfer was moving."""
    num_cached_tokens: int = 0
    """Number of prompt tokens that the prefill instance took from its prefix cache."""
    computed: list[Milestone] = []
    """Number of prompt tokens computed, after each chunk."""
    pushed: list[Milestone] = []
    """Number of blocks handed to the transfer, after each part."""


class RequestFinished(msgspec.Struct, frozen=True, tag=True):
    """Last item of a client's stream; each of `SamplingParams.n` choices has one. Times are in seconds, by the
    scheduler's clock."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_output_tokens: int
    queue_time_s: float
    """Time from submission until the request is first handed to an instance."""
    ttft_s: float
    """Time to first token, from submission."""
    tpot_s: float
    """Mean time per output token after the first; 0 when there is only one."""
    e2e_s: float
    """Time from submission to the end."""
    handoff_s: float = 0.0
    """Time from the first token to the second: with prefill and decode apart, how long the request stood still while it
    changed hands; on a hybrid instance, a step. 0 if there is no second token, or both came at once."""
    kv_bytes: int = 0
    """Bytes of KV moved for the request until then. Each of several choices has the figure, but it was moved once."""
    kv_transfer_time_s: float = 0.0
    num_cached_tokens: int = 0
    num_attempts: int = 1
    prefill_instance: Id = ""
    decode_instance: str = ""
    choice: int = 0


class InstanceInfo(msgspec.Struct, frozen=True, tag=True):
    """Description of an instance. It is constant for one epoch once `status` is no longer "starting"."""

    instance_id: Id
    role: Role
    epoch: str
    """Id of one life of the instance: of its process, and in this role."""
    status: InstanceStatus
    model: str = ""
    """Path or name that the model was loaded from."""
    max_model_len: int = 0
    """Largest number of tokens in one sequence, prompt and output together."""
    max_num_seqs: int = 0
    """Largest number of sequences in one step."""
    max_prompt_len: int = 0
    """Largest number of prompt tokens that the instance can take."""
    vocab_size: int = 0
    block_size: int = 0
    num_blocks: int = 0
    kv_backend: str = ""
    kv_endpoint: bytes = b""
    """Endpoint where a decode instance receives KV; made and read by hbserve_kv, and opaque to the scheduler."""
    device: str = ""
    dtype: str = ""
    pid: int = 0
    error: str = ""
    """Reason why `status` is "failed"."""
    serves_generate: bool = False
    """Whether a decode instance also computes prompts, where there is nobody else to do it."""
    started_as: Role | None = None
    """Role that the instance was started with, if it has another one now: see `members.INSTANCE_FLIP`."""


class InstanceStats(msgspec.Struct, frozen=True, tag=True):
    """Snapshot of an instance. Its counters count from the start of the process."""

    instance_id: Id
    role: Role
    status: InstanceStatus
    epoch: str = ""
    active_requests: int = 0
    """Number of requests that the instance knows of, in whatever state."""
    waiting_requests: int = 0
    running_requests: int = 0
    num_blocks: int = 0
    free_blocks: int = 0
    """Number of blocks that nobody holds, including those kept as prefix cache."""
    cached_blocks: int = 0
    """Number of free blocks that are kept as prefix cache."""
    reserved_blocks: int = 0
    """Number of blocks of requests that wait for a transfer. A block that several of them share counts for each."""
    quarantined_blocks: int = 0
    active_transfers: int = 0
    """Number of transfers under way. Like failed_transfers, it counts each pair of ranks if instances have several."""
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
    """Number of late, duplicate, unknown and stale-epoch transfer messages."""
    iteration_tokens: Histogram | None = None
    """Numbers of tokens computed in one step, for all steps so far."""
    loop_lag: Histogram | None = None
    """Seconds for which the instance's event loop was late: see loop_lag.py."""
    rpc: RpcFaults = RpcFaults()


class LatencySummary(msgspec.Struct, frozen=True, tag=True):
    """Percentiles of a latency over the requests that ended last."""

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
    """Number of tokens in prompts that wait in the scheduler."""
    running_requests: int = 0
    retries: int = 0
    refusals: int = 0
    """Number of times that an instance refused a request because it had enough to do."""
    local_prefills: int = 0
    """Number of attempts in which a decode instance computed the prompt itself."""
    success_rate: float = 1.0
    """completed / (completed + failed), in [0, 1]; 1 while nothing has ended. Errors of callers are not counted."""
    handoff: LatencySummary = LatencySummary()
    """Summary of RequestFinished.handoff_s, for requests that had a second token."""
    prompt_tokens: int = 0
    """Number of prompt tokens of requests whose first token was delivered."""
    output_tokens: int = 0
    """Number of output tokens that were delivered."""
    ended_requests: dict[str, int] = {}
    """Number of requests that ended, by finish reason, or "error"."""
    failed_attempts: dict[str, int] = {}
    """Number of failed attempts, by name of the error; includes those that were tried again."""
    delay_s: dict[str, float] = {}
    """Time that requests have waited for others, by cause: see RequestRecord.delays."""
    delayed_requests: dict[str, int] = {}
    """Number of requests that were held up for much of their time, by the main cause."""
    histograms: dict[str, Histogram] = {}
    """Histograms in seconds, bytes or tokens, by name of the metric, which says the unit."""
    links: dict[str, LinkCounts] = {}
    """Counts of each link, by "prefill > decode"."""
    http: dict[str, HttpCounts] = {}
    """Counts of the front ends' HTTP requests, by method, path and status."""
    rpc: RpcFaults = RpcFaults()
    """Faults of the schedulers' RPC servers."""
    instances: list[InstanceStats] = []


class ServiceInfo(msgspec.Struct, frozen=True, tag=True):
    """Description of a running deployment for its clients."""

    ready: bool
    model_path: str
    max_model_len: int = 0
    instances: list[InstanceInfo] = []
    digest_block_size: int = 0
    """Block size, in tokens, of the digests that requests should have in their prompt's shape; 0: they need none."""


ClientEvent = TokenEvent | RequestFinished

DESCRIBE: Method[Empty, InstanceInfo] = Method("instance.describe", Empty, InstanceInfo)
CONNECT: Method[ConnectRequest, Empty] = Method("instance.connect", ConnectRequest, Empty)
"""Method that is answered once a transfer would find a link; at once if there is one. It is idempotent."""
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

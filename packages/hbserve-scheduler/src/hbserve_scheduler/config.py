"""Settings of a deployment: one struct for each section of the YAML file, with the same names.

Settings that apply unchanged to every instance come from `hbserve_rpc.settings`, and are not repeated here.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from hbserve_rpc.messages import Role
from hbserve_rpc.settings import (
    ENGINE_KEYS,
    NOT_NEGATIVE,
    PORT,
    POSITIVE,
    Bounds,
    EngineSettings,
    KVTransferSettings,
    misfits,
)
from hbserve_scheduler.errors import ConfigError

S = TypeVar("S", bound=msgspec.Struct)


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a configuration that is checked wherever it is made: in Python, where msgspec itself checks nothing, as
    well as in a file.

    Raises:
        ConfigError: (a ValueError) a value is not allowed; names the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for _, problem in misfits(self):
            raise ConfigError(problem)


def _with_engine_keys(section: str) -> Callable[[type[S]], type[S]]:
    """Return a class decorator that adds the EngineSettings of this section, under their names in the file.

    Type checkers do not see the added fields. Read them from `DeploymentConfig.engine_settings()`.
    """
    settings = {field.name: field for field in msgspec.structs.fields(EngineSettings)}
    keys = {key: settings[name] for name, (place, key) in ENGINE_KEYS.items() if place == section}

    def add(struct: type[S]) -> type[S]:
        return msgspec.defstruct(  # type: ignore[return-value]  # of the class that is its base
            struct.__name__,
            [(key, field.type, field.default) for key, field in keys.items()],
            bases=(struct,),
            module=struct.__module__,
            namespace={"__doc__": struct.__doc__},
            frozen=True,
            kw_only=True,
            forbid_unknown_fields=True,
        )

    return add


@_with_engine_keys("model")
class ModelSection(Section, frozen=True, kw_only=True):
    """Settings of the model and of how it is loaded."""

    path: str | None = None
    """Path of a Hugging Face model folder; None is the demo model."""


class KVTransferSection(Section, KVTransferSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of how instances move KV and where they listen for it."""

    buffer_size: int | str = KVTransferSettings().buffer_size  # type: ignore[assignment]  # not yet plain
    """Size of each instance's lookup buffer, in bytes or as a text like "512MiB"."""
    ip: str | None = None
    """Address that KV listeners bind and advertise; None is each instance's own `host`."""
    port: Annotated[int, PORT] = 0
    """Port for KV: the instance with kv_rank r listens at this port + r. 0 lets the OS choose, as it always does for an
    instance's TP ranks beyond the first."""


@_with_engine_keys("chunked_prefill")
class ChunkedPrefillSection(Section, frozen=True, kw_only=True):
    """Settings of chunked prefill, which computes prompts piece by piece."""


@_with_engine_keys("cuda_graph")
class CudaGraphSection(Section, frozen=True, kw_only=True):
    """Settings of what runs in CUDA graphs."""


class InstanceSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one instance, or of all those that are found by one name."""

    instance_id: str = ""
    """Name of the instance; required unless `discover` is given, and empty with it."""
    instance_type: Role
    """What the instance computes: prompts (prefill), the tokens after the first one (decode), or both (hybrid)."""
    discover: str | None = None
    """DNS name in the form dns:NAME:PORT. The entry then stands for all instances of this type that answer at an
    address of this name; they have ids of their own."""
    gpu_id: Annotated[int | None, NOT_NEGATIVE] = None
    """First CUDA device of the instance; None assigns devices by `kv_rank`."""
    host: str = "127.0.0.1"
    """Address at which the instance listens, and at which the scheduler and its peers connect to it: an IP address of
    its machine, or a name."""
    port: Annotated[int, PORT] = 0
    """Port of the instance's RPC server; 0 lets the OS choose."""
    kv_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Number of the instance, by which it differs from all others. It is added to `kv_transfer.port` and
    `engine.health_port`, and without `gpu_id` it assigns devices."""
    tensor_parallel_size: Annotated[int | None, POSITIVE] = None
    """Number of ranks of this instance, on GPUs from `gpu_id` on; None is `model.tensor_parallel_size`."""


@_with_engine_keys("engine")
class EngineSection(Section, frozen=True, kw_only=True):
    """Settings of each instance's engine: its sizes, and where it runs."""


class SchedulerConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of how one scheduler chooses instances and waits for them."""

    host: str = "127.0.0.1"
    """Address at which the scheduler listens for clients; 0.0.0.0 and :: are every address of its machine."""
    port: Annotated[int, PORT] = 5550
    """Port of the scheduler's RPC server; 0 lets the OS choose."""
    health_port: Annotated[int | None, PORT] = None
    """HTTP port for /health, /ready and /metrics; 0 lets the OS choose, None opens no such port."""
    prefill_policy: str = "auto"
    """Policy that chooses a request's prefill instance: auto (the least loaded one, or the less loaded of two while
    other schedulers use the same instances), round_robin, least_loaded, power_of_two, prefix_aware, the name of an
    entry point in the group `hbserve_scheduler.policies`, or `module:Class`."""
    decode_policy: str = "auto"
    """Policy that chooses a request's decode instance, or its hybrid one; the choices are those of `prefill_policy`."""
    local_prefill_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """Number of prompt tokens below which a decode instance computes the prompt itself, and no KV is moved. Tokens in
    its prefix cache are not counted. 0: it never does."""
    local_prefill_fallback: bool = True
    """Whether decode instances compute prompts while no prefill instance is ready. Otherwise requests wait."""
    max_queue_size: Annotated[int, POSITIVE] = 4096
    """Largest number of waiting requests; more are refused as overload."""
    max_queue_time_s: Annotated[float, Bounds(0.01)] = 30.0
    """Longest expected wait; a request that would wait longer is refused as overload. The wait is predicted from the
    rate at which requests were begun while others had to wait."""
    max_attempts: Annotated[int, POSITIVE] = 3
    """Largest number of attempts at one request, the first included."""
    request_timeout_s: Annotated[float | None, Bounds(0.001)] = None
    """Time after which a request ends with an error; None is never."""
    instance_wait_s: Annotated[float, Bounds(0.1)] = 30.0
    """Longest time that requests wait while there is no instance of a role that they need, not even one that loads its
    model. Requests between two attempts wait as long."""
    heartbeat_interval_s: Annotated[float, Bounds(0.05)] = 1.0
    """Time between two heartbeats to an instance."""
    heartbeat_timeout_s: Annotated[float, Bounds(0.1)] = 10.0
    """Time of silence after which an instance counts as lost."""
    max_pending_reservations: Annotated[int, POSITIVE] = 8
    """Largest number of requests that wait for room on one decode instance. Others wait in the scheduler, where their
    order can still change. It is also the largest number of prompts computed before the instance has granted room."""
    max_inflight_prefills: Annotated[int, POSITIVE] = 32
    """Largest number of prompts that are with one prefill instance."""
    max_warm_links: Annotated[int, NOT_NEGATIVE] = 8
    """Largest number of one instance's links that are made before a request needs them: from a prefill instance to
    decode instances, or to a decode instance from prefill instances. 0: each link is made by its first request."""
    max_inflight_requests: Annotated[int, POSITIVE] = 512
    """Largest number of requests that are with one hybrid instance."""

    def shared_among(self, count: int) -> "SchedulerConfig":
        """Return the configuration for each of `count` schedulers of the same instances: the sum of their bounds is
        about what one scheduler would have."""
        bounds = ("max_queue_size", "max_pending_reservations", "max_inflight_prefills", "max_inflight_requests")
        return msgspec.structs.replace(self, **{name: -(-getattr(self, name) // count) for name in bounds})


class ServerSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the OpenAI server of `hbserve serve`; docs/openai-server.md says what it serves."""

    enabled: bool = True
    """Whether `hbserve serve` has the OpenAI server. Otherwise it opens only the scheduler's RPC port."""
    host: str = "127.0.0.1"
    """Address at which the server listens for clients; 0.0.0.0 and :: are every address of its machine."""
    port: Annotated[int, PORT] = 8000
    """Port of the HTTP server; 0 lets the OS choose."""
    uds: str | None = None
    """Path of a Unix domain socket that is used instead of `host` and `port`."""
    api_servers: Annotated[int, Bounds(1, 64)] = 1
    """Number of processes that serve this address, each with a scheduler of its own over the same instances."""
    root_path: str = ""
    """Path under which a proxy makes the server available."""
    served_model_names: list[str] = []
    """Names of the model that requests may use; answers have the first one. Empty: the name of the model's folder."""
    api_key: str | None = None
    """Key that clients must send. If no key is set, clients need none."""
    api_key_file: str | None = None
    """File with further keys, one on each line; it is read again when it has changed."""
    cors_origins: list[str] = []
    """Origins whose web pages may send requests to this server; "*" is all."""
    ssl_keyfile: str | None = None
    """File of the private key. With `ssl_certfile` it makes the server speak HTTPS."""
    ssl_certfile: str | None = None
    """File of the certificate. Neither works without the other."""
    chat_template: str | None = None
    """File of a Jinja template, or its text, that replaces the model's chat template."""
    default_chat_template_kwargs: dict[str, Any] = {}
    """Arguments that the chat template gets unless a request has others."""
    generation_config: Literal["auto", "none"] = "auto"
    """Source of sampling parameters that a request leaves out: "auto" takes them from the model's
    generation_config.json, "none" uses the server's own defaults."""
    first_byte_timeout_s: Annotated[float, Bounds(0.01)] = 30.0
    """Longest time that a streamed answer waits for its first token, with which the status line is sent. After that it
    begins without one."""
    drain_timeout_s: Annotated[float, Bounds(0.0)] = 30.0
    """Longest time that answers which have begun may still take when the server is stopped."""
    max_body_size: int | str = "16MiB"
    """Largest body of a request, in bytes or as a text like "16MiB"."""


class SecuritySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of who may reach the deployment's processes, except for the OpenAI server, which has API keys."""

    keys: str | None = None
    """Folder made by `hbserve keys`. Processes recognise each other by the keys in it."""
    allow_insecure: bool = False
    """Whether processes without keys may listen at addresses that other hosts can reach."""


class RaySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of where `hbserve serve --ray` places instances; docs/ray.md says how."""

    place: Literal["any", "pair"] = "any"
    """Way in which instances are placed. any: each on any node that has room for it; pair: the first prefill and the
    first decode instance on one node, the second of each on the same node, and so on."""
    resources: dict[Role, dict[str, float]] = {}
    """Amounts of its node's Ray resources that each instance of a role takes in addition to cores and GPUs."""
    accelerator_type: dict[Role, str] = {}
    """Kind of GPU for each role, by Ray's name for it, such as H100."""


def default_instances() -> list[InstanceSection]:
    """Return one prefill and one decode instance on this host, on ports that the OS chooses."""
    roles: list[Role] = ["prefill", "decode"]
    return [
        InstanceSection(instance_id=f"{role}-0", instance_type=role, kv_rank=rank) for rank, role in enumerate(roles)
    ]


class DeploymentConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a whole deployment: the YAML file."""

    model: ModelSection = ModelSection()
    kv_transfer: KVTransferSection = KVTransferSection()
    chunked_prefill: ChunkedPrefillSection = ChunkedPrefillSection()
    cuda_graph: CudaGraphSection = CudaGraphSection()
    gpu_instances: list[InstanceSection] = msgspec.field(default_factory=default_instances)
    """Instances, one by one or by the name at which they are found."""
    engine: EngineSection = EngineSection()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerSection = ServerSection()
    security: SecuritySection = SecuritySection()
    ray: RaySection = RaySection()

    @property
    def named_instances(self) -> list[InstanceSection]:
        """Instances that the file lists one by one instead of by `discover`."""
        return [each for each in self.gpu_instances if each.discover is None]

    def engine_settings(self) -> EngineSettings:
        """Return the EngineSettings of all sections, under their names in Python."""
        values = {name: getattr(getattr(self, section), key) for name, (section, key) in ENGINE_KEYS.items()}
        return EngineSettings(**values)

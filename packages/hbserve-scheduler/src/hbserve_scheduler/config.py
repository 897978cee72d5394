"""Settings of a deployment: one struct for each section of the YAML file, with the same names.

Settings that every instance takes as they are come from `hbserve_rpc.settings`, and are not repeated here.
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
    """A part of a configuration, which is checked wherever it is made: in Python, of which msgspec checks nothing, as
    in a file.

    Raises:
        ConfigError: (a ValueError) names the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        for _, problem in misfits(self):
            raise ConfigError(problem)


def _with_engine_keys(section: str) -> Callable[[type[S]], type[S]]:
    """Class decorator: adds the EngineSettings of this section, under their names in the file.

    Type checkers do not see them in the section: read them from `DeploymentConfig.engine_settings()`.
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
    """The model, and how it is loaded."""

    path: str | None = None
    """A Hugging Face model folder; None is the demo model."""


class KVTransferSection(Section, KVTransferSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How instances move KV, and where they listen for it."""

    buffer_size: int | str = KVTransferSettings().buffer_size  # type: ignore[assignment]  # not yet plain
    """Bytes of each instance's lookup buffer, or a text like "512MiB"."""
    ip: str | None = None
    """Address that KV listeners bind and advertise; None is each instance's own host."""
    port: Annotated[int, PORT] = 0
    """Instance with kv_rank r listens at port + r; 0 lets the OS choose, as it does for the further ranks of one."""


@_with_engine_keys("chunked_prefill")
class ChunkedPrefillSection(Section, frozen=True, kw_only=True):
    """How prompts are computed piece by piece."""


@_with_engine_keys("cuda_graph")
class CudaGraphSection(Section, frozen=True, kw_only=True):
    """What runs in CUDA graphs."""


class InstanceSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    instance_id: str = ""
    """Its name; none with `discover`."""
    instance_type: Role
    discover: str | None = None
    """dns:NAME:PORT: all instances of this type that answer at an address of this name, with ids of their own."""
    gpu_id: Annotated[int | None, NOT_NEGATIVE] = None
    """CUDA device; None shares the devices out by rank."""
    host: str = "127.0.0.1"
    """Where it serves, and where the scheduler and its peers dial it: an IP address of its machine, or a name."""
    port: Annotated[int, PORT] = 0
    kv_rank: Annotated[int, NOT_NEGATIVE] = 0
    tensor_parallel_size: Annotated[int | None, POSITIVE] = None
    """Ranks of this instance, on GPUs from `gpu_id` on; None is `model.tensor_parallel_size`."""


@_with_engine_keys("engine")
class EngineSection(Section, frozen=True, kw_only=True):
    """Sizes of each instance's engine, and where it runs."""


class SchedulerConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one scheduler chooses instances and waits for them."""

    host: str = "127.0.0.1"
    """Where it serves clients; 0.0.0.0 and :: are every address of its machine."""
    port: Annotated[int, PORT] = 5550
    health_port: Annotated[int | None, PORT] = None
    """HTTP port for /health, /ready and /metrics; 0 lets the OS choose, None is none."""
    prefill_policy: str = "auto"
    """Which instance takes the next request: auto (the least loaded one, or while other schedulers use the same
    instances the less loaded of two), round_robin, least_loaded, power_of_two, prefix_aware, the name of an entry point
    in the group `hbserve_scheduler.policies`, or `module:Class`."""
    decode_policy: str = "auto"
    """Of hybrid instances too."""
    local_prefill_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """A prompt of which fewer tokens than so many are not cached on a decode instance is computed there, and nothing is
    moved. 0: none is."""
    local_prefill_fallback: bool = True
    """Where no prefill instance is ready, decode instances compute prompts. False: requests wait."""
    max_queue_size: Annotated[int, POSITIVE] = 4096
    """Requests beyond this are refused as overload."""
    max_queue_time_s: Annotated[float, Bounds(0.01)] = 30.0
    """As is a request that would wait longer, by the rate at which others were begun while some had to wait."""
    max_attempts: Annotated[int, POSITIVE] = 3
    request_timeout_s: Annotated[float | None, Bounds(0.001)] = None
    """A request ends with an error after so long; None is never."""
    instance_wait_s: Annotated[float, Bounds(0.1)] = 30.0
    """How long requests wait while no instance of a role is there."""
    heartbeat_interval_s: Annotated[float, Bounds(0.05)] = 1.0
    heartbeat_timeout_s: Annotated[float, Bounds(0.1)] = 10.0
    max_pending_reservations: Annotated[int, POSITIVE] = 8
    """Requests that may wait for room on one decode instance; others wait here, where their order can still change. No
    more prompts are computed before it has granted."""
    max_inflight_prefills: Annotated[int, POSITIVE] = 32
    """Prompts that may be with one prefill instance."""
    max_warm_links: Annotated[int, NOT_NEGATIVE] = 8
    """Links of one instance that are made before a request needs them: a prefill instance's to decode instances, a
    decode instance's from prefill instances. 0: each is made by its first request."""
    max_inflight_requests: Annotated[int, POSITIVE] = 512
    """Requests that may be with one hybrid instance."""

    def shared_among(self, count: int) -> "SchedulerConfig":
        """The configuration of each of so many schedulers of the same instances: together their bounds are about those
        of one."""
        bounds = ("max_queue_size", "max_pending_reservations", "max_inflight_prefills", "max_inflight_requests")
        return msgspec.structs.replace(self, **{name: -(-getattr(self, name) // count) for name in bounds})


class ServerSection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI server of `hbserve serve`; docs/openai-server.md says what it serves."""

    enabled: bool = True
    host: str = "127.0.0.1"
    """Where it serves clients; 0.0.0.0 and :: are every address of its machine."""
    port: Annotated[int, PORT] = 8000
    """0 lets the OS choose."""
    uds: str | None = None
    """Path of a Unix domain socket, in place of `host` and `port`."""
    api_servers: Annotated[int, Bounds(1, 64)] = 1
    """Processes that serve this address, each with a scheduler of its own over the same instances."""
    root_path: str = ""
    """Path under which a proxy shows the server."""
    served_model_names: list[str] = []
    """Names of the model in requests, the first one in answers; none is the name of its folder."""
    api_key: str | None = None
    """Clients must send it; none asks for none."""
    api_key_file: str | None = None
    """File with one more key on each line; read again when it has changed."""
    cors_origins: list[str] = []
    """Origins whose pages may ask this server; "*" is all."""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    """With both, the server speaks HTTPS."""
    chat_template: str | None = None
    """File of a Jinja template, or its text, in place of the model's."""
    default_chat_template_kwargs: dict[str, Any] = {}
    """What templates are given unless a request says otherwise."""
    generation_config: Literal["auto", "none"] = "auto"
    """Whether what a request does not say is as the model's generation_config.json has it."""
    first_byte_timeout_s: Annotated[float, Bounds(0.01)] = 30.0
    """The status line is sent with the first token; a streamed answer that has none for so long begins without it."""
    drain_timeout_s: Annotated[float, Bounds(0.0)] = 30.0
    """At the end, how long answers that have begun may take."""
    max_body_size: int | str = "16MiB"
    """Largest body of a request, in bytes or as a text like "16MiB"."""


class SecuritySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may reach the deployment's processes; the OpenAI server apart, which has API keys."""

    keys: str | None = None
    """Folder that `hbserve keys` has made: processes know each other by the keys that are in it."""
    allow_insecure: bool = False
    """Without keys, listen also where others than this host reach it."""


class RaySection(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where `hbserve serve --ray` places instances; docs/ray.md says how."""

    place: Literal["any", "pair"] = "any"
    """any: each instance on a node that has room for it; pair: the first prefill and the first decode instance on one
    node, and so on."""
    resources: dict[Role, dict[str, float]] = {}
    """Of Ray's nodes, what each instance of a role takes beside its cores and GPUs."""
    accelerator_type: dict[Role, str] = {}
    """Kind of GPU for a role, as Ray calls it, such as H100."""


def default_instances() -> list[InstanceSection]:
    """One prefill and one decode instance on this host, on ports that the OS chooses."""
    roles: list[Role] = ["prefill", "decode"]
    return [
        InstanceSection(instance_id=f"{role}-0", instance_type=role, kv_rank=rank) for rank, role in enumerate(roles)
    ]


class DeploymentConfig(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment: the whole YAML file."""

    model: ModelSection = ModelSection()
    kv_transfer: KVTransferSection = KVTransferSection()
    chunked_prefill: ChunkedPrefillSection = ChunkedPrefillSection()
    cuda_graph: CudaGraphSection = CudaGraphSection()
    gpu_instances: list[InstanceSection] = msgspec.field(default_factory=default_instances)
    engine: EngineSection = EngineSection()
    scheduler: SchedulerConfig = SchedulerConfig()
    server: ServerSection = ServerSection()
    security: SecuritySection = SecuritySection()
    ray: RaySection = RaySection()

    @property
    def named_instances(self) -> list[InstanceSection]:
        """The instances that the file has one by one, and not by `discover`."""
        return [each for each in self.gpu_instances if each.discover is None]

    def engine_settings(self) -> EngineSettings:
        """Settings of the sections as every instance takes them."""
        values = {name: getattr(getattr(self, section), key) for name, (section, key) in ENGINE_KEYS.items()}
        return EngineSettings(**values)

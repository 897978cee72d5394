"""Configuration of one instance: everything that it needs to know to run."""

from typing import Annotated

import msgspec

from hbserve_core.errors import InvalidInstanceConfig
from hbserve_kv.config import KVTransferConfig
from hbserve_rpc import InvalidAddress, Keys, check_peer_host, parse_address
from hbserve_rpc.messages import Role
from hbserve_rpc.settings import NOT_NEGATIVE, PORT, EngineSettings, misfits

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class InstanceConfig(  # type: ignore[misc]  # EngineSettings are not frozen, because PdDisaggConfig is not
    EngineSettings, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """Configuration of one engine and of the instance process around it: EngineSettings, and settings of its own.

    Numbers, host and log level are checked here. What depends on the model or the device is checked when the model is
    loaded.

    Raises:
        InvalidInstanceConfig: (a ValueError) its message names the field, the value and what is allowed.
    """

    instance_id: str = "hybrid-0"
    """Name of the instance."""
    role: Role = "hybrid"
    """What the instance computes: prompts (prefill), the tokens after the first one (decode), or both (hybrid)."""
    model_path: str
    """Path of a Hugging Face model folder."""
    gpu_id: int | None = None
    """CUDA device with device "auto"; None distributes instances over the devices by kv_rank."""
    num_local_instances: int = 1
    """Number of instances of the same deployment that share this host's devices."""
    num_on_gpu: int | None = None
    """Number of those instances that share this one's GPU; None: as many as the distribution by kv_rank gives it."""
    host: str = "127.0.0.1"
    """Host at which the RPC server listens and is dialled: an IP address without brackets, or a name; no wildcard."""
    port: Annotated[int, PORT] = 0
    """Port of the instance's RPC server; 0 lets the OS choose."""
    schedulers: tuple[str, ...] = ()
    """Schedulers, as `host:port`, with which the instance registers itself once it serves."""
    kv_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Number of the instance, by which it differs from all others of its deployment."""
    kv_transfer: KVTransferConfig = msgspec.field(default_factory=KVTransferConfig)
    """How and where the instance moves KV. A hybrid one moves none."""
    keys: Keys | None = None
    """Keys of an instance, for everything that it serves and dials. With them, only schedulers that have keys reach its
    RPC."""
    log_level: str = "INFO"
    """Lowest level of what the instance's process logs, one of LOG_LEVELS."""

    def __post_init__(self) -> None:
        for name, problem in misfits(self):
            # The model has a limit of max_model_len too, which is reported together with this one when it is loaded.
            if name != "max_model_len" or not isinstance(self.max_model_len, int):
                raise InvalidInstanceConfig(problem)
        try:
            check_peer_host(self.host)
        except InvalidAddress as error:
            raise InvalidInstanceConfig(f"host={error}") from None
        try:
            for scheduler in self.schedulers:
                parse_address(scheduler)
        except InvalidAddress as error:
            raise InvalidInstanceConfig(f"schedulers: {error}") from None
        if self.log_level not in LOG_LEVELS:
            raise InvalidInstanceConfig(f"log_level={self.log_level!r}: expected one of {', '.join(LOG_LEVELS)}")

"""Everything that one instance needs to know to run."""

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
    """Configuration of one engine, and of the instance process around it: EngineSettings, and what is its own.

    Numbers, host and log level are checked here; what depends on the model or the device when the model is loaded.

    Raises:
        InvalidInstanceConfig: (a ValueError) names the field, the value and what is allowed.
    """

    instance_id: str = "hybrid-0"
    role: Role = "hybrid"
    model_path: str
    """A Hugging Face model folder."""
    gpu_id: int | None = None
    """With device "auto": which CUDA device; None shares them out by kv_rank."""
    num_local_instances: int = 1
    """Instances of the same deployment that share this host's devices."""
    num_on_gpu: int | None = None
    """How many of them share this one's GPU; None: as sharing out by kv_rank has it."""
    host: str = "127.0.0.1"
    """Where its RPC server listens and is dialled: an IP address without brackets, or a name; no wildcard."""
    port: Annotated[int, PORT] = 0
    """Port of the instance's RPC server; 0 lets the OS choose."""
    schedulers: tuple[str, ...] = ()
    """`host:port` of those that it registers itself with, once it serves."""
    kv_rank: Annotated[int, NOT_NEGATIVE] = 0
    kv_transfer: KVTransferConfig = msgspec.field(default_factory=KVTransferConfig)
    keys: Keys | None = None
    """An instance's, for all that it serves and dials. Only schedulers with keys then reach its RPC."""
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        for name, problem in misfits(self):
            # The model has a limit too, which is named with this one when it is loaded.
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

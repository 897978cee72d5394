"""PdDisaggConfig: the configuration of a deployment in flat fields, for Python code that starts one."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hbserve_kv.config import KVTransferBackend
from hbserve_rpc.settings import ENGINE_KEYS, EngineSettings
from hbserve_scheduler import ConfigError, DeploymentConfig, InstanceSection, convert
from hbserve_scheduler.config import KVTransferSection, SecuritySection, default_instances

_KV = KVTransferSection()


class _Keywords(EngineSettings, kw_only=True):
    """Fields of PdDisaggConfig that are given by keyword: the keys of all sections of the file. Those that begin with
    `kv_` are described in KVTransferSection."""

    kv_transfer_backend: KVTransferBackend | str = KVTransferBackend(_KV.backend)
    kv_buffer_size: int | str = _KV.buffer_size
    kv_ip: str | None = _KV.ip
    kv_port: int = _KV.port
    kv_timeout_s: float = _KV.timeout_s
    kv_checksum: bool = _KV.checksum
    kv_options: dict[str, Any] = msgspec.field(default_factory=dict)
    gpu_instances: Sequence[InstanceSection | Mapping[str, Any]] = msgspec.field(default_factory=default_instances)
    """Instances of the deployment, with the keys of the YAML section of the same name."""
    scheduler: dict[str, Any] = msgspec.field(default_factory=dict)
    """Keys of the YAML section `scheduler`."""
    keys: str | None = None
    """Folder that `hbserve keys` has made. None: instances that this process starts get keys of their own."""
    allow_insecure: bool = False
    """Whether processes without keys may listen at addresses that other hosts can reach."""


class PdDisaggConfig(_Keywords):
    """Configuration of a DisaggregatedLLM. Fields may be set until its `start()`, which checks them again. A misspelt
    one is an AttributeError.

    docs/configuration.md has all fields; EngineSettings describes those that every instance takes as they are.

    Raises:
        ConfigError: (a ValueError) a field has an invalid value. Names the field, the value, and what is allowed.
    """

    model_path: str | Path | None = None
    """A Hugging Face model folder; None is the demo model."""

    def __post_init__(self) -> None:
        self.to_deployment()

    def to_deployment(self) -> DeploymentConfig:
        """Convert to a DeploymentConfig, and check it. Raises ConfigError."""
        content: dict[str, Any] = {"scheduler": self.scheduler}
        for name, (section, key) in PATHS.items():
            content.setdefault(section, {})[key] = getattr(self, name)
        content["model"]["path"] = None if self.model_path is None else str(self.model_path)
        content["kv_transfer"]["backend"] = str(self.kv_transfer_backend)
        several = self.gpu_instances
        content["gpu_instances"] = (
            [msgspec.to_builtins(each) if isinstance(each, InstanceSection) else each for each in several]
            if isinstance(several, Sequence) and not isinstance(several, (str, bytes))
            else several
        )
        try:
            config = convert(content)
        except ConfigError as error:
            raise ConfigError(_in_field_names(str(error))) from None
        for i, each in enumerate(config.gpu_instances):
            if each.discover is not None:
                problem = (
                    "expected none here, where all instances are started; `hbserve serve` and `scheduler` look it up"
                )
                raise ConfigError(f"gpu_instances[{i}].discover={each.discover!r}: {problem}")
        return config

    @classmethod
    def from_deployment(cls, config: DeploymentConfig) -> "PdDisaggConfig":
        """Convert a configuration file's content to flat fields; see `hbserve_scheduler.load_config`."""
        values = {name: getattr(getattr(config, section), key) for name, (section, key) in PATHS.items()}
        return cls(**values, gpu_instances=config.gpu_instances, scheduler=msgspec.to_builtins(config.scheduler))


PATHS = {
    "model_path": ("model", "path"),
    "kv_transfer_backend": ("kv_transfer", "backend"),
    **{f"kv_{key}": ("kv_transfer", key) for key in KVTransferSection.__struct_fields__ if key != "backend"},
    **{key: ("security", key) for key in SecuritySection.__struct_fields__},
    **ENGINE_KEYS,
}
"""Section of the YAML file, and key in it, of each field of PdDisaggConfig."""


def _in_field_names(message: str) -> str:
    """Put the field's name for the file's key in an error's message: `chunk_size` for `chunked_prefill.chunk_size`."""
    names = {f"{section}.{key}": name for name, (section, key) in PATHS.items()}
    return re.sub(r"^[\w.]+", lambda found: names.get(found[0], found[0]), message)

"""Keys of a deployment, and the warning if it has none and others can reach it."""

import logging
from collections.abc import Iterator
from importlib.metadata import version

from hbserve_rpc import Keys, load_keys
from hbserve_rpc.address import is_loopback
from hbserve_rpc.keys import Party
from hbserve_scheduler.config import DeploymentConfig
from hbserve_scheduler.errors import ConfigError

logger = logging.getLogger(__name__)

REFUSED_FROM = (0, 2)
"""Version from which on a deployment without keys that others can reach must be declared as intended."""


def deployment_keys(config: DeploymentConfig, party: Party) -> Keys | None:
    """Load the keys of one party. Return None if the deployment has no keys.

    Raises:
        KeysError: (a ValueError) the party's file cannot be used.
    """
    return load_keys(config.security.keys, party) if config.security.keys is not None else None


def require_keys(config: DeploymentConfig, *, launched: bool) -> None:
    """Warn about addresses at which anybody would be served; from version REFUSED_FROM on, refuse them.

    launched: whether one process starts all instances, which then have keys of their own in any case.

    Raises:
        ConfigError: an address is refused; names it, and the remedy.
    """
    if config.security.keys is not None or config.security.allow_insecure:
        return
    open_to_all = [f"{path}={host!r}" for path, host in _hosts(config, launched) if not is_loopback(host)]
    if not open_to_all:
        return
    text = (
        f"{open_to_all[0]}: without keys anybody who reaches this address may use it, and read and change what is said "
        "there; `hbserve keys FOLDER` makes keys, and `security: {keys: FOLDER}` in the file uses them; "
        "`security: {allow_insecure: true}` is for a network of its own"
    )
    if _own_version() >= REFUSED_FROM:
        raise ConfigError(text)
    logger.warning("%s. From version %d.%d on one of the two is required.", text, *REFUSED_FROM)


def _hosts(config: DeploymentConfig, launched: bool) -> Iterator[tuple[str, str]]:
    yield "scheduler.host", config.scheduler.host
    if launched:
        return
    for i, instance in enumerate(config.gpu_instances):
        yield f"gpu_instances[{i}].host", instance.host
    if config.kv_transfer.ip is not None:
        yield "kv_transfer.ip", config.kv_transfer.ip


def _own_version() -> tuple[int, ...]:
    return tuple(int(part) for part in version("hbserve-scheduler").split(".")[:2])

"""Instances as processes of this host: from a deployment's configuration to running programs, and to their end."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec

from hbserve.processes.child_process import ChildProcess, ChildProcesses, Startable
from hbserve.processes.host_cores import num_cores
from hbserve_rpc import Keys, canonical_host, load_keys, make_keys
from hbserve_rpc.address import is_here, parse_address
from hbserve_rpc.keys import Party, has_curve
from hbserve_rpc.messages import Role
from hbserve_rpc.settings import KVTransferSettings
from hbserve_scheduler import DeploymentConfig, InstanceSection, parse_size
from hbserve_scheduler.config import KVTransferSection

QUIET_TORCH = ("TORCH_CPP_LOG_LEVEL", "ERROR")
"""Else it writes a trace of 30 lines for each peer that ends, of which the log says in words what matters."""

WAIT_POLITELY = ("OMP_WAIT_POLICY", "PASSIVE")
"""Else threads that wait for one of them spin, and take the core that it, or a neighbour, needs: beside one busy
process two threads gave a third of the tokens."""


def instance_settings(
    config: DeploymentConfig,
    instance: InstanceSection,
    model_folder: Path,
    *,
    log_level: str,
    keys: Keys | None = None,
) -> dict[str, Any]:
    """One instance's InstanceConfig, as plain data: this module does not import the engine.

    The instances of the same machine, whatever each `host` calls it, share its cores and its GPUs.
    """
    named = config.named_instances
    several = named if instance in named else [*named, instance]
    neighbours = [each for each in several if _same_machine(each.host, instance.host)]
    shared = config.engine_settings()
    return msgspec.structs.asdict(shared) | {
        "instance_id": instance.instance_id,
        "role": instance.instance_type,
        "model_path": str(model_folder),
        "tensor_parallel_size": num_ranks(config, instance),
        "gpu_id": instance.gpu_id,
        "num_local_instances": len(neighbours),
        "num_on_gpu": _most_on_one_gpu(config, neighbours, instance),
        "num_threads": shared.num_threads or max(1, num_cores() // len(neighbours)),
        "host": instance.host,
        "port": instance.port,
        "kv_rank": instance.kv_rank,
        "kv_transfer": _kv_settings(config.kv_transfer, instance),
        "keys": msgspec.to_builtins(keys),
        "log_level": log_level,
    }


def launch_keys(config: DeploymentConfig) -> Mapping[Party, Keys]:
    """Of a scheduler and the instances that it starts: the deployment's, or else some that nobody else ever has. None
    where this ZeroMQ has no CURVE and nobody has asked for keys, and for instances that others start.

    Raises:
        KeysError: (a ValueError) a file of the deployment's keys cannot be used.
    """
    if config.security.keys is not None:
        return {party: load_keys(config.security.keys, party) for party in ("scheduler", "instance")}
    if any(each.discover for each in config.gpu_instances):  # whoever has started them knows no keys that are made here
        return {}
    return make_keys() if has_curve() else {}


def _same_machine(host: str, other: str) -> bool:
    return canonical_host(host) == canonical_host(other) or (is_here(host) and is_here(other))


def tensor_parallel_sizes(config: DeploymentConfig) -> set[int]:
    """Numbers of ranks of all instances of a deployment."""
    return {num_ranks(config, each) for each in config.gpu_instances}


def local_instances(config: DeploymentConfig) -> list[InstanceSection]:
    """Instances of a deployment whose host is this machine. May ask a name server."""
    return [each for each in config.named_instances if is_here(each.host)]


def num_ranks(config: DeploymentConfig, instance: InstanceSection) -> int:
    """Processes, and on CUDA GPUs, of one instance."""
    return instance.tensor_parallel_size or config.engine_settings().tensor_parallel_size


def _most_on_one_gpu(
    config: DeploymentConfig, neighbours: list[InstanceSection], instance: InstanceSection
) -> int | None:
    """Of this instance's GPUs, on the one where the most are; None if nobody has said which they are."""

    def gpus(each: InstanceSection) -> range:
        return range(0) if each.gpu_id is None else range(each.gpu_id, each.gpu_id + num_ranks(config, each))

    return max((sum(gpu in gpus(each) for each in neighbours) for gpu in gpus(instance)), default=None)


def _kv_settings(kv: KVTransferSection, instance: InstanceSection) -> dict[str, Any]:
    return {name: getattr(kv, name) for name in KVTransferSettings.__struct_fields__} | {
        "buffer_size": parse_size("kv_transfer.buffer_size", kv.buffer_size),
        "host": kv.ip or instance.host,
        "port": kv.port + instance.kv_rank if kv.port else 0,
    }


def instance_environment(num_threads: int) -> dict[str, str]:
    """This process's, with the instance's threads, and torch's warnings only if they are asked for."""
    return dict([QUIET_TORCH, WAIT_POLITELY]) | os.environ | {"OMP_NUM_THREADS": str(num_threads)}


class InstanceProcess(ChildProcess):
    """One instance that this process has started, and ends."""

    def __init__(self, settings: dict[str, Any], on_death: Callable[[str, str], None]) -> None:
        self.instance_id: str = settings["instance_id"]
        self.role = settings["role"]
        self._plain = settings
        environment = instance_environment(settings["num_threads"])
        super().__init__(self.instance_id, "hbserve_core", self._as_json, environment, on_death)

    def _as_json(self) -> bytes:
        # The second time at the address that it had: whoever dials it finds another life there.
        known = {"port": parse_address(self.address)[1]} if self.address else {}
        return msgspec.json.encode(self._plain | known)


class AnInstance(Startable, Protocol):
    """An instance that was started here, or on another host."""

    instance_id: str
    role: Role


A = TypeVar("A", bound=AnInstance)


class Instances(ChildProcesses[A], ABC):
    """All instances of a deployment that one process has started."""

    def __init__(
        self,
        config: DeploymentConfig,
        model_folder: Path,
        *,
        log_level: str,
        on_death: Callable[[str, str], None],
        keys: Keys | None = None,
    ) -> None:
        super().__init__((), on_death)
        self._settings = partial(instance_settings, model_folder=model_folder, log_level=log_level, keys=keys)
        for each in config.named_instances:
            self.add(config, each)

    def add(self, config: DeploymentConfig, instance: InstanceSection) -> A:
        """Make one of a deployment's instances, and do not start it yet."""
        made = self._make(config, instance)
        self.processes.append(made)
        return made

    @abstractmethod
    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> A: ...


class LocalInstances(Instances[InstanceProcess]):
    """Instances as processes of this host."""

    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> InstanceProcess:
        return InstanceProcess(self._settings(config, instance), self._died)

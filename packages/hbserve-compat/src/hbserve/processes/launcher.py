"""Launching of instances as processes of this host, from a deployment's configuration."""

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
"""Environment variable that silences torch's warnings. Otherwise torch writes a trace of 30 lines for each peer that
ends; our log already says in words what matters."""

WAIT_POLITELY = ("OMP_WAIT_POLICY", "PASSIVE")
"""Environment variable that lets idle OpenMP threads sleep. Otherwise threads that wait for another one spin, and take
the core that it, or a neighbour, needs: beside one busy process, two threads gave a third of the tokens."""


def instance_settings(
    config: DeploymentConfig,
    instance: InstanceSection,
    model_folder: Path,
    *,
    log_level: str,
    keys: Keys | None = None,
) -> dict[str, Any]:
    """Return an instance's InstanceConfig, as plain data, because this module does not import the engine.

    The instances of one machine, whatever names their `host` gives it, share its cores and its GPUs.
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
    """Return the keys of a scheduler and the instances that it starts: the deployment's, or else new ones for this
    launch alone. Empty if the deployment has no keys, and ZeroMQ has no CURVE or others start instances.

    Raises:
        KeysError: (a ValueError) a file of the deployment's keys cannot be used.
    """
    if config.security.keys is not None:
        return {party: load_keys(config.security.keys, party) for party in ("scheduler", "instance")}
    if any(each.discover for each in config.gpu_instances):  # others start these, without any keys that are made here
        return {}
    return make_keys() if has_curve() else {}


def _same_machine(host: str, other: str) -> bool:
    return canonical_host(host) == canonical_host(other) or (is_here(host) and is_here(other))


def tensor_parallel_sizes(config: DeploymentConfig) -> set[int]:
    """Return the different numbers of ranks that instances of a deployment have."""
    return {num_ranks(config, each) for each in config.gpu_instances}


def local_instances(config: DeploymentConfig) -> list[InstanceSection]:
    """Return the instances of a deployment whose host is this machine. May ask a name server."""
    return [each for each in config.named_instances if is_here(each.host)]


def num_ranks(config: DeploymentConfig, instance: InstanceSection) -> int:
    """Return how many processes, and with CUDA how many GPUs, an instance has."""
    return instance.tensor_parallel_size or config.engine_settings().tensor_parallel_size


def _most_on_one_gpu(
    config: DeploymentConfig, neighbours: list[InstanceSection], instance: InstanceSection
) -> int | None:
    """Return how many instances share the fullest of this instance's GPUs. None: it has no `gpu_id`."""

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
    """Return an instance's environment: this process's, with its number of threads, and defaults for what is unset."""
    return dict([QUIET_TORCH, WAIT_POLITELY]) | os.environ | {"OMP_NUM_THREADS": str(num_threads)}


class InstanceProcess(ChildProcess):
    """An instance as a process that this one starts and ends."""

    def __init__(self, settings: dict[str, Any], on_death: Callable[[str, str], None]) -> None:
        self.instance_id: str = settings["instance_id"]
        self.role = settings["role"]
        self._plain = settings
        environment = instance_environment(settings["num_threads"])
        super().__init__(self.instance_id, "hbserve_core", self._as_json, environment, on_death)

    def _as_json(self) -> bytes:
        # A restart takes the address that it had, so that its peers find it there.
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
        """Make one of a deployment's instances, without starting it yet."""
        made = self._make(config, instance)
        self.processes.append(made)
        return made

    @abstractmethod
    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> A: ...


class LocalInstances(Instances[InstanceProcess]):
    """Instances as processes of this host."""

    def _make(self, config: DeploymentConfig, instance: InstanceSection) -> InstanceProcess:
        return InstanceProcess(self._settings(config, instance), self._died)

"""The use of a Ray cluster by a deployment: the connection, and places for instances on the nodes."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

from hbserve.processes.launcher import num_ranks
from hbserve_rpc.messages import Role
from hbserve_scheduler import ConfigError, DeploymentConfig, InstanceSection

logger = logging.getLogger(__name__)

TELL_AFTER_S = 5.0
"""Time without a place after which that is reported, and then ever more rarely: an autoscaler may take minutes."""
CONNECT_TIMEOUT_S = 10.0
SETTINGS = b"\4"
GRPC_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + SETTINGS + b"\0" * 5
"""HTTP/2's preface, and a frame with no settings. A server begins with its own settings, in a frame that begins with
length and type."""
STRATEGY = "STRICT_PACK"
"""Ray's strategy that puts all bundles of a place on one node: those of a pair, each with the GPUs of all its ranks."""
Bundle = dict[str, float]


def connect(address: str) -> None:
    """Connect to a running cluster; `auto` is the one that this host belongs to. `local` starts one of this host alone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    # All nodes have the same packages installed. Without this setting, under `uv run`, Ray would copy the current
    # folder to each, and make an environment there.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'hbserve-compat[ray]'") from None
    _require_somebody(address)
    before = signal.getsignal(signal.SIGTERM)
    try:
        # A cluster that is started here needs no dashboard, whose process is the slowest of all to start.
        own = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, **own)
    except Exception as error:  # any: if a local node is too slow to start, Ray raises a plain Exception
        raise ConfigError(f"--ray={address}: {' '.join(str(error).split())}{_about_token(error)}") from None
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray's own handler would end this process at once


def _require_somebody(address: str) -> None:
    """Raise ConfigError unless a Ray cluster listens at the address. Ray itself would try for minutes."""
    place = _place_of(address)
    host, _, port = place.rpartition(":")
    if host and "/" not in host and port.isdecimal():
        try:
            with socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S) as connection:
                if os.environ.get("RAY_USE_TLS", "0") != "1":
                    _require_grpc(connection)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--ray={address}: no cluster is at {place}: {error}") from None


def _place_of(address: str) -> str:
    """Return HOST:PORT of an address. `auto` is found by RAY_ADDRESS, by what runs here, or by a file, which outlives a
    killed head. Returns "" if there is none; Ray itself reports that at once."""
    if address != "auto":
        return address
    try:
        from ray._private.services import canonicalize_bootstrap_address

        return str(canonicalize_bootstrap_address(address) or "")
    except (ImportError, ValueError, ConnectionError):
        return ""


def _require_grpc(connection: socket.socket) -> None:
    """Raise OSError unless the peer begins like a gRPC server, which a cluster's head is."""
    connection.settimeout(CONNECT_TIMEOUT_S)
    connection.sendall(GRPC_GREETING)
    with connection.makefile("rb") as frames:
        if frames.read(4)[3:] != SETTINGS:
            raise OSError("what listens there is no head of Ray, whose port is 6379 unless `ray start` has another")


def _about_token(error: Exception) -> str:
    """Return advice if a token is missing, which Ray says only in its log; otherwise "". When given an address, Ray
    does not look for a token by itself, while `ray start` does."""
    if "InvalidAuthToken" not in str(error.__cause__):
        return ""
    return "; it asks for a token: set RAY_AUTH_MODE=token, with the cluster's in RAY_AUTH_TOKEN or ~/.ray/auth_token"


def disconnect() -> None:
    """Leave the cluster. What this process still runs there ends."""
    import ray

    ray.shutdown()


def bundle_of(config: DeploymentConfig, instance: InstanceSection, num_ranks: int) -> Bundle:
    """Return the resources that an instance takes on its node; GPUs only if configuration or cluster have any."""
    role, settings = instance.instance_type, config.engine_settings()
    bundle: Bundle = {"CPU": float(settings.num_threads or 1), **config.ray.resources.get(role, {})}
    if settings.device != "cpu" and (settings.device != "auto" or _has_gpus()):
        bundle["GPU"] = float(num_ranks)
    if role in config.ray.accelerator_type:
        bundle[f"accelerator_type:{config.ray.accelerator_type[role]}"] = 0.001  # as Ray's own option does it
    return bundle


def _has_gpus() -> bool:
    import ray

    return bool(ray.cluster_resources().get("GPU"))


class Place:
    """Room for some instances on one node: a placement group. If the node is lost, Ray finds another one."""

    def __init__(self, bundles: dict[str, Bundle]) -> None:
        """Ask Ray for room. `bundles` has resources by the name of the instance that takes them."""
        from ray.util.placement_group import placement_group

        self.taken: set[str] = set()
        """Names of the instances that have taken their bundles."""
        self._names = list(bundles)
        self._bundles = bundles
        self._group: Any = placement_group(list(bundles.values()), STRATEGY)

    def options(self, name: str) -> dict[str, Any]:
        """Return the options of the actor that takes an instance's bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundle = dict(self._bundles[name])
        return {
            "num_cpus": bundle.pop("CPU"),
            "num_gpus": bundle.pop("GPU", 0.0),
            "resources": bundle,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._names.index(name)
            ),
        }

    async def wait(self, name: str) -> AsyncIterator[str]:
        """Wait until there is room for an instance, for however long: an autoscaler may have to add a node. Yields
        notices meanwhile, ever more rarely."""
        ready, pause_s = asyncio.ensure_future(_of(self._group.ready())), TELL_AFTER_S
        try:
            while not (await asyncio.wait([ready], timeout=pause_s))[0]:
                yield f"no node has room for {self._bundles[name]} yet; waiting"
                pause_s *= 2
            ready.result()
        finally:
            ready.cancel()

    def has_room_for(self, name: str) -> bool:
        """Whether the place has a bundle for an instance of this name, which is not taken."""
        return name in self._bundles and name not in self.taken

    def give_back(self) -> None:
        """Return the room to Ray. What still runs there ends."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)


async def _of(reference: Any) -> Any:
    return await reference


class Places:
    """The places of a deployment's instances. Instances that must be on one node share a place."""

    def __init__(self) -> None:
        self._places: list[Place] = []

    def take(self, config: DeploymentConfig, instance: InstanceSection) -> Place:
        """Take the place for one of the deployment's instances: one that it shares with another, or its own."""
        name = instance.instance_id
        place = next((each for each in self._places if each.has_room_for(name)), None)
        if place is None:
            there = {each for place in self._places for each in place.taken}
            (group,) = [each for each in pairs(config.named_instances, config.ray.place) if instance in each]
            new = [each for each in group if each.instance_id not in there]
            place = Place({each.instance_id: bundle_of(config, each, num_ranks(config, each)) for each in new})
            self._places.append(place)
        place.taken.add(name)
        return place

    def give_back(self, name: str) -> None:
        """Give an instance's part of its place back. The place is returned to Ray with the last of its instances."""
        for place in [each for each in self._places if name in each.taken]:
            place.taken.remove(name)
            if not place.taken:
                self._places.remove(place)
                place.give_back()


def pairs(instances: list[InstanceSection], place: str) -> list[list[InstanceSection]]:
    """Group instances that must be on one node: each alone (`place` is "any"), or the first prefill with the first
    decode instance, and so on.

    Surplus instances of one of the two roles, and hybrid ones, are alone.
    """
    if place == "any":
        return [[each] for each in instances]
    by_role: dict[Role, list[InstanceSection]] = {"prefill": [], "decode": [], "hybrid": []}
    for each in instances:
        by_role[each.instance_type].append(each)
    prefill, decode = by_role["prefill"], by_role["decode"]
    both = min(len(prefill), len(decode))
    together = [[*pair] for pair in zip(prefill, decode, strict=False)]
    return together + [[each] for each in prefill[both:] + decode[both:] + by_role["hybrid"]]

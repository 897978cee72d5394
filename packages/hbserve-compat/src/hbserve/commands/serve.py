"""`hbserve serve` and `hbserve instance`: run the processes of a deployment."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hbserve.check.network import require_places, require_places_of
from hbserve.models import demo_model
from hbserve.models.demo_model import find_model_folder
from hbserve.models.servable import require_servable, require_settings
from hbserve.pd_disagg.config import PdDisaggConfig
from hbserve.processes.ending import Ending, together, unless
from hbserve.processes.launcher import (
    QUIET_TORCH,
    WAIT_POLITELY,
    AnInstance,
    Instances,
    LocalInstances,
    instance_settings,
    launch_keys,
    local_instances,
    num_ranks,
    tensor_parallel_sizes,
)
from hbserve.processes.scaling import Scaling
from hbserve.processes.start_notice import missing, telling
from hbserve_rpc import InvalidAddress, canonical_host, check_peer_host, own_process
from hbserve_scheduler import (
    ConfigError,
    CpuScheduler,
    DeploymentConfig,
    InstanceFailed,
    InstanceSection,
    SchedulerServer,
    check,
    load_config,
)
from hbserve_scheduler.config import ServerSection
from hbserve_scheduler.config_check import check_instance_id
from hbserve_scheduler.declared import DeclaredInstances
from hbserve_scheduler.discovery import DnsName
from hbserve_scheduler.security import deployment_keys, require_keys

if TYPE_CHECKING:  # it imports the web server's libraries, which nothing else needs
    from hbserve.server.front_end import FrontEnd

logger = logging.getLogger(__name__)

MakeInstances = Callable[..., Instances[Any]]
READY_TIMEOUT_S = 600.0
"""How long all instances together may take to load the model."""

IPV6_LOOPBACK = "::1"


@dataclass(frozen=True)
class ServeArgs:
    """The command's arguments."""

    config: Path | None
    model: Path | None
    log_level: str
    server: dict[str, Any] = field(default_factory=dict)
    """Keys of the section `server` that were given as options. They override the file's."""
    ray: str | None = None
    """Address of the Ray cluster whose nodes run the instances. None: this host runs them all."""
    scheduler_port: int | None = None
    """Overrides the file's port. Without this option, a host could run only one deployment that has no file."""

    def deployment(self) -> DeploymentConfig:
        """Return the file's configuration with the options applied. Raises ConfigError."""
        config = PdDisaggConfig().to_deployment() if self.config is None else load_config(self.config)
        if self.model is not None:
            config = _with(config, "model", {"path": str(self.model)})
        if self.scheduler_port is not None:
            config = _with(config, "scheduler", {"port": self.scheduler_port})
        config = _with(config, "server", self.server)
        server = config.server
        if self.config is None and canonical_host(server.host) == IPV6_LOOPBACK:
            config = _all_on(config, IPV6_LOOPBACK)  # this host may have no IPv4
        if server.uds is not None and (ignored := sorted({"host", "port"} & self.server.keys())):
            raise ConfigError(
                f"--{ignored[0]}: expected none with server.uds or --uds, {server.uds!r}: it serves only there"
            )
        given = {name: getattr(server, name) for name in ("uds", "ssl_keyfile", "ssl_certfile")}
        paths = {name: os.path.expanduser(path) for name, path in given.items() if path is not None}
        config = _with(config, "server", paths)
        check(config)
        if self.ray is not None and config.server.api_servers > 1:
            raise ConfigError(
                f"server.api_servers={config.server.api_servers}: expected 1 with --ray: of an instance that is placed "
                "on another node, and has another address then, one scheduler alone hears"
            )
        return config


def _with(config: DeploymentConfig, section: str, given: dict[str, Any]) -> DeploymentConfig:
    """Return a copy in which `given` replaces keys of a section. Raises ConfigError, which names section and key."""
    try:
        changed = msgspec.structs.replace(getattr(config, section), **given)
    except ConfigError as error:
        raise ConfigError(f"{section}.{error}") from None
    return msgspec.structs.replace(config, **{section: changed})


def _all_on(config: DeploymentConfig, host: str) -> DeploymentConfig:
    """Return a copy in which the scheduler and all instances are on the same host as the server."""
    instances = [msgspec.structs.replace(each, host=host) for each in config.gpu_instances]
    return msgspec.structs.replace(_with(config, "scheduler", {"host": host}), gpu_instances=instances)


async def serve_all(args: ServeArgs) -> None:
    """Run the OpenAI server, the scheduler and every instance, until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError, KeysError, AddressInUse, InstanceFailed, NotReady, BrokenTokenizer.
    """
    config = args.deployment()
    require_keys(config, launched=True)
    started = ", ".join(each.instance_id for each in config.named_instances)
    sys.stderr.write(f"hbserve: starting {started or 'without instances of its own'}\n")
    ending = Ending()
    front_end = _front_end(config.server, args.log_level, ending)
    try:
        if front_end is not None:
            await front_end.start()
        if args.ray is None:  # else instances are on other hosts, about which nothing is known here
            require_settings(config)
        folder = await find_model_folder(config.model.path)
        num_here = len(local_instances(config)) if args.ray is None else 0
        require_servable(folder, config.engine_settings(), tensor_parallel_sizes(config), num_here)
        if args.ray is None:
            await asyncio.to_thread(require_places, config, but=["server"])
        with _instances(config, folder, args) as instances:
            reload = None if args.config is None else args.deployment
            await _Deployment(config, folder, front_end, instances, ending, reload).run()
    finally:
        if front_end is not None:
            await front_end.stop()


@contextmanager
def _instances(config: DeploymentConfig, folder: Path, args: ServeArgs) -> Iterator[MakeInstances]:
    """Yield a factory of the deployment's instances, on this host or on a Ray cluster."""
    if args.ray is None:
        yield partial(LocalInstances, config, folder, log_level=args.log_level)
        return
    from hbserve.ray_cluster import cluster
    from hbserve.ray_cluster.instances import RayInstances

    cluster.connect(args.ray)
    try:
        yield partial(RayInstances, config, folder, log_level=args.log_level)
    finally:
        cluster.disconnect()


def _front_end(settings: ServerSection, log_level: str, ending: Ending) -> "FrontEnd | None":
    if not settings.enabled:
        return None
    from hbserve.server.front_end import FrontEnd
    from hbserve.server.front_ends import FrontEnds

    return FrontEnd(settings) if settings.api_servers == 1 else FrontEnds(settings, log_level, ending.by_death)


class _Deployment:
    """The scheduler, its instances and the front end: what `serve_all` runs once the model's folder is there."""

    def __init__(
        self,
        config: DeploymentConfig,
        folder: Path,
        front_end: "FrontEnd | None",
        make_instances: MakeInstances,
        ending: Ending,
        reload: Callable[[], DeploymentConfig] | None,
    ) -> None:
        """Make the scheduler and its instances, without starting them. `reload` reads the file again; None: no file."""
        self._config = config
        self._folder = folder
        self._name = demo_model.model_name(config.model.path, folder)
        self._front_end = front_end
        keys = launch_keys(config)
        self._scheduler = CpuScheduler(config.scheduler, model_path=str(folder))
        self._scheduler.use_keys(keys.get("scheduler"))
        # Clients have the deployment's keys, and not those that are made for one launch.
        of_clients = keys["scheduler"] if config.security.keys is not None else None
        self._server = SchedulerServer(self._scheduler, keys=of_clients)
        self._server.declared = DeclaredInstances(self._server.members, config, reload, starts_its_own=True)
        self._instances = make_instances(on_death=self._on_death, keys=keys.get("instance"))
        self._scaling = Scaling(config, self._server, self._instances)
        self._ending = ending
        self._is_ready = False
        self._background: set[asyncio.Task[None]] = set()

    def _on_death(self, instance_id: str, why: str) -> None:
        """Handle the death of an instance. Before all have been ready once, it ends the deployment. After that,
        `ChildProcesses` starts the instance again, and its requests go to others meanwhile."""
        if not self._is_ready:
            self._ending.by_death(instance_id, why)
            return
        self._scaling.died(instance_id, why)
        task = asyncio.create_task(self._server.instance_died(instance_id, why))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _dial_again(self, started: AnInstance) -> None:
        """Connect to an instance anew if it was started again on another node, and so has another address."""
        handle = self._scheduler.fleet.handles.get(started.instance_id)
        if handle is not None and handle.address != started.address:
            await self._scheduler.remove_instance(started.instance_id)
            await self._scheduler.add_instance(started.instance_id, started.role, started.address)

    def _on_signal(self, number: signal.Signals) -> None:
        logger.info("ending: %s", number.name)
        self._ending.tell()

    async def run(self) -> None:
        """Serve until a signal comes, or until a process that is not started again has ended."""
        with own_process.on_ending_signals(self._on_signal):
            try:
                await self._server.start()
                await unless(self._ending.begun, self._start())
                await self._ending.begun.wait()
                if self._front_end is not None and not self._ending.deaths:
                    await unless(self._ending.at_once, self._front_end.drain())
            finally:
                await self._scaling.close()
                await self._server.stop()
                await self._instances.stop()
        if self._ending.deaths:
            raise InstanceFailed(self._ending.deaths[0])

    async def _start(self) -> None:
        async with telling(lambda: missing(self._instances.processes, self._scheduler), logger.info):
            await self._start_all()

    async def _start_all(self) -> None:
        await self._instances.start()
        for process in self._instances.processes:
            await self._scheduler.add_instance(process.instance_id, process.role, process.address)
        beginning = [self._scheduler.wait_ready(READY_TIMEOUT_S)]
        if self._front_end is not None:
            beginning.append(self._front_end.begin(self._name, self._folder, self._server))
        await together(*beginning)
        own_process.freeze_heap()
        self._is_ready = True
        logger.info("serving %s on %s", self._folder, self._server.address)
        self._instances.restart_the_dead(self._ending.by_death, self._dial_again)
        self._server.scale = self._scaling.scale
        if self._front_end is not None:
            sys.stderr.write(self._how_to_ask(self._front_end))

    def _how_to_ask(self, front_end: "FrontEnd") -> str:
        """Say in three lines what runs where, and how to send a request to it."""
        infos = self._scheduler.info().instances
        places = ", ".join(f"{each.instance_id} on {each.device}" for each in infos) or "no instances yet"
        backend = next((each.kv_backend for each in infos if each.kv_backend), "")  # "" if all instances are hybrid
        kv = f"; KV over {backend}" if backend else ""
        url = front_end.url
        page = "" if "+unix:" in url else f"; a page to chat at {url}/"  # browsers cannot open a Unix socket
        question = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
        return (
            f"{self._name}: {places}{kv}; RPC at {self._server.address}\n"
            f"OpenAI's API at {url}/v1, model {front_end.model_name!r}{page}\n"
            f"{front_end.curl}/v1/chat/completions -H 'Content-Type: application/json' -d '{question}'\n"
        )


@dataclass(frozen=True)
class InstanceArgs:
    """The command's arguments."""

    config: Path
    instance_id: str
    log_level: str
    given: dict[str, Any] = field(default_factory=dict)
    """Keys of gpu_instances that were given as options. They override the file's. With `instance_type` the file need
    not have the instance: where instances are found by a name, whoever starts one gives it its id and address."""
    schedulers: list[str] = field(default_factory=list)
    """Addresses of the schedulers with which the instance registers itself."""

    def deployment(self) -> tuple[DeploymentConfig, InstanceSection]:
        """Return the deployment, and the instance of it that is to run. Raises ConfigError."""
        check_instance_id("--instance-id", self.instance_id)
        config = load_config(self.config)
        in_file = {each.instance_id: each for each in config.named_instances}
        if self.instance_id in in_file:
            instance = msgspec.structs.replace(in_file[self.instance_id], **self.given)
            instances = [instance if each.instance_id == self.instance_id else each for each in config.gpu_instances]
        elif "instance_type" in self.given:
            role = self.given["instance_type"]
            found = [each.discover for each in config.gpu_instances if each.discover and each.instance_type == role]
            known = {"port": DnsName.of(found[0]).port} if found else {}
            instance = InstanceSection(instance_id=self.instance_id, **(known | self.given))
            instances = [instance]  # alone, because nothing is known about other instances of this host
        else:
            names = ", ".join(in_file) or "none that has an id"
            raise ConfigError(
                f"--instance-id={self.instance_id!r}: {self.config} has {names}; give --instance-type too"
            )
        try:
            check_peer_host(instance.host)
        except InvalidAddress as error:
            raise ConfigError(f"--host={error}") from None
        return msgspec.structs.replace(config, gpu_instances=instances), instance


async def serve_instance(args: InstanceArgs) -> None:
    """Run one instance until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError: the file has no such instance, or is invalid.
        KeysError: the keys that the file names cannot be used.
        AddressInUse: an address of the instance is taken.
    """
    config, instance = args.deployment()
    require_keys(config, launched=False)
    keys = deployment_keys(config, "instance")
    require_settings(config)
    folder = await find_model_folder(config.model.path)
    require_servable(folder, config.engine_settings(), {num_ranks(config, instance)}, 1)
    await asyncio.to_thread(require_places_of, config, instance)
    os.environ.setdefault(*QUIET_TORCH)  # torch reads it when it is imported
    os.environ.setdefault(*WAIT_POLITELY)
    with own_process.ending_at_once():
        from hbserve_core import InstanceConfig, run_instance

    settings = instance_settings(config, instance, folder, log_level=args.log_level, keys=keys)
    await run_instance(msgspec.convert(settings | {"schedulers": args.schedulers}, InstanceConfig))

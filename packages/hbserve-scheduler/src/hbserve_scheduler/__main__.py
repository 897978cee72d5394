"""Command `python -m hbserve_scheduler`, also installed as `hbserve-scheduler`: a scheduler node, without torch."""

import argparse
import asyncio
import sys
from pathlib import Path

from hbserve_rpc import KeysError, own_process
from hbserve_rpc.stderr_log import log_to_stderr
from hbserve_scheduler.config import DeploymentConfig
from hbserve_scheduler.config_file import load_config
from hbserve_scheduler.cpu_scheduler import CpuScheduler
from hbserve_scheduler.declared import DeclaredInstances
from hbserve_scheduler.errors import ConfigError
from hbserve_scheduler.security import deployment_keys, require_keys
from hbserve_scheduler.server import SchedulerServer


def check_ports(config: DeploymentConfig) -> None:
    """Check that every instance has a fixed port, because this scheduler must know where to connect.

    Raises:
        ConfigError: an instance lets the OS choose its port.
    """
    for i, instance in enumerate(config.gpu_instances):
        if instance.port == 0 and instance.discover is None:
            raise ConfigError(
                f"gpu_instances[{i}].port=0: expected 1 to 65535, because the scheduler is a process of its own and "
                "must know where to dial"
            )


def _told_to_clients(model_path: str | None) -> str:
    """Return the model path in a form that means the same in a client's folder; "" for None. A path stays as it is if
    each host must resolve it itself: one with `~`, or one that is not found here, such as a Hugging Face model id."""
    if model_path is None or model_path.startswith("~") or not Path(model_path).exists():
        return model_path or ""
    return str(Path(model_path).absolute())


def _load(path: str | Path) -> DeploymentConfig:
    config = load_config(path)
    check_ports(config)
    return config


async def serve_config(path: str | Path) -> None:
    """Run the scheduler of the deployment in a configuration file, until SIGTERM, SIGINT or SIGHUP.

    Raises:
        ConfigError: the file is wrong.
        KeysError: the keys that it names cannot be used.
        AddressInUse: scheduler.host and scheduler.port are taken.
    """
    config = _load(path)
    require_keys(config, launched=False)
    keys = deployment_keys(config, "scheduler")
    stop = asyncio.Event()
    with own_process.on_ending_signals(lambda _: stop.set()):
        scheduler = CpuScheduler(config.scheduler, model_path=_told_to_clients(config.model.path))
        scheduler.use_keys(keys)
        server = SchedulerServer(scheduler, keys=keys)
        server.declared = DeclaredInstances(server.members, config, lambda: _load(path))
        await server.serve_until(stop)


def main() -> int:
    own_process.set_up()
    own_process.end_at_once_by_ctrl_c()
    parser = argparse.ArgumentParser(prog="hbserve-scheduler", description="The CPU scheduler of HBServe.")
    parser.add_argument("--config", required=True, help="YAML file of the deployment")
    parser.add_argument(
        "--log-level", default="INFO", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    )
    arguments = parser.parse_args()
    log_to_stderr(arguments.log_level)
    try:
        asyncio.run(serve_config(arguments.config))
    except (ConfigError, KeysError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1 if isinstance(error, OSError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The check of a deployment from one host: its file, its model, its network, and the host itself."""

import sys
from dataclasses import dataclass
from pathlib import Path

from hbserve.check.finding import Finding, table
from hbserve.check.network import check_network, places
from hbserve.check.this_host import check_host
from hbserve.models.demo_model import find_model_folder
from hbserve.models.servable import require_servable, require_settings
from hbserve.processes.launcher import local_instances, tensor_parallel_sizes
from hbserve.text.tokenizer import require_tokenizer_of
from hbserve_rpc import KeysError, load_keys
from hbserve_rpc.address import is_here, is_loopback
from hbserve_rpc.keys import Party
from hbserve_scheduler import DeploymentConfig, load_config
from hbserve_scheduler.discovery import DnsName


@dataclass(frozen=True)
class CheckArgs:
    """The command's arguments."""

    config: Path


class CheckFailed(Exception):
    """The check found something that prevents the deployment from working."""


async def check_deployment(args: CheckArgs) -> None:
    """Print the findings, one on each line, without starting or changing anything.

    Raises:
        ConfigError: the file is invalid; nothing else was checked.
        CheckFailed: something will not work; the lines say what.
    """
    config = load_config(args.config)
    names = ", ".join(each.discover or each.instance_id for each in config.gpu_instances)
    here = ", ".join(each.instance_id for each in local_instances(config)) or "none of them"
    findings = [Finding("ok", "configuration", f"{args.config}: {names}; on this host {here}")]
    findings.append(_check_keys(config))
    findings += await _check_model(config)
    findings += await check_network(config)
    findings += check_host(config)
    sys.stdout.write(table(findings))
    failed = [each.subject for each in findings if each.verdict == "FAIL"]
    if failed:
        raise CheckFailed(f"this will not work: {', '.join(dict.fromkeys(failed))}")


def _check_keys(config: DeploymentConfig) -> Finding:
    """Check that processes of this host can use the keys; or, without keys, say who can reach the deployment."""
    if config.security.keys is not None:
        parties: list[Party] = ["scheduler"] if is_here(config.scheduler.host) else []
        parties += ["instance"] if local_instances(config) else []
        try:
            for party in parties:
                load_keys(config.security.keys, party)
        except KeysError as error:
            return Finding("FAIL", "keys", str(error))
        return Finding(
            "ok", "keys", f"{config.security.keys}: of {' and '.join(parties) or 'none that is needed here'}"
        )
    reached = [place.subject for place in places(config) if place.subject != "server" and not is_loopback(place.host)]
    reached += [
        name for each in config.gpu_instances if (name := each.discover) and not is_loopback(DnsName.of(name).host)
    ]
    if not reached:
        return Finding("ok", "keys", "none; this host alone reaches the deployment")
    text = f"none: whoever reaches the addresses of {', '.join(reached)} may use them; `hbserve keys FOLDER` makes keys"
    return Finding("ok" if config.security.allow_insecure else "note", "keys", text)


async def _check_model(config: DeploymentConfig) -> list[Finding]:
    try:
        require_settings(config)
    except (ValueError, ImportError) as error:
        return [Finding("FAIL", "settings", str(error))]
    try:
        if config.model.path is None:
            return [Finding("ok", "model", "the demo model, which is converted at the first start")]
        folder = await find_model_folder(config.model.path)
        here = len(local_instances(config))
        require_servable(folder, config.engine_settings(), tensor_parallel_sizes(config), here)
    except (OSError, ValueError, ImportError, MemoryError) as error:
        return [Finding("FAIL", "model", str(error))]
    try:
        require_tokenizer_of(folder)
    except FileNotFoundError as error:
        return [Finding("note", "model", f"{error}: it serves token ids only")]
    return [Finding("ok", "model", f"{folder}, which this engine serves")]

"""Checks of a configuration: types, ranges, and values that must fit together. Each problem is one ConfigError line."""

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from hbserve_rpc import InvalidAddress, InvalidRequest, canonical_host, check_host, check_peer_host
from hbserve_rpc.misfits import describe_misfit
from hbserve_rpc.plain_values import LARGEST_INT, MAX_ID_LENGTH, plain_text, shown
from hbserve_rpc.settings import PORT
from hbserve_scheduler.config import DeploymentConfig, InstanceSection
from hbserve_scheduler.discovery import DnsName
from hbserve_scheduler.errors import ConfigError
from hbserve_scheduler.policies import check_policy

UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
ORIGIN = re.compile(r"\*|null|[a-zA-Z][a-zA-Z0-9+.-]*://[^\s/?#]+")
ONE_IP_VERSION = ("nccl", "mooncake")
"""Backends that need addresses of the same IP version on both sides."""


def convert(content: Any) -> DeploymentConfig:
    """Make a checked configuration from plain data, as YAML or JSON give it.

    Raises:
        ConfigError: a value is not allowed; names the key by its path, its value, and what is allowed.
    """
    try:
        config = msgspec.convert(content, DeploymentConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(describe_misfit(error, content, DeploymentConfig, "the file")) from None
    except UnicodeEncodeError:  # msgspec does not say at which key
        _require_plain(content)
        raise
    check(config)
    return config


def check(config: DeploymentConfig) -> None:
    """Check the rules that types cannot express. Raises ConfigError."""
    if config.scheduler.heartbeat_timeout_s <= config.scheduler.heartbeat_interval_s:
        raise ConfigError(
            f"scheduler.heartbeat_timeout_s={config.scheduler.heartbeat_timeout_s!r}: expected more than "
            f"scheduler.heartbeat_interval_s={config.scheduler.heartbeat_interval_s!r}, or every instance seems lost"
        )
    for key in ("prefill_policy", "decode_policy"):
        check_policy(f"scheduler.{key}", getattr(config.scheduler, key))
    parse_size("kv_transfer.buffer_size", config.kv_transfer.buffer_size)
    _check_server(config)
    _require_plain(config)
    _check_hosts(config)
    _check_instances(config.gpu_instances)
    _check_ports(config)
    _check_texts(config)


def _require_plain(content: Any) -> None:
    try:
        _check_plain("", content)
    except InvalidRequest as error:
        raise ConfigError(str(error)) from None
    except RecursionError:
        raise ConfigError("kv_transfer.options: it contains itself, or is nested too deep") from None


def _check_plain(path: str, value: Any) -> None:
    """Raise InvalidRequest if a value would be refused, or changed, on its way to other processes as JSON."""
    if isinstance(value, msgspec.Struct):
        value = msgspec.structs.asdict(value)
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise InvalidRequest(f"{path}: has the key {shown(key)}; expected text as keys")
            plain_text(path, key)
            _check_plain(f"{path}.{key}".lstrip("."), each)
    elif isinstance(value, (list, tuple)):
        for i, each in enumerate(value):
            _check_plain(f"{path}[{i}]", each)
    elif isinstance(value, str):
        plain_text(path, value)
    elif not (value is None or (isinstance(value, (int, float)) and abs(value) <= sys.float_info.max)):
        raise InvalidRequest(f"{path}={shown(value)}: expected what JSON has: text, finite numbers, lists and mappings")


def sections(config: DeploymentConfig) -> Iterator[tuple[str, msgspec.Struct]]:
    """Yield each section with its path; each entry of `gpu_instances` is a section."""
    for name in config.__struct_fields__:
        section = getattr(config, name)
        if isinstance(section, msgspec.Struct):
            yield name, section
        else:
            yield from ((f"{name}[{i}]", each) for i, each in enumerate(section))


def _check_hosts(config: DeploymentConfig) -> None:
    """Check hosts. Only the scheduler may listen on every address. Every other host is one that peers and the scheduler
    connect to."""
    dialled = {f"gpu_instances[{i}].host": instance.host for i, instance in enumerate(config.gpu_instances)}
    if config.kv_transfer.ip is not None:
        dialled["kv_transfer.ip"] = config.kv_transfer.ip
    for path, host in {"scheduler.host": config.scheduler.host, **dialled}.items():
        try:
            (check_peer_host if path in dialled else check_host)(host)
        except InvalidAddress as error:
            raise ConfigError(f"{path}={error}") from None
    _check_ip_versions(config)


def _check_ip_versions(config: DeploymentConfig) -> None:
    """Check that all hosts have the same IP version, where the backend needs that. Names are not looked up. With
    kv_transfer.ip, every KV listener is at that address."""
    if config.kv_transfer.backend not in ONE_IP_VERSION or config.kv_transfer.ip is not None:
        return
    hosts = {instance.host: i for i, instance in enumerate(config.gpu_instances) if instance.instance_type != "hybrid"}
    of_ipv6 = next((host for host in hosts if ":" in host), None)
    of_ipv4 = next((host for host in hosts if re.fullmatch(r"[0-9.]+", host)), None)
    if of_ipv6 is not None and of_ipv4 is not None:
        raise ConfigError(
            f"gpu_instances[{hosts[of_ipv6]}].host={of_ipv6!r}: gpu_instances[{hosts[of_ipv4]}] has {of_ipv4!r}; "
            f"kv_transfer.backend={config.kv_transfer.backend!r} needs IPv4 for all, or IPv6 for all"
        )


def _check_instances(instances: Sequence[InstanceSection]) -> None:
    for i, instance in enumerate(instances):
        if instance.discover is not None:
            _check_discovered(f"gpu_instances[{i}]", instance)
            continue
        check_instance_id(f"gpu_instances[{i}].instance_id", instance.instance_id)
        for j, other in enumerate(instances[:i]):
            for key in ("instance_id", "kv_rank", "port"):
                value = getattr(instance, key)
                same = other.discover is None and value == getattr(other, key)
                if key == "port":
                    same = same and value != 0 and canonical_host(instance.host) == canonical_host(other.host)
                if same:
                    raise ConfigError(
                        f"gpu_instances[{i}].{key}={value!r}: gpu_instances[{j}] has it too; each needs its own"
                    )
    roles = {instance.instance_type for instance in instances}
    for role in ("prefill", "decode"):
        if role not in roles and roles != {"hybrid"}:
            raise ConfigError(
                f"gpu_instances={[instance.instance_id for instance in instances]}: there is no {role} instance; "
                "expected at least one prefill and one decode instance, or hybrid ones only"
            )


def check_instance_id(path: str, name: str) -> None:
    """Raise ConfigError if this id could not be in a log line, a label or a message."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_ID_LENGTH:
        problem = f"expected a name of one line, of {MAX_ID_LENGTH} characters at most"
        raise ConfigError(f"{path}={shown(name)}: {problem}")


def _check_discovered(path: str, instance: InstanceSection) -> None:
    """Check an entry with `discover`. It has no other keys, because each instance that is found describes itself."""
    try:
        DnsName.of(instance.discover or "")
    except ConfigError as error:
        raise ConfigError(f"{path}.discover={error}") from None
    alone = InstanceSection(instance_type=instance.instance_type, discover=instance.discover)
    for name in instance.__struct_fields__:
        if (value := getattr(instance, name)) != getattr(alone, name):
            raise ConfigError(
                f"{path}.{name}={shown(value)}: expected none with discover: each instance that is found has its own"
            )


def _check_server(config: DeploymentConfig) -> None:
    server = config.server
    parse_size("server.max_body_size", server.max_body_size)
    try:
        check_host(server.host)
    except InvalidAddress as error:
        raise ConfigError(f"server.host={error}") from None
    if (server.ssl_keyfile is None) != (server.ssl_certfile is None):
        raise ConfigError("server.ssl_keyfile and server.ssl_certfile: expected both or neither")
    for i, name in enumerate(server.served_model_names):
        if not name.strip():
            raise ConfigError(f"server.served_model_names[{i}]={name!r}: expected a name")
    for i, origin in enumerate(server.cors_origins):
        if not ORIGIN.fullmatch(origin):  # browsers send this form, so no other could ever match
            problem = "expected '*', or a scheme and a host alone, such as 'https://example.com'"
            raise ConfigError(f"server.cors_origins[{i}]={shown(origin)}: {problem}")
    if not re.fullmatch(r"(/[^\s?#]*)?", server.root_path):
        raise ConfigError(f"server.root_path={shown(server.root_path)}: expected a path that begins with /, or none")


def _check_texts(config: DeploymentConfig) -> None:
    """Check that no optional text is empty. If a variable that nobody has set was written there, an empty text would
    mean no API key, or the path of the current folder."""
    for path, section in sections(config):
        for field in msgspec.structs.fields(section):
            value = getattr(section, field.name)
            if field.default is None and isinstance(value, str) and not value.strip():
                raise ConfigError(f"{path}.{field.name}={value!r}: expected a text that is not empty, or null")


def _check_ports(config: DeploymentConfig) -> None:
    """Check that no two servers listen at the same address."""
    taken: dict[tuple[str, int], str] = {}
    for key, host, base, i in _ports(config):
        if base == 0:
            continue
        kv_rank = 0 if i is None else config.gpu_instances[i].kv_rank
        port = base + kv_rank
        if not PORT.allow(port):
            raise ConfigError(f"gpu_instances[{i}].kv_rank={kv_rank}: {key} + kv_rank is {port}")
        name = key if i is None else f"{key} + kv_rank of gpu_instances[{i}]"
        other = taken.setdefault((canonical_host(host), port), name)
        if other != name and i is None:
            raise ConfigError(f"{key}={port}: is {other} too; each needs its own")
        if other != name:
            raise ConfigError(f"{key}={base}: port + kv_rank of gpu_instances[{i}] is {port}, which is {other}")


def _ports(config: DeploymentConfig) -> Iterator[tuple[str, str, int, int | None]]:
    """Yield key, host and port of each server, and the index of the instance whose kv_rank is added to the port, or
    None."""
    scheduler, kv = config.scheduler, config.kv_transfer
    yield "scheduler.port", scheduler.host, scheduler.port, None
    yield "scheduler.health_port", scheduler.host, scheduler.health_port or 0, None
    if config.server.enabled and config.server.uds is None:
        # Where this server does not run, an instance may listen at its port, which has a default value.
        yield "server.port", config.server.host, config.server.port, None
    named = [(i, each) for i, each in enumerate(config.gpu_instances) if each.discover is None]
    for i, each in named:
        yield f"gpu_instances[{i}].port", each.host, each.port, None
    for i, each in named:
        if each.instance_type != "hybrid":
            yield "kv_transfer.port", kv.ip or each.host, kv.port, i
        yield "engine.health_port", each.host, config.engine_settings().health_port or 0, i


def parse_size(path: str, value: int | str) -> int:
    """Return a number of bytes, from a number or a text like "1GiB".

    Raises:
        ConfigError: the value is neither, or not positive.
    """
    text = str(value) if isinstance(value, str) or abs(value) <= LARGEST_INT else ""
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]+)?)\s*([KMG]?I?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else "?"
    unit = "" if unit == "B" else unit
    size = int(float(match[1]) * UNITS[unit]) if match and unit in UNITS else 0
    if not 0 < size <= LARGEST_INT:
        raise ConfigError(f'{path}={shown(value)}: expected a number of bytes, or a text like "512MiB" or "1GiB"')
    return size

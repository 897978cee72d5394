"""Checks of what this machine has for Mooncake: the library, the settings of MOONCAKE_CONFIG_PATH, and RDMA."""

import contextlib
import importlib
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

from hbserve_kv.errors import BackendUnavailable
from hbserve_rpc import InvalidAddress, check_peer_host

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "MOONCAKE_CONFIG_PATH"
IPV6_VARIABLE = "MC_USE_IPV6"
RDMA_CARDS = Path("/sys/class/infiniband")
NOT_INSTALLED = (
    "kv_transfer.backend='mooncake' needs Mooncake: pip install 'hbserve-kv[mooncake-cpu]' without a GPU, "
    "'hbserve-kv[mooncake]' with CUDA 12, 'hbserve-kv[mooncake-cuda13]' with CUDA 13"
)


class MooncakeConfig(msgspec.Struct, frozen=True):
    """Settings that are read from the JSON file that MOONCAKE_CONFIG_PATH names. Other keys, such as those of Mooncake
    Store, are not used."""

    local_hostname: str = ""
    metadata_server: str = "P2PHANDSHAKE"
    protocol: str = "tcp"
    device_name: str = ""


def load_config() -> MooncakeConfig:
    """Return the settings of the file, or the defaults without a file.

    Raises:
        BackendUnavailable: the file is not there or is not JSON, or a value has a wrong type.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return MooncakeConfig()
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        config = msgspec.json.decode(text, type=MooncakeConfig)
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise BackendUnavailable(f"{CONFIG_VARIABLE}={path}: {error}") from error
    unused = sorted(json.loads(text).keys() - set(MooncakeConfig.__struct_fields__))
    if unused:
        logger.warning("%s=%s: not used by HBServe: %s", CONFIG_VARIABLE, path, ", ".join(unused))
    return config


def import_engine() -> Any:
    """Return the class TransferEngine, or raise BackendUnavailable, which says what to install."""
    with contextlib.suppress(ImportError):
        importlib.import_module("torch")  # Mooncake's CUDA wheels find libcudart through it, so it must come first
    try:
        from mooncake.engine import TransferEngine
    except ModuleNotFoundError as error:
        raise BackendUnavailable(NOT_INSTALLED) from error
    except ImportError as error:
        raise BackendUnavailable(
            f"Mooncake is installed but cannot be loaded ({error}): apt-get install libibverbs1 libnuma1 libcurl4, "
            "and install the variant of the wheel that fits this machine's CUDA"
        ) from error
    return TransferEngine


def choose_ip_version(host: str) -> int:
    """Choose IPv4 or IPv6 for `host`, and return 4 or 6. Call this before Mooncake is imported: it reads then, once in
    a process, to which of them it shall connect.

    Raises:
        BackendUnavailable: `host` is not an address, not one that peers reach, or not of the version that Mooncake
            already uses in this process.
    """
    try:
        check_peer_host(host)
    except InvalidAddress as error:
        raise BackendUnavailable(f"Mooncake cannot serve on {error}") from None
    wanted = 6 if ":" in host else 4
    if only := _only_ipv6(host):
        raise BackendUnavailable(
            f"Mooncake connects to names by IPv4, and {host!r} has none but {only}: expected that address instead"
        )
    if wanted == 6 and "mooncake.engine" not in sys.modules:
        os.environ.setdefault(IPV6_VARIABLE, "1")
    there = 6 if os.environ.get(IPV6_VARIABLE) else 4
    if there != wanted:
        cure = f"set {IPV6_VARIABLE}=1" if wanted == 6 else f"unset {IPV6_VARIABLE}"
        raise BackendUnavailable(
            f"Mooncake uses IPv{there} in this process, and {host} is IPv{wanted}: {cure}, or use other addresses"
        )
    return wanted


def _only_ipv6(host: str) -> str:
    """Return an IPv6 address of a name that has no IPv4 address; "" if it has one, is unknown, or is an IPv6
    address."""
    if ":" in host:
        return ""
    try:
        found = {place[0]: family for family, *_, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except OSError:  # an unknown name: this is reported when the address is bound
        return ""
    return "" if socket.AF_INET in found.values() else str(next(iter(found)))


def require_cuda_wheel() -> None:
    """Raise BackendUnavailable if the installed wheel cannot read GPU memory: it would fail in the first transfer."""
    engine: Any = importlib.import_module("mooncake.engine")
    if not getattr(engine, "SUPPORT_CUDA", True):
        raise BackendUnavailable(
            "the installed Mooncake is the one without CUDA, and the pool is on a GPU: pip uninstall "
            "mooncake-transfer-engine-non-cuda, and pip install 'hbserve-kv[mooncake]' (CUDA 12) or "
            "'hbserve-kv[mooncake-cuda13]' (CUDA 13)"
        )


def why_no_rdma() -> str:
    """Return why RDMA cannot be used; "" if there is an RDMA network card with an active port."""
    if not RDMA_CARDS.is_dir() or not any(RDMA_CARDS.iterdir()):
        return "this machine has no RDMA network card"
    states = [state.read_text() for state in RDMA_CARDS.glob("*/ports/*/state")]
    return "" if any("ACTIVE" in state for state in states) else "no port of the RDMA network cards is active"

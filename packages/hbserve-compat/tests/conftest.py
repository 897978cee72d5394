"""Fixtures for commands: configuration files of a pair of instances."""

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml


def pytest_configure() -> None:
    """Cache what takes 15 ms each time: the parser of all commands, which every test of a command would make anew, and
    the certificates that an HTTP client trusts."""
    with warnings.catch_warnings():
        # The lowest typer imports what the newest click calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import typer.testing
    typer.testing._get_command = cache(typer.testing._get_command)
    if importlib.util.find_spec("httpx") is not None:
        import httpx

        transports: Any = httpx._transports.default
        transports.create_ssl_context = cache(httpx.create_ssl_context)


@pytest.fixture
def config(tmp_path: Path, small_model: Callable[[str], Path]) -> Callable[..., Path]:
    """Function that writes a configuration file of one pair, changed by `section={key: value}`."""

    def write(**changes: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"path": str(small_model("qwen3"))},
            "engine": {"num_blocks": 64},
            "scheduler": {"port": 0},
            "server": {"port": 0},
            "gpu_instances": [
                {"instance_id": "prefill-0", "instance_type": "prefill", "kv_rank": 0},
                {"instance_id": "decode-0", "instance_type": "decode", "kv_rank": 1},
            ],
        }
        for section, keys in changes.items():
            content[section] = {**content.get(section, {}), **keys} if isinstance(keys, dict) else keys
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write

"""Configuration files for commands that start a pair of instances."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def config(tmp_path: Path, small_model: Callable[[str], Path]) -> Callable[..., Path]:
    """Writes a configuration file of one pair, changed by `section={key: value}`."""

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

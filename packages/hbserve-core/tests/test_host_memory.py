"""What a host has too little memory for is refused with what it takes and what there is, before it is tried."""

import resource
from pathlib import Path

import pytest
import torch

from hbserve_core.config import InstanceConfig
from hbserve_core.errors import NotEnoughMemory
from hbserve_core.model import host_memory
from hbserve_core.model.host_memory import available_memory, require_room, total_memory, weight_bytes
from hbserve_core.model.kv_pool import BlockShape, allocate_pool
from hbserve_core.model.loaded_model import LoadedModel
from hbserve_core.model.model_config import load_model_config
from hbserve_testing.processes import no_file_longer_than

GIB = 1 << 30


def host(monkeypatch, folder: Path, **files: str) -> None:
    """One with 8 GiB, 6 of them available, and no swap; with files of a control group."""
    (folder / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n")
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".", 1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content + "\n")
    monkeypatch.setattr(host_memory, "MEMINFO", folder / "meminfo")
    monkeypatch.setattr(host_memory, "CGROUP", folder)


STAT = "anon 1\ninactive_file 100\nactive_file 50\n"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, 8 * GIB, 6 * GIB),
        ({"memory_max": "max", "memory_current": "5", "memory_stat": STAT}, 8 * GIB, 6 * GIB),
        ({"memory_max": "1000", "memory_current": "400", "memory_stat": STAT}, 1000, 750),
        ({"memory_max": "1000", "memory_current": "1200", "memory_stat": ""}, 1000, 0),
        ({"memory__memory_limit_in_bytes": "2000", "memory__memory_usage_in_bytes": "500"}, 2000, 1500),
        ({"memory__memory_limit_in_bytes": str(2**63 - 4096)}, 8 * GIB, 6 * GIB),
    ],
)
def test_memory_is_what_the_host_has_and_its_control_group_may_have(files, total, available, tmp_path, monkeypatch):
    host(monkeypatch, tmp_path, **files)
    assert (total_memory(), available_memory()) == (total, available)


def test_a_limit_of_the_address_space_counts_too(tmp_path, monkeypatch):
    host(monkeypatch, tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 50, 1 << 50))
    assert available_memory() == 6 * GIB
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))  # less than this process has
    assert available_memory() == 0


def test_weights_are_counted_as_they_will_lie_there(small_model):
    model = load_model_config(small_model("qwen3"))
    stored = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    assert weight_bytes(model, "auto") == pytest.approx(stored, rel=0.05)
    assert weight_bytes(model, "float32") == 2 * weight_bytes(model, "bfloat16") == 2 * weight_bytes(model, "float16")


def test_too_little_for_the_weights_is_one_line_with_both(small_model, tmp_path, monkeypatch):
    model = load_model_config(small_model("qwen3"))
    host(monkeypatch, tmp_path, memory_max="70000")
    message = r": its weights need .* GiB of this host's memory, of which 0\.0 GiB are available; take a smaller model$"
    with pytest.raises(NotEnoughMemory, match=message):
        require_room(model, "auto", 1)
    with pytest.raises(NotEnoughMemory, match=r": 3 times its weights, one for each instance, need .* fewer instances"):
        require_room(model, "auto", 3)
    require_room(model, "auto", 0)
    with pytest.raises(NotEnoughMemory, match=message):
        LoadedModel(InstanceConfig(model_path=str(model.path), device="cpu"))


def test_a_pool_that_the_host_could_never_fill_is_refused(tmp_path, monkeypatch):
    host(monkeypatch, tmp_path)
    block = BlockShape(num_layers=4, block_size=16, num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)
    num_blocks = 9 * GIB // block.block_bytes
    message = rf"num_blocks={num_blocks}: a KV pool of 9\.0 GiB does not fit on cpu \(this host has 8\.0 GiB\); choose"
    with pytest.raises(NotEnoughMemory, match=message):
        allocate_pool(num_blocks, block, torch.device("cpu"))


def test_a_pool_that_a_limit_of_files_forbids_names_the_limit():
    block = BlockShape(1, 16, 1, 16, torch.float32)
    with no_file_longer_than(50), pytest.raises(NotEnoughMemory, match=r"cpu \(File too large, raise `ulimit -f`\)"):
        allocate_pool(4, block, torch.device("cpu"))

"""The documented names are the same objects as in the packages that own them, and importing a light one stays light."""

import importlib
import subprocess
import sys

import pytest

MIRRORS = [
    ("hbserve", "SamplingParams", "hbserve_rpc.sampling_params"),
    ("hbserve.sampling_params", "SamplingParams", "hbserve_rpc.sampling_params"),
    ("hbserve.pd_disagg", "CpuScheduler", "hbserve_scheduler.cpu_scheduler"),
    ("hbserve.pd_disagg", "GpuInstance", "hbserve_core.instance.gpu_instance"),
    ("hbserve.pd_disagg", "KVTransferBackend", "hbserve_kv.config"),
    ("hbserve.pd_disagg", "KVTransferManager", "hbserve_kv.manager"),
    ("hbserve.pd_disagg", "RpcClient", "hbserve_rpc.client"),
    ("hbserve.pd_disagg", "RpcServer", "hbserve_rpc.server"),
    ("hbserve.pd_disagg", "LLM", "hbserve.pd_disagg.llm"),
    ("hbserve.pd_disagg.cpu_scheduler", "CpuScheduler", "hbserve_scheduler.cpu_scheduler"),
    ("hbserve.pd_disagg.kv_transfer", "KVTransferBase", "hbserve_kv.base"),
    ("hbserve.pd_disagg.kv_transfer.base", "KVTransferBase", "hbserve_kv.base"),
]


@pytest.mark.parametrize(("path", "name", "owner"), MIRRORS)
def test_a_documented_name_is_its_owners_object(path, name, owner):
    assert getattr(importlib.import_module(path), name) is getattr(importlib.import_module(owner), name)


@pytest.mark.parametrize("path", sorted({path for path, _, _ in MIRRORS}))
def test_all_names_are_there(path):
    module = importlib.import_module(path)
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    "module", ["hbserve", "hbserve.__main__", "hbserve_scheduler.__main__", "hbserve.sampling_params"]
)
def test_a_schedulers_process_sees_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print(*({{'torch', 'transformers', 'tokenizers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_a_process_that_serves_http_loads_nothing_of_the_command_line():
    code = "import sys, hbserve.server.front_end_process; print(*({'torch', 'typer', 'rich'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""


def test_a_process_that_starts_instances_or_asks_them_does_not_import_torch():
    code = "import sys, hbserve.commands.generate; from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig; "
    code += "PdDisaggConfig(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"

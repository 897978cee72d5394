"""What `import hbserve_rpc` offers is what it says it offers."""

import inspect
import subprocess
import sys

import hbserve_rpc
from hbserve_rpc import HBServeRpcError


def test_all_names_exactly_the_public_names_that_are_there():
    there = {
        name
        for name, value in vars(hbserve_rpc).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }  # fmt: skip
    assert set(hbserve_rpc.__all__) == there
    assert hbserve_rpc.__all__ == sorted(hbserve_rpc.__all__)


def test_every_error_of_the_package_is_exported_and_documented():
    errors: set[type[Exception]] = {HBServeRpcError, *HBServeRpcError.__subclasses__()}
    assert {error.__name__ for error in errors} <= set(hbserve_rpc.__all__)
    text = sys.modules[HBServeRpcError.__module__].__doc__ or ""
    assert all(error.__name__ in text for error in errors)


def test_importing_it_brings_neither_torch_nor_the_packages_above_it():
    script = "import sys, hbserve_rpc.messages; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "hbserve", "hbserve_kv", "hbserve_core", "hbserve_scheduler"} & set(done.stdout.split())

"""Every transport and a backend of somebody else's, by the suite that third parties use."""

import subprocess
import sys

import pytest

from hbserve_kv.testing import CHECKS, Check, LoopbackNetwork, run_check


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_backends_conform(backend: str, check: Check) -> None:
    # Known elsewhere: vLLM #37333, #43523, SGLang #12157.
    await run_check(check, backend=backend)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
async def test_loopback_conforms(check: Check, two_sided: bool) -> None:
    await run_check(check, transport=LoopbackNetwork(two_sided=two_sided).transport)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_backends_conform_on_a_gpu(backend: str, check: Check) -> None:
    await run_check(check, backend=backend, device="cuda")


def test_without_assertions_nothing_conforms():
    code = "import asyncio; from hbserve_kv.testing import CHECKS, run_check; asyncio.run(run_check(CHECKS[0]))"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "run them without python -O" in done.stderr

"""Every transport and a backend of somebody else's, by the suite that third parties use."""

import asyncio
import itertools
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hbserve_kv.memory.memory import Memory
from hbserve_kv.testing import CHECKS, LAYOUTS, Check, LoopbackNetwork, LoopbackTransport, conformance, run_check
from hbserve_kv.testing.rig import BLOCK_MAJOR

MOVING = [
    each for each in CHECKS if any(word in each.__name__ for word in ("land_where", "checksum", "sizes", "layer"))
]
"""Checks of which bytes go where; the others are of what becomes of transfers."""
PAIRS = list(itertools.pairwise([*LAYOUTS, BLOCK_MAJOR]))
OTHER_LAYOUTS = [("layer-major", "keys beside values"), ("heads first", BLOCK_MAJOR), ("layer-major", "layer-major")]


@pytest.fixture(params=OTHER_LAYOUTS, ids=" to ".join)
def layouts(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Of the sender's pool and of the receiver's."""
    found: tuple[str, str] = request.param
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_backends_conform(backend: str, check: Check) -> None:
    # Known elsewhere: vLLM #37333, #43523, SGLang #12157.
    await run_check(check, backend=backend)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("two_sided", [False, True], ids=["one-sided", "two-sided"])
async def test_loopback_conforms(check: Check, two_sided: bool) -> None:
    await run_check(check, transport=LoopbackNetwork(two_sided=two_sided).transport)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
async def test_loopback_conforms_between_layouts(check: Check, pair: tuple[str, str]) -> None:
    two_sided = PAIRS.index(pair) % 2 == 0
    await run_check(check, transport=LoopbackNetwork(two_sided=two_sided).transport, layouts=pair)


@pytest.mark.parametrize("check", MOVING, ids=lambda check: check.__name__)
async def test_backends_conform_between_layouts(processes_backend: str, check: Check, layouts: tuple[str, str]) -> None:
    await run_check(check, backend=processes_backend, layouts=layouts)


@pytest.mark.gpu
@pytest.mark.parametrize("check", MOVING, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_backends_conform_between_layouts_on_a_gpu(backend: str, check: Check, layouts: tuple[str, str]) -> None:
    await run_check(check, backend=backend, device="cuda", layouts=layouts)


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", ["nccl", "ipc"])
async def test_backends_conform_on_a_gpu(backend: str, check: Check) -> None:
    await run_check(check, backend=backend, device="cuda")


class Leaves(LoopbackTransport):
    """Whose start leaves a file open when it is cancelled."""

    left: ClassVar[list[int]] = []

    async def start(self, memory: Memory) -> None:
        self.left.append(os.open("/dev/null", os.O_RDONLY))
        await asyncio.sleep(0.01)
        os.close(self.left.pop())
        await super().start(memory)


async def test_a_transport_whose_start_leaves_a_file_open_when_it_is_cancelled_does_not_conform(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conformance, "CHECK_TIMEOUT_S", 2.0)
    network = LoopbackNetwork()
    with pytest.raises(TimeoutError):
        await run_check(
            conformance.a_start_that_is_cancelled_leaves_no_file_and_no_thread, transport=lambda: Leaves(network)
        )
    while Leaves.left:
        os.close(Leaves.left.pop())


def test_without_assertions_nothing_conforms():
    source = Path(conformance.__file__)
    as_by_python_o: dict[str, Any] = {"__name__": "conformance_without_assertions"}
    exec(compile(source.read_text(), source, "exec", optimize=1), as_by_python_o)
    with pytest.raises(RuntimeError, match="run them without python -O"):
        asyncio.run(as_by_python_o["run_check"](CHECKS[0]))

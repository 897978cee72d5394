"""The number of files through which a reader, or a request, goes in a step of the engine, a KV transfer, and a request
in the scheduler.

The files of each flow are listed here, and compared with those that really run, or are imported. A file that joins a
flow must be listed, and must not exceed the bar. Bars only go down. benchmarks/trace_request.py prints more details.
"""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.warm
ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.as_posix().rpartition("/src/")[2]: path for path in ROOT.glob("packages/*/src/**/*.py")}
"""Source files, by paths such as hbserve_kv/manager.py."""


def files(*folders: str) -> set[str]:
    """Expand lines such as `hbserve_kv/memory: heads memory` to paths."""
    found = set()
    for line in folders:
        folder, _, names = line.partition(": ")
        found |= {f"{folder}/{name}.py" for name in names.split()}
    return found


ENGINE = "hbserve_core/engine: batch_scheduler block_manager engine sequence step step_times"
LAYERS = "hbserve_core/model: layers rank_group"
FLOWS = {
    "cuda step": files(
        ENGINE,
        LAYERS,
        "hbserve_core/cuda_runner: decoder products runner step_packer",
        "hbserve_core/cuda_runner/kernels: attention_parts decode_attention dependent_launch experts few_rows_linear",
        "hbserve_core/cuda_runner/kernels: pointwise prefill_attention sampling",
    ),
    "step": files(
        ENGINE,
        LAYERS,
        "hbserve_core/model: rope",
        "hbserve_core/torch_runner: attention decoder runner sampler",
    ),
    "transfer": files(
        "hbserve_core/instance: handover",
        "hbserve_core/transfers: instance_transfers",
        "hbserve_kv: manager",
        "hbserve_kv/memory: layout memory",
        "hbserve_kv/protocol: handshake messages transfer_state",
        "hbserve_kv/receiving: receiver transfer",
        "hbserve_kv/sending: link peers transfer",
        "hbserve_kv/transports: base nccl own_sockets",
        "hbserve_rpc: address client connected_client message_socket rpc_stream server server_connection wire",
    ),
    "scheduling": files(
        "hbserve_scheduler: admission attempt cpu_scheduler event_stream figures fleet instances policies request"
    ),
}
"""Files of a step on CUDA, with its kernels; of the same on a CPU, in plain torch; of a transfer over nccl, the first
of a pair of instances; and of a request that meets no error. All have one rank, and requests that ask for tokens alone,
so that a step runs nothing of hbserve_core/logits."""
HOPPER = files("hbserve_core/cuda_runner/kernels: hopper hopper_attention hopper_gated")
"""Kernels of one generation of GPUs, which replace two that are listed: a step on CUDA imports these too."""
FEW_ROWS = files("hbserve_core/cuda_runner/kernels: few_experts")
"""Kernels of a mixture's steps of one or two rows, which replace those of experts.py."""
BESIDE_IT = files("hbserve_rpc: loop_lag reminder", "hbserve_scheduler: health links")
"""Files that run beside a request, but do not belong to it: a timer, and, on a machine that stalls, the scheduler's
handling of an instance that it does not hear in time."""
LOADING = files("hbserve_core/cuda_runner: warm_up", "hbserve_core/model: loaded_model model_config weights")
"""Files that run before a runner's first step."""
MOST_OF_A_REQUEST = {"files": 52, "classes": 82, "tasks": 11}
"""Bars of one request between two connected instances, for all processes together. Tasks are those of asyncio."""
MOST_FILES = {"cuda step": 20, "step": 13, "transfer": 24, "scheduling": 9}


@pytest.fixture(scope="module")
def traced() -> dict[str, list[str]]:
    return trace("--first")


@pytest.fixture(scope="module")
def connected() -> dict[str, list[str]]:
    return trace("--connected")


def trace(which: str) -> dict[str, list[str]]:
    command: list[str | Path] = [sys.executable, ROOT / "benchmarks/trace_request.py", which, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def imported(file: str) -> set[str]:
    """Return the files of this workspace that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(SOURCES[file].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {module.replace(".", "/") + ".py" for module in modules} & SOURCES.keys()


@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_has_no_more_files_than_its_bar(flow):
    assert len(FLOWS[flow]) <= MOST_FILES[flow]
    assert FLOWS[flow] <= SOURCES.keys()


@pytest.mark.parametrize("flow", ["step", "transfer", "scheduling"])
def test_a_request_runs_through_the_listed_files_only(flow, traced):
    assert set(traced[flow]) - BESIDE_IT <= FLOWS[flow]
    assert len(traced[flow]) > len(FLOWS[flow]) / 2, "the trace shows little"


def test_the_first_request_of_a_pair_that_is_connected_has_nothing_to_do_with_connecting(traced, connected):
    assert "hbserve_kv/protocol/handshake.py" in traced["transfer"]
    assert len(connected["transfer"]) > len(FLOWS["transfer"]) / 2, "the trace shows little"
    assert "hbserve_kv/protocol/handshake.py" not in connected["transfer"]


def test_the_tour_of_a_request_names_files_and_functions_that_run(connected):
    _, _, tour = (ROOT / "docs/architecture.md").read_text().partition("## Follow one request through the code")
    rows = re.findall(r"^    (hbserve_\S+\.py) +(.+)$", tour.split("```")[1], re.MULTILINE)
    named = [f"{file} {name}" for file, row in rows for name in re.findall(r"[A-Z]\w+\.\w+|\bwait_for_kv\b", row)]
    assert len(rows) > 30
    assert {file for file, _ in rows} == {each.partition(" ")[0] for each in named}, "a row without a function"
    assert set(named) - set(connected["functions"]) == set()


@pytest.mark.parametrize("what", MOST_OF_A_REQUEST)
def test_a_request_runs_through_no_more_files_and_classes_and_makes_no_more_tasks_than_its_bar(what, connected):
    found = [each for each in connected[what] if each.partition(" ")[0] not in BESIDE_IT]
    assert 0 < len(found) <= MOST_OF_A_REQUEST[what], found


def test_a_cuda_step_is_made_of_the_listed_files_only():
    """Looks at imports, for machines without a GPU: the engine and the CUDA runner import these files, and of the model
    these."""
    reached, todo = set(), {"hbserve_core/engine/engine.py", "hbserve_core/cuda_runner/runner.py"}
    while todo:
        file = todo.pop()
        reached.add(file)
        if not file.startswith("hbserve_core/model/"):
            found = imported(file) - reached
            todo |= {other for other in found if other.split("/")[1] in ("engine", "cuda_runner", "model")}
    assert reached - LOADING == FLOWS["cuda step"] | HOPPER | FEW_ROWS

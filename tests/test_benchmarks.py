"""Benchmarks, which are otherwise run by hand: they run at all, and print what they should."""

import asyncio
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hbserve_testing.narrowing import present
from hbserve_testing.processes import alive, children_of
from hbserve_testing.waits import until

pytestmark = pytest.mark.warm

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def test_a_way_to_copy_is_measured_beside_computation():
    command = [sys.executable, FOLDER / "kv_transfer.py", "--beside", "ipc, kernel, high priority"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"^ipc, .*", done.stdout, re.MULTILINE)
    # Columns of a machine that is slow enough have no space between them.
    alone, beside, transfer_ms, *_ = map(
        float, re.findall(r"-?\d+\.\d+", row.removeprefix("ipc, kernel, high priority"))
    )
    assert min(alone, beside, transfer_ms) > 0


@pytest.mark.parametrize("decodes", ["0", "1"])
def test_chunk_sizes_are_compared_by_a_single_request_and_where_nothing_decodes(decodes):
    command = [sys.executable, FOLDER / "chunk_sizes.py", "--requests", "1", "--sizes", "512", "--decodes", decodes]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for row in done.stdout.splitlines()[1:]:
        size, *figures = row.split()
        assert size in ("512", "auto")
        assert [figure == "-" for figure in figures] == [False, False, *[decodes == "0"] * 2, False]
        assert all(float(figure) >= 0 for figure in figures if figure != "-"), "NaN is not"


def test_layer_major_pools_are_measured_beside_block_major_ones():
    command = [sys.executable, FOLDER / "kv_layouts.py", "--size", "8", "--rounds", "1", "--backends", "ipc"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (row,) = re.findall(r"^ipc +([\d. ]+)", done.stdout, re.MULTILINE)
    assert all(float(rate) > 0 for rate in row.split())
    assert len(row.split()) == 4
    assert "72 pieces a block" in done.stdout


@pytest.mark.parametrize("instances", [["--backend", "ipc"], ["--hybrid", "2"]], ids=["apart", "hybrid"])
def test_the_handoff_is_measured_under_a_load_and_beside_hybrid_instances(small_model, instances):
    command = [sys.executable, FOLDER / "pd_handoff.py", "--model", small_model("qwen3"), *instances]
    load = ["--rate", "50", "--requests", "20", "--input", "40", "--output", "6", "--chunk-size", "16"]
    done = subprocess.run([*map(str, command), *load], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "20 requests of 40 + 6 tokens in chunks of 16, 50 a second" in done.stdout
    for line in ("time to first token", "first token to second", "between later tokens", "hand-off in steps"):
        found = re.search(rf"^{line}: .*p50 ([\d.]+).*p99 ([\d.]+)", done.stdout, re.MULTILINE)
        p50, p99 = map(float, present(found).groups())
        assert 0 <= p50 <= p99
    moved = float(re.findall(r"KV moved: ([\d.]+) MB", done.stdout)[0])
    assert (moved > 0) == ("ipc" in instances)


def test_the_kv_that_moves_beside_computation_is_counted_in_the_pool_of_the_other_process(small_model):
    command = [sys.executable, FOLDER / "pd_handoff.py", "--model", small_model("qwen3"), "--backend", "ipc"]
    load = ["--requests", "4", "--input", "256", "--output", "4", "--chunk-size", "64"]
    done = subprocess.run([*map(str, command), *load], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"last of 4 chunks starts, .* there is: median ([\d.]+), least ([\d.]+); bar .* = 0.667", done.stdout
    )
    median, least = map(float, present(found).groups())
    assert 0 <= least <= median <= 1


def test_the_scheduler_is_measured_at_several_numbers_of_waiting_requests_and_instances():
    command = [sys.executable, FOLDER / "scheduler_cost.py", "--count", "20", "--waiting", "10", "50"]
    small = ["--instances", "2", "20", "--prompts", "16"]
    done = subprocess.run([*map(str, command), *small], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    costs = re.findall(r"(\d+) waiting: submit ([\d.]+) us, abort ([\d.]+) us, refuse ([\d.]+) us", done.stdout)
    assert [waiting for waiting, *_ in costs] == ["10", "50"]
    assert re.findall(r"(\d+) instances, prompts of 16: \d+ us a request", done.stdout) == ["2", "20"]


def test_hostile_frames_on_every_port_end_nothing_and_leave_nothing():
    """How long a good client waits beside them is not tested, because that needs a machine of its own."""
    command = [sys.executable, FOLDER / "wires.py", "--frames", "2000", "--half-open", "30", "--p99-ms", "60000"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    (moved,) = re.findall(r"^transfers: (\d+), each with what was sent$", done.stdout, re.MULTILINE)
    assert int(moved) > 0


def test_requests_that_are_left_and_clients_that_vanish_leave_nothing_at_the_scheduler():
    command = [sys.executable, FOLDER / "scheduler_cycles.py", "--cycles", "600", "--disconnects", "30"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^ +[\d.]+ +\d+ +\d+ +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    assert len(rows) == 6
    assert {requests for _, requests in rows} == {"0"}


def test_the_time_of_a_simulation_is_said_with_its_figures():
    load = ["--instances", "8", "--requests", "40", "--cells", "1", "2"]
    command = [sys.executable, FOLDER / "simulate_scale.py", *load]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^8 instances in (\d) cells, 40 requests: \d+ s", done.stdout, re.MULTILINE) == ["1", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_a_deployment_under_chaos_ends_with_who_is_told_to_end(small_model, number):
    nowhere = asyncio.subprocess.DEVNULL
    command = [sys.executable, str(FOLDER / "deployment_chaos.py"), "--model", str(small_model("qwen3"))]
    chaos = await asyncio.create_subprocess_exec(*command, stdout=nowhere, stderr=nowhere)
    try:
        await until(lambda: len(children_of(chaos.pid)) == 5)  # a scheduler, and four instances
        children = children_of(chaos.pid)
    finally:
        chaos.send_signal(number)
        async with asyncio.timeout(60):
            status = await chaos.wait()
    assert status not in (0, -number)
    assert [each for each in children if alive(each)] == []

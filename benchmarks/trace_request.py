"""Path of one request: the files, classes and functions of HBServe that it goes through, and the tasks that it makes.

    uv run python benchmarks/trace_request.py
    uv run python benchmarks/trace_request.py --first --calls

A scheduler, a prefill and a decode instance run in this process, on the CPU, one rank each, with a small model whose
weights are invented. One request is traced, from `submit` to its last event and until its blocks are back. By default
it is the second one of the pair, which finds a link. With --first it is the one that opens the link, because the
scheduler does not let the instances open it earlier; with --connected, the first one of a pair whose link is open.

Lambdas, comprehensions, imports and other packages are not counted, and the scheduler's heartbeats are too rare to be.
Three parts of the path are also counted as flows, by where the files are: see FLOWS. `--json` prints their files, all
that ran, and what the tasks run. tests/test_flows.py compares it with its lists and bars, and with the drawing in
docs/architecture.md.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hbserve_core import GpuInstance, InstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_rpc import SamplingParams
from hbserve_rpc.messages import GenerateRequest, Role
from hbserve_scheduler import CpuScheduler, SchedulerConfig
from hbserve_testing.small_models import SMALL

DEADLINE_S = 120.0
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS, CHUNK_TOKENS = 70, 6, 32
"""Three chunks, so that blocks are pushed while others are computed."""
MODEL = SMALL | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "float32",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CONNECTIONS = (
    "address", "client", "connected_client", "message_socket", "methods", "rpc_stream", "server", "server_connection",
    "wire",
)  # fmt: skip
FLOWS = {
    "step": ("hbserve_core/engine/", "hbserve_core/torch_runner/", "hbserve_core/logits/", "hbserve_core/model/"),
    "transfer": (
        "hbserve_kv/",
        "hbserve_core/transfers/",
        "hbserve_core/instance/handover.py",
        *(f"hbserve_rpc/{name}.py" for name in CONNECTIONS),
    ),
    "scheduling": ("hbserve_scheduler/",),
}
"""Beginnings of the paths of three flows: a step of the engine on a CPU; a KV transfer, with what carries its messages;
and a request in the scheduler."""


@dataclass
class Trace:
    """Records the calls of HBServe's own functions, in every thread that begins after `install`, while `is_on`."""

    is_on: bool = False
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Number of calls by file, such as hbserve_kv/manager.py, and qualified name, in the order of the first calls."""
    tasks: Counter[str] = field(default_factory=Counter)
    connecting: set[asyncio.Task[Any]] = field(default_factory=set)
    """Receiving ends of links that are not connected yet."""
    _paths: dict[str, str] = field(default_factory=dict)
    """Path such as hbserve_kv/manager.py by a code object's file; "" for files of other packages."""

    def install(self) -> None:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def make_task(self, loop: asyncio.AbstractEventLoop, job: Any, **keywords: Any) -> asyncio.Task[Any]:
        """Make a task, and count it. This is a task factory for the event loop."""
        if self.is_on and self._path(job.cr_code.co_filename):
            self.tasks[job.__qualname__] += 1
        task = asyncio.Task(job, loop=loop, **keywords)
        # As the loop ends, it closes generators, whose jobs have no names.
        if getattr(job, "__qualname__", "").endswith("Transport.connect"):
            self.connecting.add(task)
            task.add_done_callback(self.connecting.discard)
        return task

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if self.is_on and event == "call" and (path := self._path(frame.f_code.co_filename)):
            name = frame.f_code.co_qualname
            if not name.rpartition(".")[2].startswith("<"):
                self.calls[path, name] += 1

    def _path(self, file: str) -> str:
        if file not in self._paths:
            _, found, below = file.rpartition("/src/")
            self._paths[file] = below if found and below.startswith("hbserve") else ""
        return self._paths[file]

    def files(self, *beginnings: str) -> list[str]:
        return sorted({path for path, _ in self.calls if path.startswith(beginnings)})

    def classes(self, *beginnings: str) -> list[tuple[str, str]]:
        """Return the classes whose functions were called, each with its file."""
        return sorted(
            {(path, owner) for path, name in self.calls if path.startswith(beginnings) and (owner := class_of(name))}
        )

    def summary(self, *beginnings: str) -> dict[str, int]:
        chosen = {key: count for key, count in self.calls.items() if key[0].startswith(beginnings)}
        return {
            "files": len(self.files(*beginnings)),
            "classes": len(self.classes(*beginnings)),
            "functions": len(chosen),
            "calls": sum(chosen.values()),
        }


def class_of(qualified_name: str) -> str:
    """Return the class of a function; "" if it has none, or is inside another function."""
    owner, _, rest = qualified_name.partition(".")
    return owner if rest and not rest.startswith("<locals>") else ""


def request(request_id: str, salt: int) -> GenerateRequest:
    tokens = tuple(3 + (7 * place * place + salt * place) % 250 for place in range(NUM_PROMPT_TOKENS))
    return GenerateRequest(request_id, tokens, SamplingParams(0, NUM_OUTPUT_TOKENS, ignore_eos=True))


async def answer(scheduler: CpuScheduler, instances: Iterable[GpuInstance], asked: GenerateRequest) -> None:
    """Send a request, and wait for its end, and until the instances hold nothing of it any more."""
    events = [event async for event in scheduler.submit(asked)]
    assert events[-1].finish_reason == "length", events[-1]
    while any(instance.num_active for instance in instances):  # noqa: ASYNC110  an instance tells nobody
        await asyncio.sleep(0.01)


def make_instance(role: Role, kv_rank: int, folder: str, backend: str) -> GpuInstance:
    kv_transfer = KVTransferConfig(backend=backend, buffer_size=1 << 20)
    config = InstanceConfig(
        instance_id=f"{role}-0",
        role=role,
        model_path=folder,
        load_format="dummy",
        device="cpu",
        num_blocks=64,
        num_threads=1,
        chunk_size=CHUNK_TOKENS,
        kv_rank=kv_rank,
        kv_transfer=kv_transfer,
    )
    return GpuInstance(config)


async def run(trace: Trace, folder: str, backend: str, which: str | None) -> None:
    asyncio.get_running_loop().set_task_factory(trace.make_task)
    instances = [make_instance("prefill", 0, folder, backend), make_instance("decode", 1, folder, backend)]
    config = SchedulerConfig(
        heartbeat_interval_s=DEADLINE_S,
        heartbeat_timeout_s=10 * DEADLINE_S,
        max_warm_links=0 if which == "first" else 1,
    )
    scheduler = CpuScheduler(config)
    try:
        async with asyncio.timeout(DEADLINE_S):
            for instance in instances:
                await instance.start()
                await instance.wait_ready()
                await scheduler.add_instance(instance.config.instance_id, instance.config.role, instance.address)
            await scheduler.start()
            await scheduler.wait_ready(DEADLINE_S)
            prefill = scheduler.fleet.handles["prefill-0"]
            # The scheduler hears of a link from its sender. Its other end may still be at work then.
            while which == "connected" and (not prefill.links or trace.connecting):  # noqa: ASYNC110  it tells nobody
                await asyncio.sleep(0.01)
            if which is None:
                await answer(scheduler, instances, request("before", 1))
            trace.is_on = True
            await answer(scheduler, instances, request("traced", 5))
            trace.is_on = False
    finally:
        await scheduler.stop()
        for instance in instances:
            await instance.stop()


def report(trace: Trace, say: Callable[[str], None]) -> None:
    packages = sorted({path.partition("/")[0] + "/" for path, _ in trace.calls})
    rows = [(package.strip("/"), trace.summary(package)) for package in packages]
    rows += [("all", trace.summary(""))]
    rows += [(f"flow: {name}", trace.summary(*beginnings)) for name, beginnings in FLOWS.items()]
    say(f"{'':20}" + "".join(f"{column:>11}" for column in rows[0][1]))
    for name, summary in rows:
        say(f"{name:20}" + "".join(f"{count:>11}" for count in summary.values()))
    say(f"{sum(trace.tasks.values())} tasks: " + ", ".join(f"{n} {name}" for name, n in trace.tasks.most_common()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="nccl")
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--first", dest="which", action="store_const", const="first", help="trace the request that opens the link"
    )
    several.add_argument(
        "--connected", dest="which", action="store_const", const="connected", help="the first one after it was opened"
    )
    parser.add_argument("--calls", action="store_true", help="print every function too, in the order of first calls")
    parser.add_argument("--json", action="store_true", help="print what tests/test_flows.py compares, and nothing else")
    arguments = parser.parse_args()
    trace = Trace()
    trace.install()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        asyncio.run(run(trace, folder, arguments.backend, arguments.which))
    if arguments.json:
        flows = {name: trace.files(*beginnings) for name, beginnings in FLOWS.items()}
        whole = {
            "files": trace.files(""),
            "classes": [f"{path} {name}" for path, name in trace.classes("")],
            "functions": [f"{path} {name}" for path, name in trace.calls],
            "tasks": list(trace.tasks.elements()),
        }
        print(json.dumps(flows | whole))
        return
    report(trace, print)
    if arguments.calls:
        for (path, name), count in trace.calls.items():
            print(f"{count:6} {path} {name}")


if __name__ == "__main__":
    main()

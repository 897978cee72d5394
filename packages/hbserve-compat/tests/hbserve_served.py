"""`hbserve serve` as a process of its own, with its log and its metrics."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

DEADLINE_S = 120
PAIR = [
    {"instance_id": "prefill-0", "instance_type": "prefill", "kv_rank": 0},
    {"instance_id": "decode-0", "instance_type": "decode", "kv_rank": 1},
]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def found(self, pattern: str) -> str:
        """Wait until the log matches a pattern, and return the pattern's first group."""

        def look() -> bool:
            status = self.process.poll()
            assert status is None, f"ended with {status}: {self.log.read_text()}"
            return re.search(pattern, self.log.read_text()) is not None

        until(look)
        found = re.search(pattern, self.log.read_text())
        assert found is not None
        return found[1]

    @property
    def url(self) -> str:
        return self.found(r"OpenAI's API at (\S+)/v1")

    @property
    def rpc_address(self) -> str:
        return self.found(r"RPC at (\S+)")

    def metrics(self) -> dict[str, float]:
        return figures_of(httpx.get(f"{self.url}/metrics").text)

    def until_empty(self) -> None:
        """Wait until no request runs and every block is free again."""
        until(lambda: is_empty(self.metrics()))


def figures_of(metrics: str) -> dict[str, float]:
    lines = [line.split() for line in metrics.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def is_empty(figures: dict[str, float]) -> bool:
    """Whether no request runs and every block is free."""
    held = {name.partition("{")[2]: value for name, value in figures.items() if "kv_blocks{" in name}
    free = {name.partition("{")[2]: value for name, value in figures.items() if "kv_blocks_free{" in name}
    busy = sum(value for name, value in figures.items() if re.search("_(running|waiting|active)_?", name))
    return held == free and busy == 0


@contextmanager
def served(folder: Path, *options: str, statuses: Sequence[int] = (0,), **sections: Any) -> Iterator[Served]:
    """Run `hbserve serve` with these sections of a configuration file; without `model`, with the demo model.
    `statuses` are the exit statuses with which it may end."""
    content = {"gpu_instances": PAIR, "engine": {"num_blocks": 256}, "scheduler": {"port": 0}, "server": {"port": 0}}
    path, log = folder / "served.yaml", folder / "served.log"
    path.write_text(yaml.safe_dump(content | sections))
    command = [sys.executable, "-m", "hbserve", "serve", "--config", str(path), *options]
    with log.open("wb") as to:
        process = subprocess.Popen(command, stdout=to, stderr=to)
    try:
        yield Served(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    assert status in statuses, log.read_text()

"""`hbserve serve` under a load over HTTP, while its processes are killed, frozen and ended at random.

    python benchmarks/serve_chaos.py --seconds 600 --seed 1
    python benchmarks/serve_chaos.py --small                    a small random model: more events in the same time

There are two front ends, two prefill and two decode instances. In each round clients send greedy requests, streamed or
not. At a random moment one or two processes, the parent among them, get SIGKILL or SIGTERM, or SIGSTOP for some
seconds. Every complete answer must be the undisturbed one, a cut-off one must be the beginning of it, and every error
must be of a documented kind. A connection may be lost only where a front end was hit.
Then the clients pause, and nothing may be left: no request, block, transfer or connection, no process that was not
there before, and no file descriptors that grow with rounds. A server that was itself killed or ended must leave no
process, and must start again at its port at once.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hbserve_testing.processes import alive, children_of, command_of, ending_as_by_ctrl_c

AT_ONCE = 6
PROMPTS = [
    f"Here is a list of {word}:" for word in ("hills", "lakes", "kings", "ships", "trees", "birds", "roads", "wells")
]
MAX_TOKENS = 12
READY_S, SETTLE_S, ENDED_S, ANSWER_S = 180.0, 60.0, 60.0, 180.0
LONGEST_FREEZE_S = 15.0
MOST_NEW_FILES = 24
"""Most files that a process may have open in addition to those after its first round: links to restarted peers."""
SIGNALS = ["SIGKILL", "SIGKILL", "SIGSTOP", "SIGTERM"]
FRONT_END, INSTANCE, SERVER = "front end", "instance", "server"
DOCUMENTED = {500, 503}
ESTABLISHED, CLOSE_WAIT, LISTENING = "01", "08", "0A"


# ---- the deployment ----------------------------------------------------------------------------------------------


@dataclass
class Deployment:
    """`hbserve serve` as a process, which is started again when it was ended."""

    folder: Path
    port: int
    model: str | None
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        instances = [
            {"instance_id": f"{role}-{number}", "instance_type": role, "kv_rank": 2 * number + (role == "decode")}
            for number in range(2)
            for role in ("prefill", "decode")
        ]
        engine = {"device": "cpu", "num_threads": 1, "num_blocks": 300}
        content = {
            "model": {"path": self.model},
            "gpu_instances": instances,
            "engine": engine,
            "scheduler": {"port": 0},
        }
        (self.folder / "chaos.yaml").write_text(yaml.safe_dump(content))
        command = ["serve", "--config", str(self.folder / "chaos.yaml"), "--port", str(self.port), "--api-servers", "2"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hbserve", *command], stdin=subprocess.DEVNULL, stderr=log, stdout=log
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def processes(self) -> dict[int, str]:
        """Return the kinds of the running processes, by pid."""
        found = {self.pid: SERVER}
        for pid in children_of(self.pid):
            words = command_of(pid)
            found |= {pid: FRONT_END} if "hbserve.server.front_end_process" in words else {}
            found |= {pid: INSTANCE} if "hbserve_core" in words else {}
        return found

    def stop(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            for pid in [self.pid, *children_of(self.pid)]:
                os.kill(pid, signal.SIGCONT)
        self.process.terminate()
        self.process.wait(ENDED_S)


def until(condition: Callable[[], Any], deadline_s: float) -> bool:
    end_s = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)
    return True


# ---- clients -----------------------------------------------------------------------------------------------------


@dataclass
class Clients:
    """AT_ONCE threads that send requests while `asking` is set."""

    port: int
    chats: bool
    expected: dict[tuple[str, bool], str] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    asking: threading.Event = field(default_factory=threading.Event)
    connections_may_break: bool = False
    """Whether a front end was hit in this round, so that connections may be lost."""
    num_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False

    def start(self, seed: int) -> None:
        for number in range(AT_ONCE):
            threading.Thread(target=self._ask_on, args=[random.Random(f"{seed}-{number}")], daemon=True).start()

    def _ask_on(self, dice: random.Random) -> None:
        while not self.over:
            with self.lock:
                may_ask = self.asking.is_set()
                self.num_under_way += may_ask
            if not may_ask:
                time.sleep(0.05)
                continue
            prompt, chat, streamed = dice.choice(PROMPTS), dice.random() < self.chats / 2, dice.random() < 0.6
            try:
                end = self.one(prompt, chat, streamed)
            except Exception as error:
                end = f"WRONG: {type(error).__name__}: {error}"
            with self.lock:
                self.num_under_way -= 1
                self.ends[end.partition(":")[0]] += 1
                if end.startswith("WRONG"):
                    self.wrong.append(end)
            if end != "whole":
                time.sleep(0.3)

    def one(self, prompt: str, chat: bool, streamed: bool) -> str:
        """Send a request, and return how it ended."""
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        asked |= {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": streamed}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        text, lines = "", b""
        try:
            path = "/v1/chat/completions" if chat else "/v1/completions"
            connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                return self._refused(answer.status, answer.read())
            if not streamed:
                choice = json.loads(answer.read())["choices"][0]
                return self._whole((prompt, chat), choice["message"]["content"] if chat else choice["text"])
            for line in answer:
                lines += line
                if line.startswith(b"data: [DONE]"):
                    return self._whole((prompt, chat), text)
                if line.startswith(b"data: ") and (part := json.loads(line[6:])):
                    if "error" in part:
                        return self._told(part["error"], (prompt, chat), text)
                    for choice in part["choices"]:
                        text += choice["delta"].get("content") or "" if chat else choice["text"]
            raise http.client.IncompleteRead(lines[-80:])
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, TimeoutError):
                return f"WRONG: nothing for {ANSWER_S:g} s"
            if not self.expected.get((prompt, chat), text).startswith(text):
                return f"WRONG: other text before a lost connection: {text!r}"
            return "connection lost" if self.connections_may_break else f"WRONG: connection lost: {error!r}, {lines!r}"
        finally:
            connection.close()

    def _whole(self, key: tuple[str, bool], text: str) -> str:
        expected = self.expected.setdefault(key, text)
        return "whole" if text == expected else f"WRONG: {text!r}, undisturbed {expected!r}"

    def _refused(self, status: int, body: bytes) -> str:
        message = json.loads(body)["error"]["message"]
        self.errors[f"{status} {anonymous(message)}"] += 1
        return f"error {status}" if status in DOCUMENTED and message else f"WRONG: {status} {message}"

    def _told(self, error: dict[str, Any], key: tuple[str, bool], text: str) -> str:
        self.errors[f"in a stream: {anonymous(error['message'])}"] += 1
        is_beginning = self.expected.get(key, text).startswith(text)
        return "error in a stream" if is_beginning else f"WRONG: other text before an error: {text!r}"

    def pause(self) -> bool:
        self.asking.clear()
        return until(lambda: not self.num_under_way, 2 * ANSWER_S)


def anonymous(message: str) -> str:
    return re.sub(r"\b[0-9a-f]{32}\b|\d+(\.\d+)?", "N", message)[:400]


# ---- what may not be left ----------------------------------------------------------------------------------------


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def left_over(port: int) -> str:
    """Return what is still held according to /metrics; "" if nothing is."""
    status, text = get(port, "/metrics")
    held = re.compile(
        r"hbserve:(num_requests_(?:waiting|running)|instance_(?:active|waiting|running)_requests|kv_transfers_active|"
        r'link_transfers_active|kv_blocks_quarantined|kv_lookup_buffer_bytes|kv_blocks_by_state\{.*state="(?:active|'
        r'reserved|quarantined)".*\})(\{.*\})? (\S+)'
    )
    found = [line for line in text.splitlines() if (match := held.match(line)) and float(match[3])]
    return "no /metrics" if status != 200 else "; ".join(found)


def is_ready(deployment: Deployment) -> bool:
    kinds = Counter(deployment.processes().values())
    ups = re.findall(r"^hbserve:instance_up\{.*\} (\d)", get(deployment.port, "/metrics")[1], re.MULTILINE)
    healthy = get(deployment.port, "/health")[0] == 200 and sockets(deployment.port, LISTENING) == 2
    return healthy and kinds == {SERVER: 1, FRONT_END: 2, INSTANCE: 4} and ups == ["1"] * 4


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def sockets(port: int, *states: str) -> int:
    """Count the sockets of the server's side in these states, which are written as in /proc."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] in states for row in rows)


# ---- rounds ------------------------------------------------------------------------------------------------------


@dataclass
class Chaos:
    deployment: Deployment
    clients: Clients
    dice: random.Random
    faults: list[str] = field(default_factory=list)
    files: dict[int, int] = field(default_factory=dict)

    def check(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.faults.append(what)
            print(f"  FAULT: {what}", flush=True)

    def round(self) -> str:
        """Run a round of one or two events, and check what is left after them. Returns a line about it."""
        self.clients.connections_may_break = False
        self.clients.asking.set()
        time.sleep(self.dice.uniform(0.2, 3.0))
        told = []
        for _ in range(self.dice.choice([1, 1, 2])):
            told.append(self.hit())
            if SERVER in told[-1]:
                break
            time.sleep(self.dice.uniform(0.0, 2.0))
        began_s = time.monotonic()
        if SERVER in told[-1] and "SIGSTOP" not in told[-1]:
            self.ended(told[-1])
        self.check(until(lambda: is_ready(self.deployment), READY_S), "not all are back")
        back_s = time.monotonic() - began_s
        self.settle()
        return f"{', '.join(told)}; back after {back_s:.1f} s"

    def hit(self) -> str:
        there = self.deployment.processes()
        kind = self.dice.choices([INSTANCE, FRONT_END, SERVER], [6, 3, 1.5])[0]
        pid = self.dice.choice(sorted(pid for pid, each in there.items() if each == kind) or [self.deployment.pid])
        name = self.dice.choice(SIGNALS)
        self.clients.connections_may_break |= kind != INSTANCE
        self.children = [each for each in there if each != self.deployment.pid]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, name))
        if name != "SIGSTOP":
            return f"{name} {kind}"
        freeze_s = self.dice.choice([0.5, 2.0, 4.0, LONGEST_FREEZE_S])
        time.sleep(freeze_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        return f"SIGSTOP {kind} {freeze_s:g} s"

    def ended(self, told: str) -> None:
        """Check that neither processes nor the port of an ended server are left, and start it again."""
        process = self.deployment.process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2 * ENDED_S)
        self.check(process.returncode in ((0,) if "SIGTERM" in told else (-9,)), f"status {process.returncode}")
        self.check(until(lambda: not any(map(alive, self.children)), ENDED_S), "processes outlive the server")
        self.check(self.clients.pause(), "clients wait on")
        try:
            socket.create_server(("127.0.0.1", self.deployment.port)).close()
        except OSError as error:
            self.check(False, f"its port: {error}")
        self.deployment.start()

    def settle(self) -> None:
        self.check(self.clients.pause(), "clients wait on")
        port = self.deployment.port
        self.check(until(lambda: not left_over(port), SETTLE_S), f"left behind: {left_over(port)}")
        open_ones = (ESTABLISHED, CLOSE_WAIT)
        self.check(until(lambda: not sockets(port, *open_ones), 10), f"connections left: {sockets(port, *open_ones)}")
        for pid, kind in self.deployment.processes().items():
            before = self.files.setdefault(pid, num_files(pid))
            self.check(num_files(pid) <= before + MOST_NEW_FILES, f"{kind}: {before} files, then {num_files(pid)}")

    def begin(self) -> None:
        self.deployment.start()
        self.check(until(lambda: is_ready(self.deployment), READY_S), "does not start")
        for prompt in PROMPTS:
            for chat in {False, self.clients.chats}:
                self.check((end := self.clients.one(prompt, chat, False)) == "whole", f"undisturbed: {end}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    # No port that Linux gives to who connects: while nobody listens there, a client may get its own.
    port = random.SystemRandom().randrange(18000, 32000)
    with ending_as_by_ctrl_c(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = None
        if arguments.small:
            from hbserve_testing.small_models import write_small_model

            write_small_model(folder / "small", "qwen3")
            model = str(folder / "small")
        clients = Clients(port, chats=model is None)  # the small one has no template
        chaos = Chaos(Deployment(folder, port, model), clients, random.Random(arguments.seed))
        try:
            chaos.begin()
            clients.start(arguments.seed)
            end_s, number = time.monotonic() + arguments.seconds, 0
            while time.monotonic() < end_s:
                number += 1
                print(f"{number:3} {chaos.round()}", flush=True)
                for each in clients.wrong[:]:
                    chaos.check(False, each)
                    clients.wrong.remove(each)
        finally:
            clients.over = True
            chaos.deployment.stop()
            if chaos.faults:
                print((folder / "server.log").read_text()[-6000:], file=sys.stderr)
    print(f"{number} rounds, seed {arguments.seed}: {dict(clients.ends)}; {len(chaos.faults)} faults")
    for error, count in clients.errors.most_common():
        print(f"{count:5} x {error}")
    return 1 if chaos.faults else 0


if __name__ == "__main__":
    sys.exit(main())

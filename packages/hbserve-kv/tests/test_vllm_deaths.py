"""Servers of vLLM (an imitation: see hbserve_kv_vllm.py) that are killed, frozen and restarted, as real processes."""

import itertools
import multiprocessing
import signal
import time

import hbserve_kv_vllm as imitation
import pytest
from hbserve_kv_victims import start_process

from hbserve_testing.narrowing import present
from hbserve_testing.processes import strike

DEADLINE_S = 60.0
TIMEOUT_S = 2.0
PREFILL = {"do_remote_decode": True}
PROMPT = [(7 * i) % 50 for i in range(30)]
LOST = [49, *PROMPT]


class Server:
    def __init__(self, backend, port=0, num_blocks=32):
        self._control, theirs = multiprocessing.Pipe()
        self.process = start_process(imitation.serve, theirs, port, backend, num_blocks, TIMEOUT_S)
        theirs.close()
        self.address = self._control.recv()
        self.port = int(self.address.rpartition(":")[2])

    def tell(self, *command):
        self._control.send(command)

    def ask(self):
        self._control.send(("ask",))
        return self._control.recv()

    def holds(self, tokens):
        self._control.send(("holds", tokens))
        return self._control.recv()

    def until(self, condition):
        deadline_s = time.monotonic() + DEADLINE_S
        while not condition(*self.ask()[:2]):
            time.sleep(0.01)
            assert time.monotonic() < deadline_s

    def result(self, name):
        self.until(lambda results, _: name in results)
        return self.ask()[0][name]

    def signal(self, number):
        strike(present(self.process.pid), number)

    def end(self):
        self.process.kill()
        self.process.join()
        self._control.close()


@pytest.fixture
def start():
    started = []

    def make(*args, **kwargs):
        started.append(Server(*args, **kwargs))
        return started[-1]

    yield make
    for server in started:
        server.end()


def leg(prefill, name):
    return {"do_remote_prefill": True, "transfer_id": name, "remote_host": "127.0.0.1", "remote_port": prefill.port}


def both_legs(prefill, decode, name):
    prefill.tell("add", f"p-{name}", PROMPT, PREFILL | {"transfer_id": name})
    decode.tell("add", f"d-{name}", PROMPT, leg(prefill, name))


def serve(prefill, decode, name):
    """A request by one leg after the other, and one by both at once."""
    prefill.tell("add", name, PROMPT, PREFILL)
    decode.tell("add", name, PROMPT, prefill.result(name)[1])
    both_legs(prefill, decode, f"{name}-at-once")
    for each in (name, f"d-{name}-at-once"):
        assert decode.result(each)[0::2] == ("FINISHED_LENGTH_CAPPED", True)


def serve_while(condition, prefill, decode):
    """One request after the other, and each must be served; the first also if it is not so any more."""
    deadline_s = time.monotonic() + DEADLINE_S
    for number in itertools.count():
        serve(prefill, decode, f"beside-{number}")
        if not condition():
            return
        assert time.monotonic() < deadline_s


def works(prefill, decode, name):
    """As `serve`; nothing of the requests stays."""
    serve(prefill, decode, name)
    for server in (prefill, decode):
        server.until(lambda _, is_empty: is_empty)


CASES = pytest.mark.parametrize(
    ("backend", "is_killed"), [("ipc", True), ("ipc", False), ("nccl", True), ("nccl", False)]
)


@CASES
def test_a_prefill_server_that_ends_while_it_is_fetched_from_fails_that_request_and_is_used_again(
    start, backend, is_killed
):
    # Known elsewhere: vLLM #58063, #49238.
    prefill, decode, other = start(backend), start(backend), start(backend)
    works(prefill, decode, "before")
    prefill.tell("pause", True)
    prefill.tell("add", "p", LOST, PREFILL | {"transfer_id": "lost"})
    prefill.tell("step")  # a chunk of it
    decode.tell("add", "lost", LOST, leg(prefill, "lost"))
    decode.tell("add", "waits", PROMPT, leg(prefill, "never"))
    while not decode.holds(LOST):
        time.sleep(0.01)
    prefill.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    serve_while(lambda: not {"lost", "waits"} <= decode.ask()[0].keys(), other, decode)
    for name in ("lost", "waits"):
        assert decode.result(name)[0] == "FINISHED_ERROR"
    decode.tell("add", "alone", PROMPT)
    assert decode.result("alone")[0::2] == ("FINISHED_LENGTH_CAPPED", True)
    if not is_killed:
        if backend == "ipc":
            assert not decode.ask()[1], "a frozen process may still write to these blocks"
        prefill.signal(signal.SIGCONT)
    decode.until(lambda _, is_empty: is_empty)
    if is_killed:
        prefill = start(backend, port=prefill.port)
    else:
        prefill.tell("pause", False)
    works(prefill, decode, "after")


@CASES
def test_a_decode_server_that_ends_while_it_fetches_frees_the_prefill_server_and_is_used_again(
    start, backend, is_killed
):
    # Known elsewhere: vLLM #38027, #41383.
    prefill, decode, other = start(backend), start(backend, num_blocks=9), start(backend)
    works(prefill, decode, "before")
    decode.tell("add", "large", PROMPT, leg(prefill, "later"))  # has blocks, and waits
    prefill.tell("add", "p", PROMPT, PREFILL)
    decode.tell("add", "no room", PROMPT, prefill.result("p")[1])
    decode.ask()
    steps = decode.ask()[2]
    while decode.ask()[2] < steps + 3:
        time.sleep(0.01)
    assert not prefill.ask()[1]
    decode.signal(signal.SIGKILL if is_killed else signal.SIGSTOP)
    serve_while(lambda: "p" in prefill.ask()[3], prefill, other)
    prefill.until(lambda _, is_empty: is_empty)
    if is_killed:
        decode = start(backend)
    else:
        decode.signal(signal.SIGCONT)
        for name in ("large", "no room"):
            decode.tell("abort", name)
        decode.until(lambda _, is_empty: is_empty)
    works(prefill, decode, "after")

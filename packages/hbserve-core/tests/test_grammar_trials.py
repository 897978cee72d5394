"""Grammars that compile for minutes are ended where they are tried out, and everybody else is served meanwhile."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hbserve_core_byte_tokenizer import EOS, VOCAB_SIZE, allowed_by, byte_tokenizer, ids

from hbserve_core.grammars import compiler, trials
from hbserve_core.grammars.compiler import GrammarCompiler
from hbserve_core.grammars.matcher import Matcher
from hbserve_core.grammars.workers import Workers
from hbserve_rpc import InvalidRequest, Overloaded, SamplingParams, StructuredOutputsParams
from hbserve_testing.forkserver import TITLE
from hbserve_testing.narrowing import present
from hbserve_testing.processes import command_of, freeze
from hbserve_testing.waits import until

pytestmark = pytest.mark.warm
ARRAYS = range(9973, 10673)
FOR_MINUTES: dict[str, dict[str, Any]] = {
    "multiple of": {"json": {"type": "integer", "multipleOf": 99999989}},
    "names that are like others": {
        "json": {
            "type": "object",
            "patternProperties": {f"^[a-z]*{chr(97 + i % 26)}[a-z]*{i}$": {"type": "integer"} for i in range(1, 400)},
        }
    },
    "schemas in a grammar": {
        "grammar": "start: " + " ".join(f"j{i}" for i in ARRAYS) + "\n" + "\n".join(
            f'j{i}: %json {{"type": "array", "items": {{"type": "integer", "multipleOf": {i}}}}}' for i in ARRAYS
        )
    },
}  # fmt: skip
"""The second one takes seven seconds."""


def wanting(given: dict[str, Any]) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**given))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer())
    return tmp_path


@pytest.fixture
def grammars(folder, monkeypatch):
    """Gives a trial a tenth of a second."""
    monkeypatch.setattr(trials, "CPU_LIMIT_S", 0.1)
    return GrammarCompiler(str(folder), VOCAB_SIZE, [EOS])


def in_thread(grammars: GrammarCompiler, given: dict[str, Any]) -> "Future[Matcher | None]":
    future: Future[Matcher | None] = Future()

    def compiled() -> None:
        try:
            future.set_result(grammars.matcher(wanting(given)))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=compiled, daemon=True).start()
    return future


def kill_trials(grammars: GrammarCompiler) -> int:
    """The process and all trials; returns its id."""
    process = grammars._trials._process
    assert process is not None
    os.killpg(process.pid, signal.SIGKILL)
    return process.pid


def test_grammars_that_compile_for_minutes_are_refused_by_what_they_take(grammars):
    # Known elsewhere: vLLM #54003.
    for given in FOR_MINUTES.values():
        (kind,) = given
        with pytest.raises(InvalidRequest, match=f"^structured_outputs.{kind}: takes more than 0.1 s to compile$"):
            grammars.matcher(wanting(given))
    assert allowed_by(grammars.matcher(wanting({"regex": "ab"}))) == ids("a")


def test_one_that_was_too_slow_is_refused_at_once_when_it_comes_again(grammars, monkeypatch):
    given = FOR_MINUTES["multiple of"]
    for is_first in (True, False):
        with pytest.raises(InvalidRequest, match=r"^structured_outputs.json: takes more than 0.1 s"):
            grammars.matcher(wanting(given))
        if is_first:
            monkeypatch.setattr(grammars._trials, "problem_of", lambda _: pytest.fail("it has been tried out"))


def test_others_are_served_while_more_of_them_compile_than_there_are_threads_that_compile(folder, monkeypatch):
    monkeypatch.setattr(trials, "CPU_LIMIT_S", 3600.0)
    grammars = GrammarCompiler(str(folder), VOCAB_SIZE, [EOS])
    assert grammars.matcher(wanting({"regex": "known"})) is not None
    numbers = (99999989, 99999971, 99999959)
    slow = [in_thread(grammars, {"json": {"type": "integer", "multipleOf": number}}) for number in numbers]
    for text in ("known", "a", "b", "c"):
        assert allowed_by(grammars.matcher(wanting({"regex": text}))) == ids(text[0])
    assert not any(each.done() for each in slow)
    kill_trials(grammars)
    for each in slow:
        assert isinstance(each.exception(60), InvalidRequest)


def test_the_process_of_the_trials_is_started_for_the_first_one_and_again_when_it_was_killed(grammars):
    assert grammars._trials._process is None
    pids = set()
    for text in "abc":
        assert grammars.matcher(wanting({"regex": text})) is not None
        pids.add(kill_trials(grammars))
    assert len(pids) == 3


def test_a_process_of_the_trials_that_is_frozen_is_replaced(grammars, monkeypatch):
    assert grammars.matcher(wanting({"regex": "a"})) is not None
    frozen = present(grammars._trials._process)
    freeze(frozen.pid)
    took_up, patience_s = grammars._trials._hand_over, trials._PATIENCE_S

    def with_patience(trial: Any) -> Any:
        process = took_up(trial)
        monkeypatch.setattr(trials, "_PATIENCE_S", 0.1 if process is frozen else patience_s)
        return process

    monkeypatch.setattr(grammars._trials, "_hand_over", with_patience)
    assert allowed_by(grammars.matcher(wanting({"regex": "b"}))) == ids("b")
    assert frozen.poll() == -signal.SIGKILL


@pytest.mark.cold
def test_no_grammar_is_compiled_that_could_not_be_tried_out(grammars, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Overloaded, match="the process that tests grammars has ended"):
        grammars.matcher(wanting({"regex": "a"}))
    monkeypatch.undo()
    assert grammars.matcher(wanting({"regex": "a"})) is not None


@pytest.fixture
def gate(grammars, monkeypatch):
    """Lets trials begin, one at a time, when it is set."""
    gate, problem_of = threading.Event(), grammars._trials.problem_of
    monkeypatch.setattr(grammars._trying, "_count", 1)
    monkeypatch.setattr(grammars._trials, "problem_of", lambda wanted: gate.wait(60) and problem_of(wanted))
    yield gate
    gate.set()


async def test_who_gives_up_takes_nothing_from_others_that_wait_for_the_same_grammar(grammars, gate):
    first, one, other = (
        asyncio.create_task(grammars.matcher_in_loop(wanting({"regex": text}), ())) for text in ("a", "b", "b")
    )
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.gather(one, return_exceptions=True)
    gate.set()
    assert allowed_by(await other) == ids("b")
    assert allowed_by(await first) == ids("a")


async def test_nobody_waits_for_ever_for_the_grammars_of_others(grammars, gate, monkeypatch):
    monkeypatch.setattr(compiler, "COMPILE_TIMEOUT_S", 0.01)
    with pytest.raises(Overloaded, match="other grammars are being compiled"):
        await grammars.matcher_in_loop(wanting({"regex": "a"}), ())
    with pytest.raises(Overloaded, match="other grammars are being compiled"):
        grammars.matcher(wanting({"regex": "a"}))


def test_the_last_trials_are_remembered_and_those_that_run_or_wait_are_not_forgotten(grammars, gate, monkeypatch):
    monkeypatch.setattr(compiler, "_MOST_TRIALS", 2)
    tried = {text: grammars._trial(present(wanting({"regex": text}).structured_outputs)) for text in "ab"}
    with pytest.raises(Overloaded):
        grammars.matcher(wanting({"regex": "c"}))
    gate.set()
    for text in "abac":
        assert grammars.matcher(wanting({"regex": text})) is not None
    assert [each.regex for each in grammars._tried] == ["a", "c"]
    assert grammars._trial(present(wanting({"regex": "a"}).structured_outputs)) is tried["a"]


class Panic(BaseException):
    """As the grammars' library raises it when it finds a fault of its own."""


async def test_a_thread_outlives_jobs_that_panic_or_are_cancelled_but_not_its_pool():
    def panic() -> None:
        raise Panic

    gate, pool = threading.Event(), Workers(1, "of this test")
    pool.submit(lambda: gate.wait(60))
    panicking, cancelled, last = pool.submit(panic), pool.submit(panic), pool.submit(lambda: 5)
    assert cancelled.cancel()
    gate.set()
    with pytest.raises(Panic):
        panicking.result(60)
    assert last.result(60) == 5
    assert threading.stack_size() == 0, "other threads have the system's"
    del pool
    await until(lambda: not any(each.name.startswith("of this test") for each in threading.enumerate()))


PROGRAM = """
import sys
import threading
from hbserve_core.grammars import compiler, trials
from hbserve_core.grammars.compiler import GrammarCompiler
from hbserve_rpc import SamplingParams

trials.CPU_LIMIT_S = 3600.0
grammars = GrammarCompiler(sys.argv[1], 320, [2])
grammars.matcher(SamplingParams(structured_outputs={"regex": "a"}))
slow = SamplingParams(structured_outputs={"json": {"type": "integer", "multipleOf": 99999989}})
threading.Thread(target=lambda: grammars.matcher(slow)).start()
grammars.matcher(SamplingParams(structured_outputs={"regex": "b"}))
print("begun", flush=True)
"""


def test_trials_end_with_the_process_that_they_are_for_even_if_it_is_killed(folder):
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert present(process.stdout).readline() == b"begun\n"
        process.kill()
        # Its end: nobody has the other one any more.
        assert process.communicate(timeout=60)[1] == b""


async def test_nothing_is_left_of_trials_that_nobody_refers_to(folder):
    tried = trials.Trials(folder / "tokenizer.json", VOCAB_SIZE, [EOS])
    assert tried.problem_of(StructuredOutputsParams(regex="a")) == ""
    process = present(tried._process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # The trial itself, even as a zombie, whose command is empty; the first may be a forkserver.
    await until(lambda: all(command_of(int(each)) == [TITLE] for each in children.read_text().split()))
    del tried
    assert process.returncode is not None

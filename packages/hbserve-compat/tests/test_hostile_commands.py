"""Whatever a command is given, it gives an answer, or one error line of ours and an exit status, and never a traceback.

The commands run in this process, where a hundred of them take only seconds. They run up to the point where they would
start processes, or use a deployment that runs already.
"""

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

import hbserve.commands.serve
import hbserve.load.bench_engine
import hbserve.models.demo_model
import hbserve_core
from hbserve.__main__ import app
from hbserve.commands.command import LogLevel, explaining
from hbserve.output_file import require_writable, write_results, writing
from hbserve.pd_disagg import DisaggregatedLLM
from hbserve.plotting import figure_of
from hbserve_core import BrokenTokenizer
from hbserve_core.bench.batch_sweep import SweepRow
from hbserve_core.bench.model_work import NO_WORK
from hbserve_scheduler import InstanceFailed, SchedulerServer
from hbserve_testing.narrowing import present
from hbserve_testing.processes import no_file_longer_than

PLANNED = ["--input-len=9", "--output-len=9", "--rate=1", "--ttft-ms=100", "--tpot-ms=50"]
WOULD_START = "error: would start\n"
seconds = settings(
    derandomize=True, max_examples=70, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

TEXT = (
    st.text(st.characters(exclude_categories=()), max_size=20) | st.binary(max_size=8).map(os.fsdecode)
    | st.sampled_from(["", "-", "--", "\x00", "\x1b[31m", "a\nb", "x" * 600, "caf\udce9", "--model", "$HOME", "~", "٣"])
)  # fmt: skip
NUMBER = (
    st.integers().map(str) | st.floats().map(repr) | st.floats(0, 2).map(str) | TEXT
    | st.sampled_from(["nan", "inf", "-inf", "1e400", "-0", "0x10", "5_0", "٣", "²", "9" * 30, "9" * 5000, "1.5", " 5"])
)  # fmt: skip
OPTION = st.sampled_from(["--max-tokens", "--temperature", "--kv-transfer-backend", "--log-level", "--no-such-option"])


def invoke(arguments: list[str], caplog: pytest.LogCaptureFixture) -> Result:
    """Run a command, and check how it ended."""
    caplog.clear()
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert not [record for record in caplog.records if "please report" in record.getMessage()], caplog.text
    assert "Traceback" not in result.output
    if "Error: " in result.stderr:  # typer's own, about an option that there is not, or its kind
        assert result.exit_code == 2
    elif result.exit_code != 0:
        *before, last = result.stderr.split("\n")[:-1]
        assert result.exit_code in (1, 2)
        assert last.startswith("error: ")
        assert last.isprintable()
        assert not any(line.startswith("error") for line in before)
    return result


# ---- prompts -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(small_model, free_ports, tmp_path_factory) -> Iterator[str]:
    """Address of a scheduler that serves the small model."""
    folder, (port, *ports) = tmp_path_factory.mktemp("deployment"), free_ports(3)
    roles = zip(("prefill", "decode"), ports, (0, 1), strict=True)
    content = {
        "model": {"path": str(small_model("qwen3"))},
        "engine": {"num_blocks": 64},
        "scheduler": {"port": port},
        "server": {"enabled": False},
        "gpu_instances": [
            {"instance_id": role, "instance_type": role, "port": own, "kv_rank": rank} for role, own, rank in roles
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "hbserve", "serve", "--config", str(folder / "config.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as served:
        yield f"127.0.0.1:{port}"
        served.terminate()


@pytest.mark.warm
def test_whatever_prompts_and_options_are_given_are_answered_or_refused_in_one_line(address, caplog):
    num_answered, num_refused = 0, 0
    few_tokens = st.sampled_from([["--max-tokens", "3"]]) | st.lists(st.tuples(OPTION, NUMBER), max_size=2).map(flat)

    @seconds
    @given(st.lists(TEXT, max_size=3), few_tokens)
    def generate(prompts: list[str], options: list[str]) -> None:
        nonlocal num_answered, num_refused
        result = invoke(["generate", "--connect", address, *options, *prompts], caplog)
        num_answered += result.exit_code == 0
        num_refused += result.exit_code != 0
        if result.exit_code == 0 and "--help" not in prompts:
            assert "TTFT" in result.stderr
            assert result.stdout

    generate()
    assert min(num_answered, num_refused) > 2


def flat(pairs: list[tuple[str, str]]) -> list[str]:
    return [word for pair in pairs for word in pair]


# ---- what is there before anything starts ------------------------------------------------------------------------


@pytest.fixture
def nothing_starts(monkeypatch, small_model) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise InstanceFailed("would start")

    monkeypatch.setattr(DisaggregatedLLM, "start", refuse)
    monkeypatch.setattr(SchedulerServer, "start", refuse)
    monkeypatch.setattr(hbserve.commands.serve, "_front_end", lambda *_: None)
    monkeypatch.setattr(SchedulerServer, "serve_until", refuse)
    monkeypatch.setattr(hbserve_core, "run_instance", refuse)
    monkeypatch.setattr(hbserve.models.demo_model, "demo_model_path", lambda *_: small_model("qwen3"))


PAIR = [
    {"instance_id": "prefill-0", "instance_type": "prefill", "port": 18001},
    {"instance_id": "decode-0", "instance_type": "decode", "port": 18002, "kv_rank": 1},
]
SECTIONS = ["model", "kv_transfer", "chunked_prefill", "cuda_graph", "engine", "scheduler", "server", "gpu_instances"]
KEYS = [
    "path", "dtype", "backend", "buffer_size", "ip", "port", "timeout_s", "options", "chunk_size", "host", "num_blocks",
    "gpu_memory_utilization", "device", "num_threads", "tensor_parallel_size", "heartbeat_interval_s", "instance_id",
    "instance_type", "max_seq_len", "request_timeout_s", "prefill_policy",
]  # fmt: skip
LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.dates() | st.binary(max_size=3) | st.sampled_from([10**30, -(10**400), "9" * 400 + "GiB", "٣GiB", "\x00", ""])
)  # fmt: skip
VALUE = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2))
SECTION = st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=3) | VALUE
CONTENT = st.dictionaries(st.sampled_from(SECTIONS), SECTION, max_size=2) | VALUE
AS_IT_IS = [
    "", "a: 1: 2", "[" * 3000, "model: {path: 2020-99-99}", f"engine: {{num_blocks: {'9' * 5000}}}", "a: &a [*a]",
    "? [1]\n: 2", "!!python/object/apply:os.getcwd []", "<<: 5", "a: 1\n---\nb: 2", "model: {path: !!binary abc}",
    "\ufeffmodel: {}", "model: {path: x, path: y}", "kv_transfer: {buffer_size: 1e999}", "{", "%YAML 9.9\n---\n",
]  # fmt: skip


def written(content: Any) -> bytes:
    whole = {"gpu_instances": PAIR} | content if isinstance(content, dict) else content
    return yaml.dump(whole).encode(errors="surrogatepass")


FILE = st.binary(max_size=40) | st.sampled_from(AS_IT_IS).map(str.encode) | CONTENT.map(written)
COMMANDS = st.sampled_from([["generate", "Hello"], ["serve"], ["scheduler"], ["instance", "--instance-id", "decode-0"]])


@pytest.mark.usefixtures("nothing_starts")
def test_whatever_is_in_a_configuration_file_is_begun_or_refused_in_one_line(tmp_path, caplog):
    path, num_begun, num_refused = tmp_path / "config.yaml", 0, 0

    @seconds
    @given(COMMANDS, FILE)
    def run(command: list[str], content: bytes) -> None:
        nonlocal num_begun, num_refused
        path.write_bytes(content)
        result = invoke([*command, "--config", str(path)], caplog)
        assert result.exit_code != 0
        assert len(result.stderr) < 1500
        num_begun += result.stderr == WOULD_START
        num_refused += result.stderr != WOULD_START

    run()
    for content in AS_IT_IS:  # each of them, whatever was drawn
        path.write_text(content)
        invoke(["scheduler", "--config", str(path)], caplog)
    assert min(num_begun, num_refused) > 2


@pytest.mark.usefixtures("nothing_starts")
def test_whatever_path_is_given_is_begun_or_refused_in_one_line(tmp_path, small_model, caplog):
    (tmp_path / "file").write_bytes(bytes(range(256)))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "a folder").mkdir()
    places = ["file", "loop", "a folder", "nowhere", "n\nowhere", "x" * 5000, "caf\udce9"]
    paths = TEXT | st.sampled_from(
        [*(str(tmp_path / place) for place in places), "/proc/self/mem", "/dev/null", "~nobody-here/x"]
    )
    found = []

    @seconds
    @given(COMMANDS, st.sampled_from(["--config", "--model"]), paths)
    def run(command: list[str], option: str, path: str) -> None:
        found.append(invoke([*command, f"{option}={path}"], caplog).stderr)

    run()
    assert invoke(["generate", "a", "--model", str(small_model("qwen3"))], caplog).stderr == WOULD_START
    assert len(set(found)) > 20


BENCH_OPTION = st.sampled_from(
    ["--scale", "--batch-sizes", "--contexts", "--device", "--dtype", "--tensor-parallel-size", "--workload", "--json"]
)


def test_whatever_bench_is_given_is_begun_or_refused_in_one_line(small_model, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)  # where --json writes its file
    begun = []
    monkeypatch.setattr(hbserve.load.bench_engine, "run_bench", lambda *_: begun.append("bench"))
    monkeypatch.setattr(hbserve.load.bench_engine, "run_sweep", lambda *_: begun.append("sweep"))
    values = NUMBER | st.sampled_from(["cpu:5", "cuda:0", "cuda:9999999999999", "meta", "int8", "float16", "single"])
    command = ["bench", "engine", "--model", str(small_model("qwen3"))]

    @seconds
    @given(st.sampled_from([[], ["--sweep"]]), st.lists(st.tuples(BENCH_OPTION, values), min_size=1, max_size=2))
    def run(sweep: list[str], options: list[tuple[str, str]]) -> None:
        invoke([*command, *sweep, *(f"{option}={value}" for option, value in options)], caplog)

    run()
    for options in (["--scale=inf"], ["--device=cpu:5"], ["--tensor-parallel-size=0"], ["--dtype=int8"]):
        assert invoke([*command, *options], caplog).exit_code == 2
    assert invoke([*command, "--sweep", f"--contexts={'9' * 5000}"], caplog).exit_code == 2
    assert {"bench", "sweep"} <= set(begun)


def test_a_folder_without_a_tokenizer_is_refused_before_anything_starts(small_model, tmp_path, nothing_starts, caplog):
    (tmp_path / "config.json").write_bytes((small_model("qwen3") / "config.json").read_bytes())
    result = invoke(["generate", "Hello", "--model", str(tmp_path)], caplog)
    assert result.exit_code == 2
    assert f"{tmp_path}: has no tokenizer, which text needs: none of tokenizer.json" in result.stderr


# ---- what only a process of its own shows ------------------------------------------------------------------------


def command(*arguments: str | bytes, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, timeout=90, **settings)


@pytest.mark.parametrize("module", ["hbserve", "hbserve_scheduler"])
def test_a_process_refuses_a_broken_file_in_one_line(tmp_path, module):
    path = os.fsencode(tmp_path) + b"/caf\xe9.yaml"
    Path(os.fsdecode(path)).write_text("model: {path: 2020-99-99}")
    words = ("scheduler",) if module == "hbserve" else ()
    done = command(module, *words, "--config", path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"month must be in 1..12" in line


def test_a_model_folder_whose_name_is_no_text_is_refused_in_one_line(small_model: Callable[[str], Path], tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.symlink(small_model("qwen3"), folder)
    done = command("hbserve", "generate", "Hello", "--model", folder)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, b"")
    assert line.startswith(b"error: model_path: character")


@pytest.mark.warm
@pytest.mark.parametrize("prompts", [["Hello"], ["one", "two"]], ids=["streamed", "together"])
def test_an_output_that_is_full_is_one_line(address, prompts):
    with Path("/dev/full").open("wb") as full:
        arguments = [sys.executable, "-m", "hbserve", "generate", *prompts, "--connect", address]
        done = subprocess.run([*arguments, "--max-tokens=3"], stdout=full, stderr=subprocess.PIPE, timeout=90)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == b"error: stdout: No space left on device"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "Too many open files"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "of/model"), "of/model: Too many open files"),
        (BrokenTokenizer("m: OSError: [Errno 24] Too many open files"), "m: OSError: [Errno 24] Too many open files"),
    ],
)
def test_too_few_files_are_told_with_their_cure(capsys, error, told):
    with pytest.raises(typer.Exit), explaining(LogLevel.WARNING):
        raise error
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert capsys.readouterr().err == f"error: {told}: this process may open {most}; raise `ulimit -n`\n"


@pytest.mark.parametrize(
    "command",
    [
        "simulate --num-requests=20 --json=PATH",
        "keys PATH",
    ],
)
def test_a_file_that_does_not_fit_on_its_disk_is_named_and_nothing_is_left_of_it(command, tmp_path, caplog):
    with no_file_longer_than(50):
        done = invoke([each.replace("PATH", str(tmp_path / "file")) for each in command.split()], caplog)
    said = done.stderr
    assert said.splitlines()[-1].startswith(f"error: {tmp_path}/file")
    assert said.endswith(": this process may write files of 50 bytes; raise `ulimit -f`\n")
    if "simulate" in command:
        assert ": File too large; the results are on stdout instead: " in said
        assert json.loads(done.stdout.splitlines()[-1])["completed"] == 20
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_a_picture_that_does_not_fit_on_its_disk_is_named_and_nothing_is_left_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    with figure_of(whole, 1, 1, "first: it writes what matplotlib keeps of fonts, too"):
        pass
    named = pytest.raises(OSError, match=f"File too large: '{cut}'")
    with no_file_longer_than(50), named, figure_of(cut, 1, 1, "then"):
        pass
    assert list(tmp_path.iterdir()) == [whole]


@pytest.mark.parametrize(
    "command",
    ["profile --output=PATH", "simulate --json=PATH", "plan --plot=PATH", "bench engine --json=PATH --sweep"],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(command, tmp_path, caplog, monkeypatch):
    for worker in ("make_runner", "simulate", "make_plan"):
        for module in ("measuring", "commands"):
            monkeypatch.setattr(f"hbserve.simulator.{module}.{worker}", None, raising=False)
    monkeypatch.setattr("hbserve.load.bench_engine.run_sweep", None)
    question = ""
    if "plan" in command:
        pytest.importorskip("matplotlib")
        question = "--input-len=9 --output-len=9 --rate=1 --ttft-ms=1 --tpot-ms=1"
    path = tmp_path / "file.png"
    with no_file_longer_than(1):
        said = invoke([*command.replace("PATH", str(path)).split(), *question.split()], caplog).stderr
    assert said.splitlines()[-1].startswith(f"error: --{command.split('--')[1].split('=')[0]}={path}: File too large")
    assert not list(tmp_path.iterdir())


def test_rows_of_a_sweep_that_their_disk_does_not_take_are_told_with_their_file(small_model, monkeypatch, caplog):
    row = SweepRow(16, 1, 0.1, 0.1, NO_WORK)
    monkeypatch.setattr("hbserve.load.bench_engine.run_sweep", lambda _, __, ___, keep: keep(row))
    command = ["bench", "engine", "--sweep", "--json=/dev/full", "--model", str(small_model("qwen3"))]
    assert invoke(command, caplog).stderr == "error: /dev/full: No space left on device\n"


def test_a_file_that_is_there_is_kept_as_it_is_until_something_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    require_writable("--json", path)
    assert path.read_text() == "before"
    require_writable("--json", Path("/dev/null"))
    os.mkfifo(pipe := tmp_path / "pipe")
    require_writable("--json", pipe)  # does not wait for its reader


def test_a_full_disk_is_told_before_the_work_although_the_file_is_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    link = tmp_path / "link"
    link.symlink_to(path)
    for each in (path, link):
        with no_file_longer_than(6), pytest.raises(OSError, match=f"File too large: '--json={each}'"):
            require_writable("--json", each)
    assert path.read_text() == "before"


def test_a_file_in_a_folder_that_takes_no_new_files_may_be_written(tmp_path, monkeypatch):
    def refused(**_: object) -> None:  # as whoever is not root is
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    path = tmp_path / "file"
    with pytest.raises(PermissionError, match=f"Permission denied: '--json={path}'"):
        require_writable("--json", path)
    path.write_text("before")
    require_writable("--json", path)


def test_results_that_no_file_takes_are_printed_and_those_before_them_stay(tmp_path, capsys):
    path = tmp_path / "file"
    told = r"File too large; the results are on stdout instead: '.*file'"
    with no_file_longer_than(10), pytest.raises(OSError, match=told):
        write_results(path, "a long line\n", append=True)
    assert not path.exists()
    write_results(path, "before\n", append=True)
    with no_file_longer_than(10), pytest.raises(OSError, match=told):
        write_results(path, "a long line\n", append=True)
    assert path.read_text() == "before\n"
    assert capsys.readouterr().out == "a long line\n" * 2
    with pytest.raises(OSError, match="the results are on stdout instead"):
        write_results(tmp_path / "none" / "file", "of a folder that is gone\n")
    assert capsys.readouterr().out == "of a folder that is gone\n"


def test_what_is_written_in_parts_keeps_those_that_fit_and_what_was_not_opened_is_left_alone(tmp_path):
    path = tmp_path / "file"
    named = pytest.raises(OSError, match=f"File too large: '{path}'")
    with no_file_longer_than(5), named, writing(path, in_parts=True), path.open("w", buffering=1) as file:
        file.writelines(["one\n", "more\n"])
    assert path.read_text().startswith("one\n")
    with pytest.raises(FileNotFoundError), writing(path):
        (tmp_path / "none" / "file").write_text("")
    assert path.exists()


@pytest.mark.warm
def test_whoever_reads_an_answer_may_leave_and_nothing_is_said(address):
    arguments = [sys.executable, "-m", "hbserve", "generate", "Hello", "--connect", address, "--max-tokens=400"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.read(1)
        client.stdout.close()
        assert present(client.stderr).read() == b""
    assert client.returncode == 141


@pytest.mark.parametrize("words", [["simulate", "--num-requests=20", "--json=r"], ["plan", "--plot=r.svg", *PLANNED]])
def test_results_are_written_although_nobody_reads_the_report(words, tmp_path):
    if "plan" in words:
        pytest.importorskip("matplotlib")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [sys.executable, "-m", "hbserve", *words]
    done = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, timeout=90, cwd=tmp_path)
    os.close(writer)
    assert done.returncode == 141, done.stderr
    (file,) = tmp_path.iterdir()
    assert file.read_text()

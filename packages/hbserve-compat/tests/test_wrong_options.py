"""What is wrong with an option is told with its name and status 2, before any work, and leaves nothing behind."""

from collections.abc import Iterator
from typing import Any

import pytest
from test_help import commands
from test_hostile_commands import invoke
from typer.main import get_command

from hbserve.__main__ import app
from hbserve.load.args import CompareArgs
from hbserve.load.bench_serve import SAMPLING
from hbserve.load.compare import MOST_ON_A_DEVICE, compare
from hbserve_rpc import InvalidRequest

GOALS = "--input-len=9 --output-len=9 --rate=1 --ttft-ms=100 --tpot-ms=10"
LATER = {"hbserve generate", "hbserve serve", "hbserve chat"}
"""Commands whose numbers are those of a request or of a configuration, and are checked with these."""


def refusal(command: Any, *words: str) -> str:
    """What a command's parser says of these words; it does not run the command."""
    try:
        command.make_context("hbserve", list(words))
    except Exception as error:  # of click, or of the copy of it that typer has
        told = getattr(error, "format_message", None)
        return str(told() if told else error)
    return "taken"


def options() -> Iterator[Any]:
    """Each option that takes a number, with its command."""
    for name, command in commands(get_command(app)):
        for each in [] if name in LATER else command.params:
            option = max(each.opts, key=len)
            if option.startswith("--") and not getattr(each, "is_flag", False) and each.name not in SAMPLING:
                said = refusal(command, f"{option}=x")
                if "integer" in said or "float" in said:
                    yield pytest.param(command, each.name, option, id=f"{name} {option}")


@pytest.mark.parametrize(("command", "name", "option"), [*options()])
def test_a_number_that_cannot_be_is_refused_by_the_parser(command, name, option):
    for value in ["", "nan", "-inf"] + ["-2"] * (name != "seed"):
        assert option in refusal(command, f"{option}={value}"), value


@pytest.mark.parametrize(
    "words",
    [
        "simulate --trace",
        "simulate --config",
        "simulate --profile",
        "simulate --prefill-profile",
        "check --config",
        "bench compare --rates=1 --goodput=ttft:1 --config",
        "bench serve --dataset-name=custom --dataset-path",
        f"plan {GOALS} --profile",
    ],
)
@pytest.mark.parametrize("path", ["nowhere", ".", "f/x", "n" * 300, "/dev/zero"])
def test_a_file_that_cannot_be_read_is_status_2_for_every_command(words, path, tmp_path, monkeypatch, caplog):
    (tmp_path / "f").touch()
    monkeypatch.chdir(tmp_path)
    result = invoke([*words.split(), path], caplog)
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, line[:9]) == (2, "error: --"), line
    assert f"{words.split()[-1]}='{path[:40]}" in line


@pytest.mark.parametrize(
    "words",
    [
        "profile -o p.json --prompt-lens",
        "profile -o p.json --batch-sizes",
        "profile -o p.json --contexts",
        "profile -o p.json --megabytes",
        "bench engine --sweep --json=r --batch-sizes",
        "bench engine --sweep --contexts",
        "bench compare --goodput=ttft:1 --rates",
        "bench compare --goodput=ttft:1 --rates=1 --layouts",
        "bench serve --metric-percentiles",
        "bench serve --percentile-metrics",
    ],
)
def test_a_list_that_is_empty_or_has_something_twice_is_refused(words, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    *_, option = words.split()
    one = {"--layouts": "2H", "--percentile-metrics": "itl"}.get(option, "1")
    for text in ("", ",", f"{one},", f"{one},{one}", "nan", "-1", "x", f"{one},{'9' * 30}"):
        result = invoke([*words.split(), text], caplog)
        (line,) = result.stderr.splitlines()
        assert (result.exit_code, line.startswith(f"error: {option}=")) == (2, True), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("profile -o no/p.json", "--output"),
        ("simulate --json no/r.json", "--json"),
        ("bench engine --sweep --json no/r.json", "--json"),
        ("bench compare --goodput=ttft:1 --rates=1 --json no/r.json", "--json"),
        ("bench serve --save-result --result-filename no/r.json", "--result-filename"),
        ("bench serve --base-url=http://127.0.0.1:1 --save-result --result-dir no", ""),
        ("profile -o p.json --kv-transfer-backend=no", "--kv-transfer-backend"),
        ("bench serve --goodput=ttft:1 --goodput=ttft:2", "--goodput"),
        ("bench compare --rates=1 --goodput=ttft:1 --goodput=ttft:1", "--goodput"),
        ("simulate --goodput=ttft:1 --goodput=ttft:1", "--goodput"),
        ("simulate --goodput=ttft:inf", "--goodput"),
        ("simulate --fault=decode-0@1 --fault=decode-0@1.0", "--fault"),
        ("bench serve --header=a=1 --header=a=2", "--header"),
        ("bench serve --metadata==1", "--metadata"),
        ("bench serve --base-url=", "--base-url"),
        ("bench serve --host=", "--host"),
        ("bench serve --endpoint=", "--endpoint"),
        ("bench serve --extra-body=", "--extra-body"),
        ("bench serve --model=", "--model"),
        ("bench serve --tokenizer=no", "--tokenizer"),
        ("bench compare --goodput=ttft:1 --rates=1 --layouts=9999H", "--layouts"),
    ],
)
def test_what_is_wrong_leaves_nothing_behind(words, option, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    result = invoke(words.split(), caplog)
    (line,) = result.stderr.splitlines()
    if option:
        assert (result.exit_code, line.startswith(f"error: {option}")) == (2, True), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [f"plan {GOALS}", "bench serve", "bench compare --goodput=ttft:1 --rates=1"])
def test_a_picture_is_png_or_svg_as_the_help_says(command, tmp_path, caplog):
    pytest.importorskip("matplotlib")
    result = invoke([*command.split(), f"--plot={tmp_path}/x.pdf"], caplog)
    assert (result.exit_code, result.stderr[:14]) == (2, "error: --plot=")
    assert result.stderr.endswith("x.pdf: expected a name that ends with .png or .svg\n")


async def test_layouts_for_which_there_is_no_room_are_refused_and_those_of_every_host_are_not(monkeypatch):
    monkeypatch.setattr("hbserve.load.compare.serving", None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    with pytest.raises(InvalidRequest, match=r"5 instances at a time, and 1 cores here; expected at most 4"):
        await compare(CompareArgs(["ttft:1"], "1", layouts=f"{MOST_ON_A_DEVICE + 1}H"))
    with pytest.raises(TypeError):  # it would serve
        await compare(CompareArgs(["ttft:1"], "1"))


def test_a_trace_has_no_request_without_a_prompt(tmp_path, caplog):
    (tmp_path / "t").write_text('{"timestamp": 0, "input_length": 0, "output_length": 5}\n')
    result = invoke(["simulate", f"--trace={tmp_path / 't'}"], caplog)
    assert (result.exit_code, "t:1: not a line of a timed trace: " in result.stderr) == (2, True)


def test_a_path_may_begin_with_the_users_home(tmp_path, monkeypatch, caplog):
    (tmp_path / "t").write_text('{"timestamp": 0, "input_length": 9, "output_length": 5}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert invoke(["simulate", "--trace=~/t"], caplog).exit_code == 0

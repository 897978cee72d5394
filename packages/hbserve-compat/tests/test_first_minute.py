"""Commands that people type first: they work, or one line says what to do before anything is started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import hbserve.commands.chat
import hbserve.commands.generate
import hbserve.commands.members
import hbserve.commands.serve
import hbserve.monitoring.trace
from hbserve.__main__ import app
from hbserve.models.servable import require_servable
from hbserve.processes import child_process
from hbserve.processes.launcher import instance_environment
from hbserve_core import InvalidInstanceConfig, ModelFilesMissing, UnsupportedModel, WeightsMismatch
from hbserve_rpc.settings import EngineSettings


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of commands, which are noted in place of running them, so that no process is started."""
    found: list[Any] = []

    async def note(args: Any) -> None:
        found.append(args)

    for module, name in (
        (hbserve.commands.serve, "serve_all"),
        (hbserve.commands.generate, "generate_answers"),
        (hbserve.commands.chat, "chat"),
    ):
        monkeypatch.setattr(module, name, note)
    return found


def invoke(*arguments: str, **settings: Any) -> Result:
    return CliRunner().invoke(app, list(arguments), **settings)


def test_the_version_is_said():
    assert invoke("--version").stdout == f"hbserve {version('hbserve-compat')}\n"


@pytest.mark.parametrize("command", [[], ["serve"], ["bench"], ["bench", "serve"], ["scale"]], ids=" ".join)
def test_help_has_a_short_name_too(command):
    asked = invoke(*command, "-h")
    assert (asked.exit_code, asked.stdout) == (0, invoke(*command, "--help").stdout)
    assert asked.stdout.startswith("Usage: ")


@pytest.mark.parametrize(("path", "why"), [("nothing", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read_is_named_first_without_the_number_of_the_system(tmp_path, path, why):
    asked = invoke("simulate", "--trace", str(tmp_path / path))
    assert (asked.exit_code, asked.stderr) == (2, f"error: --trace='{tmp_path / path}': {why}\n")


def test_what_cannot_be_asked_is_refused_before_a_scheduler_is_waited_for(tmp_path, monkeypatch):
    for module in (hbserve.commands.members, hbserve.monitoring.trace):
        monkeypatch.setattr(module, "remote_scheduler", None)
    cases: dict[str, list[str]] = {
        "'nonsense': expected HOST:PORT": ["join", "nonsense"],
        "'--within'": ["drain", "d", "--within", "-1"],
        "'--last'": ["trace", "--last", "-3"],
        "there is no folder": ["trace", "--output", str(tmp_path / "no" / "trace.json.gz")],
    }
    for message, command in cases.items():
        refused = invoke(*command)
        assert message in refused.stderr
        assert refused.exit_code in (1, 2)


def test_a_model_may_be_named_without_an_option_but_not_twice(begun):
    for command in ("serve", "chat"):
        assert invoke(command, "some/folder").exit_code == 0
        assert begun.pop().model == Path("some/folder")
        both = invoke(command, "one", "--model", "two")
        assert (both.exit_code, begun) == (2, [])
        assert "one and --model two: expected one of the two" in both.stderr


def test_prompts_may_be_arguments_options_and_what_stdin_has(begun):
    assert invoke("generate", "one", "-", "-p", "three", "--prompt", "four", input="two\nlines\n").exit_code == 0
    assert begun.pop().prompts == ["one", "two\nlines", "three", "four"]
    for arguments, message in (([], "expected at least one, or - to read it"), (["-"], "stdin is empty")):
        refused = invoke("generate", *arguments, input="")
        assert (refused.exit_code, begun) == (2, [])
        assert message in refused.stderr


def test_how_to_sample_may_be_said_and_what_is_not_said_is_left_to_the_server(begun):
    options = [
        "--top-p",
        "0.5",
        "--seed",
        "7",
        "--stop",
        "a",
        "--stop",
        "b",
        "--system",
        "Be brief.",
        "--max-tokens",
        "3",
    ]
    for command in (["generate", "hi"], ["chat"]):
        assert invoke(*command, *options).exit_code == 0
        given = begun.pop()
        wanted = {"max_tokens": 3, "temperature": 0.0, "top_p": 0.5, "seed": 7, "stop": ["a", "b"]}
        assert (given.system, given.sampling) == ("Be brief.", wanted)
        assert invoke(*command).exit_code == 0
        assert begun.pop().sampling.keys() == {"max_tokens", "temperature"}


def test_what_is_not_said_of_the_server_is_as_the_file_has_it(begun, config):
    path = config(server={"served_model_names": ["a", "b"], "cors_origins": ["*"], "port": 0})
    assert invoke("serve", "--config", str(path), "--port", "7").exit_code == 0
    server = begun.pop().deployment().server
    assert (server.served_model_names, server.cors_origins, server.port) == (["a", "b"], ["*"], 7)


@pytest.fixture
def folder_with(tmp_path: Path) -> Callable[..., Path]:
    """Function that makes a folder of files, each with its content as JSON."""

    def make(**files: Any) -> Path:
        for name, content in files.items():
            (tmp_path / name.replace("__", ".")).write_text(json.dumps(content))
        return tmp_path

    return make


COMMANDS = [["serve", "--port", "0"], ["chat"], ["generate", "hi", "--model"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_what_is_no_model_folder_is_refused_with_what_to_do(command, folder_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    folder = folder_with(adapter_config__json={"base_model_name_or_path": "Qwen/Qwen3-0.6B"}, x__gguf={})
    cases = {
        "Qwen/Qwen3-0.6B": "of Hugging Face's hub: download it first (hf download Qwen/Qwen3-0.6B), or give",
        "no/such/folder": "does not exist: give the path of a Hugging Face folder",
        str(folder / "x.gguf"): "x.gguf' is not a GGUF file: it does not begin with GGUF",
        str(folder): "is a LoRA adapter of 'Qwen/Qwen3-0.6B', and adapters are not served: merge it",
    }
    for given, message in cases.items():
        refused = invoke(*command, given)
        (line,) = refused.stderr.splitlines()[-1:]
        assert refused.stderr.count("error") == 1
        status = 1 if given.endswith(".gguf") else 2  # a conversion has failed, or there is nothing to convert
        assert (refused.exit_code, message in line) == (status, True), line
    (folder / "adapter_config.json").unlink()
    (folder / "y.gguf").touch()
    assert "has 2 GGUF files and no config.json: give the path of one of them" in invoke(*command, str(folder)).stderr


def test_a_model_that_no_instance_could_serve_is_refused_once_and_without_torch(folder_with):
    folder = folder_with(config__json={"architectures": ["MambaForCausalLM"]}, tokenizer__json={})
    code = (
        "import sys; from hbserve.__main__ import main\n"
        f"sys.argv = ['hbserve', 'serve', {str(folder)!r}, '--port', '0']\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
    _, error = done.stderr.splitlines()
    assert error.startswith(f"error: {folder}: architecture MambaForCausalLM is not supported; supported: ")


async def test_a_pair_whose_model_cannot_be_is_not_started(folder_with, monkeypatch):
    monkeypatch.setattr(child_process.ChildProcess, "start", None)  # it would be called in vain
    from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig

    folder = folder_with(config__json={"architectures": ["MambaForCausalLM"]})
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM is not supported"):
        await DisaggregatedLLM(PdDisaggConfig(model_path=folder)).start()


def test_weights_and_heads_are_looked_at_too(small_model, tmp_path):
    folder = small_model("qwen3")
    require_servable(folder, EngineSettings(), {1, 2})
    with pytest.raises(InvalidInstanceConfig, match="tensor_parallel_size=3"):
        require_servable(folder, EngineSettings(), {1, 3})
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelFilesMissing, match=r"neither model\.safetensors nor"):
        require_servable(tmp_path, EngineSettings(), {1})
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20_000])
    with pytest.raises(WeightsMismatch, match=r"model\.safetensors is not a whole safetensors file"):
        require_servable(tmp_path, EngineSettings(), {1})
    require_servable(tmp_path, EngineSettings(load_format="dummy"), {1})


def test_whether_experts_stay_whole_decides_how_many_ranks_there_may_be(small_model):
    folder = small_model("qwen3-moe")  # 4 experts, of 24 numbers
    require_servable(folder, EngineSettings(expert_parallel=True), {1, 2})
    with pytest.raises(InvalidInstanceConfig, match="expert_parallel=true"):
        require_servable(folder, EngineSettings(expert_parallel=True), {8})


def test_instances_wait_without_spinning_unless_somebody_wants_them_to(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert instance_environment(2)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert instance_environment(2)["OMP_WAIT_POLICY"] == "ACTIVE"


def test_help_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hbserve", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (1, "error: stdout: No space left on device\n")


def test_a_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path):
    """A module that the command line imports reports that it is being imported, and waits for the signal."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.write(1, b'importing')\nsignal.pause()\n")
    code = "from hbserve.entry import main; main()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(len("importing")) == b"importing"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (-signal.SIGINT, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_an_instance_imports_torch_ends_it_at_once(tmp_path, small_model, number):
    """It takes seconds, many of them on a busy host, in which no event loop looks at signals."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.write(1, b'importing')\nwhile True: signal.pause()\n")
    config = tmp_path / "deployment.yaml"
    instance = "{instance_id: h, instance_type: hybrid}"
    config.write_text(f"model: {{path: {small_model('qwen3')}}}\ngpu_instances: [{instance}]\n")
    command = [sys.executable, "-m", "hbserve", "instance", "--config", str(config), "--instance-id", "h"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.read(len("importing")) == b"importing", process.communicate(timeout=60)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, said) == (-number, b"")


def test_an_engine_in_the_commands_own_process_waits_without_spinning_too(tmp_path):
    (tmp_path / "typer.py").write_text("import os\nos.write(1, os.environ['OMP_WAIT_POLICY'].encode())\nos._exit(0)\n")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for more, expected in (({}, b"PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, b"ACTIVE")):
        said = subprocess.check_output(
            [sys.executable, "-c", "from hbserve.entry import main; main()"],
            env=environment | more | {"PYTHONPATH": str(tmp_path)},
            timeout=60,
        )
        assert said == expected

"""Errors in a configuration file: the process that reads it reports them, in one line, before it starts an instance."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hbserve.__main__ import app
from hbserve.models import servable
from hbserve.pd_disagg import DisaggregatedLLM, PdDisaggConfig
from hbserve.processes import child_process
from hbserve_core import InvalidInstanceConfig
from hbserve_core.model import host_memory
from hbserve_kv import BackendUnavailable
from hbserve_kv.transports import registry
from hbserve_rpc import AddressInUse
from hbserve_scheduler import ConfigError

FOREIGN = "192.0.2.7"
"""An address that no machine has, because it is reserved for documentation."""


@pytest.fixture(autouse=True)
def no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process.ChildProcess, "start", None)  # it would be called in vain
    monkeypatch.setattr(servable, "_has_driver", lambda: False)


def pair(**of_prefill: Any) -> list[dict[str, Any]]:
    return [
        {"instance_id": "p", "instance_type": "prefill", "kv_rank": 0, **of_prefill},
        {"instance_id": "d", "instance_type": "decode", "kv_rank": 1},
    ]


THERE = "there are ['auto', 'ipc', 'mooncake', 'nccl'], or 'module:Class' of your own"
NO_FILE = "No such file or directory"
CASES: list[tuple[dict[str, Any], str]] = [
    ({"kv_transfer": {"backend": "ncl"}}, f"kv_transfer.backend='ncl': {THERE}"),
    ({"kv_transfer": {"backend": "not_there:It"}}, "kv_transfer.backend='not_there:It': No module named 'not_there'"),
    ({"kv_transfer": {"backend": "no.way:It"}}, "kv_transfer.backend='no.way:It': No module named 'no'"),
    ({"kv_transfer": {"backend": ":It"}}, "kv_transfer.backend=':It': "),
    ({"kv_transfer": {"ip": FOREIGN}}, f"kv_transfer.ip='{FOREIGN}': {FOREIGN}:0 cannot be bound: "),
    ({"gpu_instances": pair(host=FOREIGN)}, f"gpu_instances[0].host='{FOREIGN}': {FOREIGN}:0 cannot be bound: "),
    ({"scheduler": {"host": "no.such.host.invalid"}}, "scheduler.host='no.such.host.invalid': "),
    ({"engine": {"device": "cuda:0"}}, "engine.device='cuda:0': this host has no GPU driver"),
    ({"engine": {"device": "gpu"}}, "engine.device='gpu': expected 'auto', 'cpu' or 'cuda:N'"),
    ({"server": {"chat_template": "no.jinja"}}, f"server.chat_template='no.jinja': {NO_FILE}"),
    ({"server": {"chat_template": "{% if"}}, "server.chat_template='{% if': unexpected 'end of template'"),
    ({"server": {"ssl_certfile": __file__, "ssl_keyfile": "no.pem"}}, f"server.ssl_keyfile='no.pem': {NO_FILE}"),
    ({"model": {"path": "~nobody-here/m"}}, "/~nobody-here/m' does not exist"),
    ({"security": {"keys": "~nobody-here/k"}}, "~nobody-here/k"),
    ({"server": {"api_key_file": "~nobody-here/k"}}, f"server.api_key_file='~nobody-here/k': {NO_FILE}"),
    ({"server": {"api_key": "secret\n"}}, "server.api_key: begins or ends with white space, or has a line's end: no"),
    ({"server": {"api_key_file": os.devnull}}, f"server.api_key_file='{os.devnull}': has no key; expected one on each"),
    ({"server": {"chat_template": "~nobody-here/t"}}, f"server.chat_template='~nobody-here/t': {NO_FILE}"),
    (
        {"server": {"uds": "/tmp/" + "x" * 200}},
        "205 bytes; a Unix domain socket's path may have 107: ",
    ),
]


@pytest.mark.parametrize(("sections", "message"), CASES, ids=[message.partition(":")[0] for _, message in CASES])
def test_what_an_instance_or_the_server_would_find_out_later_is_told_at_once(config, sections, message):
    path = config(**sections)
    refused = CliRunner().invoke(app, ["serve", "--config", str(path), "--log-level", "ERROR"])
    *before, line = refused.stderr.splitlines()
    assert message in line
    assert line.startswith("error: ")
    assert before in ([], ["hbserve: starting p, d"], ["hbserve: starting prefill-0, decode-0"])
    assert refused.exit_code in (1, 2)


def of_instance(port: int) -> dict[str, Any]:
    return {"gpu_instances": pair(port=port)}


USES: dict[str, Callable[[int], dict[str, Any]]] = {
    "scheduler.port": lambda port: {"scheduler": {"port": port}},
    "scheduler.health_port": lambda port: {"scheduler": {"health_port": port}},
    "gpu_instances[0].port": of_instance,
    "kv_transfer.port": lambda port: {"kv_transfer": {"port": port}},
    "engine.health_port": lambda port: {"engine": {"health_port": port}},
}


@pytest.mark.parametrize("key", USES)
def test_a_port_in_use_is_named_with_the_key_that_has_it(config, key):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        path = config(**USES[key](port))
        refused = CliRunner().invoke(app, ["serve", "--config", str(path)])
    line = refused.stderr.splitlines()[-1]
    option = " or --scheduler-port" if key == "scheduler.port" else ""
    assert f"127.0.0.1:{port} is in use: give another {key}{option}, or 0 to let the system choose" in line
    assert refused.exit_code == 1


@pytest.mark.parametrize("key", ["--port", "kv_transfer.port", "engine.health_port"])
def test_an_instance_names_the_key_of_its_port_in_use_before_it_loads_a_model(config, key):
    """Also if it is not in the file: its KV port is then that of another instance, if both are on one host."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["instance", "--config", str(config(**USES.get(key, lambda _: {})(port))), "--instance-id", "new"]
        command += ["--instance-type", "decode", *(["--port", str(port)] if key == "--port" else [])]
        refused = CliRunner().invoke(app, command)
    assert f"127.0.0.1:{port} is in use: give another {key}, or 0 to let the system choose" in refused.stderr
    assert refused.exit_code == 1


def test_an_instance_names_the_option_of_a_host_that_is_not_here(config):
    command = ["instance", "--config", str(config()), "--instance-id", "decode-0", "--host", FOREIGN]
    refused = CliRunner().invoke(app, command)
    assert f"error: --host='{FOREIGN}': {FOREIGN}:0 cannot be bound: " in refused.stderr
    assert refused.exit_code == 2


async def test_python_hears_the_same_before_a_process_is_started(small_model):
    model: dict[str, Any] = {"model_path": small_model("qwen3")}
    with pytest.raises(BackendUnavailable, match=r"kv_transfer\.backend='ncl': there are"):
        await DisaggregatedLLM(PdDisaggConfig(**model, kv_transfer_backend="ncl")).start()
    with pytest.raises(InvalidInstanceConfig, match="this host has no GPU driver"):
        await DisaggregatedLLM(PdDisaggConfig(**model, device="cuda")).start()
    with pytest.raises(ConfigError, match=FOREIGN):
        await DisaggregatedLLM(PdDisaggConfig(**model, gpu_instances=pair(host=FOREIGN))).start()
    with pytest.raises(ConfigError, match="device='gpu': expected 'auto', 'cpu' or 'cuda:N'"):
        PdDisaggConfig(**model, device="gpu")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as another:
        scheduler = {"port": another.getsockname()[1]}  # where it does not listen
        instances = pair(port=taken.getsockname()[1])
        config = PdDisaggConfig(**model, gpu_instances=instances, scheduler=scheduler)
        with pytest.raises(AddressInUse, match=r"p: 127\.0\.0\.1"):
            await DisaggregatedLLM(config).start()


def test_too_little_memory_for_the_weights_of_all_instances_is_told_with_what_they_need(config, monkeypatch):
    monkeypatch.setattr(host_memory, "available_memory", lambda: 1000)
    refused = CliRunner().invoke(app, ["serve", "--config", str(config())])
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert ": 2 times its weights, one for each instance, need 0.0 GiB of this host's memory, of" in refused.stderr
    assert refused.exit_code == 1


def test_mooncake_that_is_not_installed_is_told_with_what_installs_it(config, monkeypatch):
    monkeypatch.setattr(registry, "PathFinder", type("Nothing", (), {"find_spec": lambda *_: None}))
    refused = CliRunner().invoke(app, ["serve", "--config", str(config(kv_transfer={"backend": "mooncake"}))])
    assert "error: kv_transfer.backend='mooncake' needs Mooncake: pip install 'hbserve-kv[" in refused.stderr
    assert refused.exit_code == 1


def test_a_backend_that_is_there_is_not_imported_to_know_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("dear_to_import", "mooncake"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    servable.require_backend("dear_to_import:Mine")
    for name in ("nccl", "mooncake", "ipc", "auto"):
        servable.require_backend(name)

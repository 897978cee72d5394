"""PdDisaggConfig: documented fields and defaults; wrong values are named, at construction and at start."""

import re
from pathlib import Path
from typing import Any

import pytest

from hbserve.commands.serve import InstanceArgs, ServeArgs
from hbserve.pd_disagg import DisaggregatedLLM, KVTransferBackend, PdDisaggConfig
from hbserve.processes.launcher import instance_settings
from hbserve_scheduler import ConfigError, load_config
from hbserve_scheduler.config import InstanceSection
from hbserve_testing.narrowing import of_type

CONFIG_FILE = Path(__file__).resolve().parents[3] / "configs" / "pd_disagg_config.yaml"
DEFAULTS = {
    "tensor_parallel_size": 1,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "kv_transfer_backend": KVTransferBackend.NCCL,
    "kv_buffer_size": 1 << 30,
    "chunked_prefill_enabled": True,
    "chunk_size": None,
    "max_chunk_prefill_tokens": 4096,
    "cuda_graph_enabled": True,
    "cuda_graph_max_seq_len": 2048,
}


def test_documented_fields_have_their_documented_defaults():
    config = PdDisaggConfig("~/model")
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert [of_type(InstanceSection, each).instance_type for each in config.gpu_instances] == ["prefill", "decode"]


WRONG: dict[str, tuple[Any, str]] = {
    "chunk_size": (0, "chunk_size=0: expected at least 1"),
    "max_num_seqs": ("many", "max_num_seqs='many': expected `int`"),
    "tensor_parallel_size": (0, "tensor_parallel_size=0: expected at least 1"),
    "kv_buffer_size": ("1 parsec", "kv_buffer_size='1 parsec': expected a number of bytes"),
    "dtype": ("int8", "dtype='int8': expected one of auto, float32, bfloat16, float16"),
    "kv_port": (70000, "kv_port=70000: expected 0 to 65535"),
    "gpu_instances": ([{"instance_id": "p", "instance_type": "prefill"}], "there is no decode instance"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_at_construction(name):
    value, message = WRONG[name]
    with pytest.raises(ConfigError, match=message.split("`")[0]) as caught:
        PdDisaggConfig("~/model", **{name: value})
    assert message in str(caught.value)


async def test_a_wrong_value_set_later_is_named_at_start():
    config = PdDisaggConfig("~/model")
    config.chunk_size = 256
    config.max_num_seqs = 0
    with pytest.raises(ConfigError, match="max_num_seqs=0"):
        await DisaggregatedLLM(config).start()


def test_two_configurations_share_nothing_that_can_be_changed():
    one, other = PdDisaggConfig("~/model"), PdDisaggConfig("~/model")
    one.kv_options["level"] = 3
    one.scheduler["port"] = 0
    one.gpu_instances.clear()  # type: ignore[attr-defined]
    assert (other.kv_options, other.scheduler, len(other.gpu_instances)) == ({}, {}, 2)
    assert PdDisaggConfig("~/model") == other


def test_all_but_the_model_is_given_by_keyword():
    with pytest.raises(TypeError, match="positional"):
        PdDisaggConfig("~/model", 2)  # type: ignore[call-arg]


def test_a_misspelt_field_is_an_error():
    config = PdDisaggConfig("~/model")
    with pytest.raises(AttributeError, match="chunck_size"):
        config.chunck_size = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="chunck_size"):
        PdDisaggConfig("~/model", chunck_size=3)  # type: ignore[call-arg]


def test_a_configuration_file_and_its_flat_fields_say_the_same():
    if not CONFIG_FILE.exists():
        pytest.skip("the repository's configs/ are not here: this is an installed package")
    deployment = load_config(CONFIG_FILE)
    assert PdDisaggConfig.from_deployment(deployment).to_deployment() == deployment


def test_a_path_of_the_servers_section_may_begin_with_the_home(config, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    server = {"ssl_keyfile": "~/key.pem", "ssl_certfile": "~/cert.pem"}
    found = ServeArgs(config(server=server), None, "INFO", {"uds": "~/api.sock"}).deployment().server
    assert (found.uds, found.ssl_keyfile, found.ssl_certfile) == (
        "/home/me/api.sock", "/home/me/key.pem", "/home/me/cert.pem"
    )  # fmt: skip


def test_a_port_beside_the_path_that_is_served_in_its_place_is_refused(config):
    for given in ({"uds": "/tmp/a.sock", "port": 8000}, {"uds": "/tmp/a.sock", "host": "::1", "port": 1}):
        with pytest.raises(ConfigError, match=r"^--(port|host): expected none with .* --uds, "):
            ServeArgs(config(), None, "INFO", given).deployment()
    with pytest.raises(ConfigError, match=r"^--port: expected none with server\.uds"):
        ServeArgs(config(server={"uds": "/tmp/a.sock"}), None, "INFO", {"port": 8000}).deployment()
    beside = ServeArgs(config(server={"port": 8001}), None, "INFO", {"uds": "/tmp/a.sock"})
    assert beside.deployment().server.uds == "/tmp/a.sock", "a file's port may wait for another day"


def test_a_second_deployment_without_a_file_has_another_scheduler_port():
    assert ServeArgs(None, None, "INFO", scheduler_port=5560).deployment().scheduler.port == 5560
    with pytest.raises(ConfigError, match=r"^scheduler\.port=70000: "):
        ServeArgs(None, None, "INFO", scheduler_port=70000).deployment()


def test_without_a_file_all_that_is_started_is_on_the_ipv6_loopback_with_the_server(config):
    def hosts(path: Any, host: str) -> list[str]:
        found = ServeArgs(path, None, "INFO", {"host": host}).deployment()
        return [found.scheduler.host, *(each.host for each in found.gpu_instances)]

    assert hosts(None, "::1") == hosts(None, "0:0:0:0:0:0:0:1") == ["::1"] * 3
    for path, host in ((config(), "::1"), (None, "::"), (None, "0.0.0.0")):
        assert hosts(path, host) == ["127.0.0.1"] * 3, "a file says where; a server for others is not where these are"


def test_an_instance_may_be_told_who_and_where_it_is_also_if_the_file_does_not_have_it(config):
    def told(instance_id: str, **given: Any) -> tuple[Any, Any]:
        return InstanceArgs(config(), instance_id, "INFO", given).deployment()

    deployment, own = told("decode-0", host="10.0.0.7", port=5600)
    assert (own.instance_type, own.host, own.port, own.kv_rank) == ("decode", "10.0.0.7", 5600, 1)
    assert deployment.gpu_instances[1] is own
    assert len(deployment.gpu_instances) == 2
    deployment, own = told("prefill-7", instance_type="prefill", host="10.0.0.8")
    assert (own.instance_id, own.instance_type, own.host) == ("prefill-7", "prefill", "10.0.0.8")
    assert deployment.gpu_instances == [own], "what else is on its host is not known"
    with pytest.raises(ConfigError, match=r"has prefill-0, decode-0; give --instance-type too"):
        told("prefill-7")
    with pytest.raises(ConfigError, match=r"--host='0\.0\.0\.0': means every address of a machine"):
        told("decode-0", host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"--instance-id='a\\nb': expected a name of one line"):
        told("a\nb", instance_type="prefill")


def test_an_instance_that_is_found_by_a_name_serves_at_the_port_of_that(tmp_path):
    path = tmp_path / "d.yaml"
    path.write_text(
        "gpu_instances: [{instance_id: d0, instance_type: decode, port: 7001}, "
        "{instance_type: prefill, discover: 'dns:p.example:7000'}]\n"
    )
    for given, port in (({}, 7000), ({"port": 0}, 0)):
        args = InstanceArgs(path, "pod-7", "INFO", {"instance_type": "prefill", "host": "10.0.0.7"} | given)
        deployment, own = args.deployment()
        assert (own.instance_id, own.host, own.port) == ("pod-7", "10.0.0.7", port)
        assert instance_settings(deployment, own, Path("/m"), log_level="INFO")["num_local_instances"] == 1


@pytest.mark.parametrize("several", ["p0", b"p0", 5, {"p0": "prefill"}, None])
def test_instances_that_are_no_list_are_refused_as_a_whole(several):
    with pytest.raises(ConfigError, match=rf"^gpu_instances={re.escape(repr(several))}: expected a list, got"):
        PdDisaggConfig("/m", gpu_instances=several)


def test_what_starts_all_of_its_instances_looks_none_up():
    discovered = {"instance_type": "hybrid", "discover": "dns:p.example:7000"}
    with pytest.raises(ConfigError, match=r"gpu_instances\[0\].discover='dns:p.example:7000': expected none"):
        PdDisaggConfig("/m", gpu_instances=[discovered])

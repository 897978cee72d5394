"""A wrong configuration is one line that names the key by its path, its value, and what is allowed."""

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hbserve_scheduler import (
    ConfigError,
    DeploymentConfig,
    InstanceSection,
    SchedulerConfig,
    convert,
    load_config,
    parse_size,
)
from hbserve_scheduler.config import (
    EngineSection,
    KVTransferSection,
    ModelSection,
    RaySection,
    SecuritySection,
    ServerSection,
)

PREFILL = {"instance_id": "p0", "instance_type": "prefill", "kv_rank": 0, "port": 7000}
DECODE = {"instance_id": "d0", "instance_type": "decode", "kv_rank": 1, "port": 7001}
PAIR = [PREFILL, DECODE]

# (content, texts that the error must have)
WRONG: list[tuple[Any, list[str]]] = [
    # unknown keys
    ({"modle": {}}, ["modle: unknown key", "did you mean 'model'?", "gpu_instances"]),
    ({"model": {"tensor_paralel_size": 1}}, ["model.tensor_paralel_size: unknown key", "'tensor_parallel_size'?"]),
    ({"gpu_instances": [PREFILL, DECODE | {"gpu": 1}]}, ["gpu_instances[1].gpu: unknown key", "'gpu_id'?"]),
    ({"kv-transfer": {}}, ["kv-transfer: unknown key", "did you mean 'kv_transfer'?"]),
    ({"engine": {"Block_Size ": 1}}, ["engine.'Block_Size ': unknown key", "did you mean 'block_size'?"]),
    ({"engine": {"zzz": 1}}, ["engine.zzz: unknown key; expected one of device"]),
    # types
    ({"gpu_instances": {"role": "prefill"}}, ["gpu_instances={'role': 'prefill'}: expected a list, got a mapping"]),
    ({"ray": {"resources": 3}}, ["ray.resources=3: expected a mapping, got `int`"]),
    ({"ray": {"resources": {"prefill": {"a": "b"}}}}, ["ray.resources={'prefill': {'a': 'b'}}: expected `float`"]),
    ([], ["the file=[]", "expected a mapping"]),
    ("text", ["the file='text'", "expected a mapping"]),
    ({"model": 7}, ["model=7", "expected a mapping"]),
    ({"model": {"path": 7}}, ["model.path=7", "str"]),
    ({"model": {"tensor_parallel_size": "two"}}, ["model.tensor_parallel_size='two'", "int"]),
    ({"model": {"tensor_parallel_size": True}}, ["model.tensor_parallel_size=True", "int"]),
    ({"chunked_prefill": {"enabled": "yes"}}, ["chunked_prefill.enabled='yes'", "bool"]),
    ({"chunked_prefill": {"chunk_size": 1.5}}, ["chunked_prefill.chunk_size=1.5", "int"]),
    ({"kv_transfer": {"options": []}}, ["kv_transfer.options=[]", "expected a mapping"]),
    ({"kv_transfer": {"buffer_size": 1.5}}, ["kv_transfer.buffer_size=1.5", "int"]),
    ({"gpu_instances": {}}, ["gpu_instances={}", "expected a list"]),
    ({"gpu_instances": [7]}, ["gpu_instances[0]=7", "expected a mapping"]),
    ({"gpu_instances": [PREFILL, DECODE | {"port": "x"}]}, ["gpu_instances[1].port='x'", "int"]),
    ({"gpu_instances": [{"instance_type": "prefill"}]}, ["gpu_instances[0].instance_id='': expected a name"]),
    # choices
    ({"gpu_instances": [PREFILL | {"instance_type": "prefil"}]}, ["gpu_instances[0].instance_type='prefil'", "hybrid"]),
    ({"model": {"dtype": "fp16"}}, ["model.dtype='fp16'", "auto, float32, bfloat16, float16"]),
    (
        {"scheduler": {"decode_policy": "random"}},
        ["scheduler.decode_policy='random'", "least_loaded, power_of_two"],
    ),
    ({"scheduler": {"prefill_policy": "a:b:c"}}, ["scheduler.prefill_policy='a:b:c'", "'module:Class' of your own"]),
    # ranges
    ({"model": {"tensor_parallel_size": 0}}, ["model.tensor_parallel_size=0", "at least 1"]),
    (
        {"gpu_instances": [PREFILL, DECODE | {"tensor_parallel_size": 0}]},
        ["gpu_instances[1].tensor_parallel_size=0", "at least 1"],
    ),
    ({"model": {"max_model_len": 0}}, ["model.max_model_len=0", "at least 1"]),
    ({"kv_transfer": {"port": 65536}}, ["kv_transfer.port=65536", "0 to 65535"]),
    ({"kv_transfer": {"timeout_s": 0}}, ["kv_transfer.timeout_s=0", "at least 0.1"]),
    ({"chunked_prefill": {"chunk_size": 0}}, ["chunked_prefill.chunk_size=0", "at least 1"]),
    ({"cuda_graph": {"max_seq_len": -1}}, ["cuda_graph.max_seq_len=-1", "at least 1"]),
    ({"engine": {"gpu_memory_utilization": 1.5}}, ["engine.gpu_memory_utilization=1.5", "0.01 to 1"]),
    ({"engine": {"block_size": 0}}, ["engine.block_size=0", "at least 1"]),
    ({"scheduler": {"port": -1}}, ["scheduler.port=-1", "0 to 65535"]),
    ({"scheduler": {"max_attempts": 0}}, ["scheduler.max_attempts=0", "at least 1"]),
    ({"scheduler": {"request_timeout_s": float("nan")}}, ["scheduler.request_timeout_s=nan", "at least 0.001"]),
    ({"kv_transfer": {"timeout_s": float("inf")}}, ["kv_transfer.timeout_s=inf", "expected 0.1 to"]),
    (
        {"scheduler": {"heartbeat_interval_s": 5, "heartbeat_timeout_s": 2}},
        ["scheduler.heartbeat_timeout_s=2", "more than scheduler.heartbeat_interval_s=5"],
    ),
    ({"gpu_instances": [PREFILL, DECODE | {"port": 70000}]}, ["gpu_instances[1].port=70000", "0 to 65535"]),
    ({"gpu_instances": [PREFILL | {"gpu_id": -1}, DECODE]}, ["gpu_instances[0].gpu_id=-1", "at least 0"]),
    # sizes
    ({"kv_transfer": {"buffer_size": "1 parsec"}}, ["kv_transfer.buffer_size='1 parsec'", "512MiB"]),
    ({"kv_transfer": {"buffer_size": 0}}, ["kv_transfer.buffer_size=0", "bytes"]),
    ({"kv_transfer": {"buffer_size": -5}}, ["kv_transfer.buffer_size=-5", "bytes"]),
    # what must fit together
    ({"gpu_instances": []}, ["gpu_instances=[]", "no prefill instance"]),
    ({"gpu_instances": [DECODE]}, ["gpu_instances=['d0']", "no prefill instance"]),
    ({"gpu_instances": [PREFILL]}, ["gpu_instances=['p0']", "no decode instance"]),
    ({"gpu_instances": [PREFILL | {"instance_id": ""}, DECODE]}, ["gpu_instances[0].instance_id=''", "a name"]),
    ({"gpu_instances": [PREFILL, DECODE | {"instance_id": " "}]}, ["gpu_instances[1].instance_id=' '", "a name"]),
    ({"gpu_instances": [PREFILL | {"instance_id": "a\nb"}, DECODE]}, ["instance_id='a\\nb'", "a name of one line"]),
    ({"gpu_instances": [PREFILL | {"instance_id": "a" * 257}, DECODE]}, ["instance_id='aaa", "256 characters at most"]),
    # texts that are none
    ({"server": {"api_key": ""}}, ["server.api_key='': expected a text that is not empty, or null"]),
    ({"server": {"uds": ""}}, ["server.uds=''", "not empty"]),
    ({"model": {"path": " "}}, ["model.path=' '", "not empty"]),
    ({"security": {"keys": ""}}, ["security.keys=''", "not empty"]),
    ({"server": {"served_model_names": ["a", ""]}}, ["server.served_model_names[1]=''", "a name"]),
    ({"server": {"root_path": "llm"}}, ["server.root_path='llm'", "begins with /"]),
    (
        {"server": {"cors_origins": ["*", "https://a.example/"]}},
        ["server.cors_origins[1]='https://a.example/'", "'https://example.com'"],
    ),
    # addresses; hbserve_rpc tests what else is none
    ({"gpu_instances": [PREFILL | {"host": ""}, DECODE]}, ["gpu_instances[0].host=''", "an IP address or a name"]),
    (
        {"gpu_instances": [PREFILL, DECODE | {"host": "0.0.0.0"}]},
        ["gpu_instances[1].host='0.0.0.0'", "peers", "10.0.0.5"],
    ),
    ({"gpu_instances": [PREFILL | {"host": "::"}, DECODE]}, ["gpu_instances[0].host='::'", "peers", "10.0.0.5"]),
    (
        {"gpu_instances": [PREFILL | {"host": "[::1]"}, DECODE]},
        ["gpu_instances[0].host='[::1]'", "without brackets, '::1'"],
    ),
    (
        {"gpu_instances": [PREFILL | {"host": "fe80::1%a"}, DECODE]},
        ["gpu_instances[0].host='fe80::1%a'", "not link-local"],
    ),
    ({"gpu_instances": [PREFILL | {"host": "a:1"}, DECODE]}, ["gpu_instances[0].host='a:1'", "only the host"]),
    ({"gpu_instances": PAIR, "kv_transfer": {"ip": "0.0.0.0"}}, ["kv_transfer.ip='0.0.0.0'", "peers", "10.0.0.5"]),
    ({"gpu_instances": PAIR, "kv_transfer": {"ip": ""}}, ["kv_transfer.ip=''", "an IP address or a name"]),
    ({"gpu_instances": PAIR, "scheduler": {"host": "my host"}}, ["scheduler.host='my host'", "letters, digits"]),
    (
        {"gpu_instances": [PREFILL, DECODE | {"host": "fd00::2"}]},
        [
            "gpu_instances[1].host='fd00::2'",
            "gpu_instances[0] has '127.0.0.1'",
            "'nccl' needs IPv4 for all, or IPv6 for",
        ],
    ),
    (
        {"gpu_instances": [PREFILL | {"host": "::1"}, DECODE | {"host": "0::1", "port": 7000}]},
        ["gpu_instances[1].port=7000", "gpu_instances[0] has it too"],
    ),
    ({"gpu_instances": [PREFILL, DECODE | {"instance_id": "p0"}]}, ["gpu_instances[1].instance_id='p0'", "its own"]),
    ({"gpu_instances": [PREFILL, DECODE | {"kv_rank": 0}]}, ["gpu_instances[1].kv_rank=0", "gpu_instances[0]"]),
    ({"gpu_instances": [PREFILL, DECODE | {"port": 7000}]}, ["gpu_instances[1].port=7000", "gpu_instances[0]"]),
    ({"gpu_instances": PAIR, "scheduler": {"port": 7001}}, ["gpu_instances[1].port=7001", "is scheduler.port too"]),
    (
        {"gpu_instances": PAIR, "kv_transfer": {"port": 5549}},
        ["kv_transfer.port=5549", "gpu_instances[1] is 5550", "which is scheduler.port"],
    ),
    (
        {"gpu_instances": PAIR, "kv_transfer": {"port": 7000}},
        ["kv_transfer.port=7000", "gpu_instances[0] is 7000", "gpu_instances[0].port"],
    ),
    ({"scheduler": {"health_port": 5550}}, ["scheduler.health_port=5550: is scheduler.port too"]),
    (
        {"server": {"port": 5551}, "scheduler": {"health_port": 5551}},
        ["server.port=5551: is scheduler.health_port too"],
    ),
    (
        {"gpu_instances": PAIR, "engine": {"health_port": 7000}},
        ["engine.health_port=7000", "gpu_instances[0] is 7000", "gpu_instances[0].port"],
    ),
    (
        {"gpu_instances": PAIR, "engine": {"health_port": 9001}, "kv_transfer": {"port": 9001}},
        [
            "engine.health_port=9001",
            "gpu_instances[0] is 9001",
            "which is kv_transfer.port + kv_rank of gpu_instances[0]",
        ],
    ),
    ({"gpu_instances": PAIR, "kv_transfer": {"port": 65535}}, ["gpu_instances[1].kv_rank=1", "65536"]),
]


@pytest.mark.parametrize(("content", "texts"), WRONG, ids=[texts[0] for _, texts in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(content: Any, texts: list[str]) -> None:
    # Known elsewhere: vLLM #25059, #20965, dynamo #12026, SGLang #21704.
    with pytest.raises(ConfigError) as caught:
        convert(content)
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert "\n" not in message


def test_a_file_without_instances_has_one_of_each_role_on_this_host() -> None:
    config = convert({"server": {"port": 8001}})
    found = [(each.instance_id, each.instance_type, each.kv_rank, each.port) for each in config.gpu_instances]
    assert found == [("prefill-0", "prefill", 0, 0), ("decode-0", "decode", 1, 0)]


NUMBERS = [
    (section.name, key.name)
    for section in msgspec.structs.fields(DeploymentConfig)
    for key in msgspec.structs.fields(InstanceSection if section.name == "gpu_instances" else section.type)
    if re.search(r"\b(int|float)\b", str(key.type))
]


@pytest.mark.parametrize(("section", "key"), NUMBERS)
def test_every_number_has_a_range(section: str, key: str) -> None:
    content: dict[str, Any]
    if section == "gpu_instances":
        content, path = {section: [PREFILL, DECODE | {key: -1}]}, rf"gpu_instances\[1\].{key}"
    else:
        content, path = {section: {key: -1}, "gpu_instances": PAIR}, rf"{section}\.{key}"
    with pytest.raises(ConfigError, match=rf"^{path}=-1(\.0)?: expected "):
        convert(content)


@pytest.mark.parametrize("section", [field.name for field in msgspec.structs.fields(DeploymentConfig)])
def test_no_section_takes_a_key_that_it_does_not_know(section: str) -> None:
    content: dict[str, Any]
    if section == "gpu_instances":
        content, path = {section: [PREFILL, DECODE | {"zzz": 1}]}, r"gpu_instances\[1\]"
    else:
        content, path = {section: {"zzz": 1}, "gpu_instances": PAIR}, section
    with pytest.raises(ConfigError, match=f"^{path}.zzz: unknown key; expected one of "):
        convert(content)


def test_the_readme_names_every_key_and_no_other() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    rows = dict(re.findall(r"^- `(\w+)`.*?: (.*\n(?:  .*\n)*)", readme, re.M))
    assert list(rows) == [field.name for field in msgspec.structs.fields(DeploymentConfig)]
    for field in msgspec.structs.fields(DeploymentConfig):
        section = field.type.__args__[0] if field.name == "gpu_instances" else field.type
        keys = {key.name for key in msgspec.structs.fields(section)}
        assert set(re.findall(r"`(\w+)`", rows[field.name])) == keys


def test_what_is_not_written_has_its_default() -> None:
    config = convert({"gpu_instances": PAIR})
    assert (config.model.path, config.model.tensor_parallel_size) == (None, 1)  # type: ignore[attr-defined]
    assert (config.kv_transfer.backend, config.kv_transfer.buffer_size) == ("nccl", 1 << 30)
    assert config.scheduler.request_timeout_s is None
    assert [each.instance_type for each in config.gpu_instances] == ["prefill", "decode"]


def test_hybrid_instances_need_no_others() -> None:
    convert({"gpu_instances": [{"instance_id": "h0", "instance_type": "hybrid"}]})


def test_the_same_port_on_two_hosts_and_port_zero_twice_are_allowed() -> None:
    convert({"gpu_instances": [PREFILL, DECODE | {"host": "10.0.0.2", "port": 7000}]})
    convert({"gpu_instances": [PREFILL | {"port": 0}, DECODE | {"port": 0}]})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "localhost", "::1"])
def test_a_scheduler_may_listen_on_every_address(host: str) -> None:
    assert convert({"gpu_instances": PAIR, "scheduler": {"host": host}}).scheduler.host == host


def test_both_versions_of_ip_are_allowed_where_the_backend_takes_them_or_all_kv_is_at_one_address() -> None:
    instances = [PREFILL, DECODE | {"host": "::1"}]
    convert({"gpu_instances": instances, "kv_transfer": {"backend": "ipc"}})
    convert({"gpu_instances": instances, "kv_transfer": {"ip": "127.0.0.1"}})
    convert({"gpu_instances": [PREFILL, DECODE | {"host": "node-2"}]})


@pytest.mark.parametrize(
    ("text", "size"),
    [(4096, 4096), ("4096", 4096), ("64 B", 64), ("1KiB", 1024), ("512MiB", 512 << 20), ("1GiB", 1 << 30),
     ("1gib", 1 << 30), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9)],
)  # fmt: skip
def test_sizes_are_bytes_or_texts_with_a_unit(text: int | str, size: int) -> None:
    assert parse_size("kv_transfer.buffer_size", text) == size


# ---- files -------------------------------------------------------------------------------------------------------

GOOD = """\
model: {path: /models/demo}
gpu_instances:
  - {instance_id: p0, instance_type: prefill, port: 7000, kv_rank: 0}
  - {instance_id: d0, instance_type: decode, port: 7001, kv_rank: 1}
"""


def load_text(folder: Path, text: str | bytes) -> DeploymentConfig:
    path = folder / "deployment.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path)


def test_a_file_is_read_by_text_path_or_path_object(tmp_path: Path) -> None:
    config = load_text(tmp_path, GOOD)
    assert config == load_config(str(tmp_path / "deployment.yaml"))
    assert config.model.path == "/models/demo"


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        "gpu_instances:\n  - &p {instance_id: p0, instance_type: prefill, kv_rank: 0, gpu_id: 3}\n"
        "  - {<<: *p, instance_id: d0, instance_type: decode, kv_rank: 1}\n",
    )
    assert [each.gpu_id for each in config.gpu_instances] == [3, 3]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("model:\n  path: [1, 2\nengine: {}\n", ["line 3:"]),
        ("model: {}\nengine: {}\nmodel: {}\n", ["line 3:", "'model' is written twice"]),
        ("model:\n  path: a\n  path: b\n", ["line 3:", "'path' is written twice"]),
        ('model: {}\nserver:\n  uds: "/tmp/a\\0b"\n', ["line 3:", "a string has a NUL character"]),
        ("model: !!python/object:os.system {}\n", ["line 1:", "python/object"]),
        ("? [a, b]\n: 1\n", ["line 1:"]),
        ("model: *nobody\n", ["line 1:", "nobody"]),
        ("model: {path: \x00}\n", ["special characters"]),
        (b"model: {path: \xff}\n", ["not UTF-8"]),
        ("", ["the file is empty"]),
        ("# all of it\n", ["the file is empty"]),
        ("--- {}\n--- {}\n", ["line 2:", "document"]),
        ("engine:\n  num_blocks: 012\n", ["line 2: 012 is another number by YAML 1.1 than"]),
        ("scheduler: {max_queue_time_s: 1:30}\n", ["line 1: 1:30 is"]),
        ("scheduler: {max_queue_time_s: 1:30.5}\n", ["line 1: 1:30.5 is"]),
        ("modle: {}\n", ["modle: unknown key"]),
        ("model: {}\nengine:\n  on: 8\n", ["line 3: the key on is no text to YAML; write it in quotes"]),
        ("model:\n  path: 2020-99-99\n", ["line 2: month must be in 1..12"]),
        ("model: {}\nengine: {num_blocks: !!int eight}\n", ["line 2:", "'eight'"]),
        (f"engine:\n  num_blocks: {'9' * 5000}\n", ["line 2:", "4300 digits"]),
        ("[" * 3000, ["nested too deep"]),
        (f"kv_transfer: {{buffer_size: {'9' * 400}GiB}}\n", ["kv_transfer.buffer_size=", "expected a number of bytes"]),
        ('model: {path: "\\ud83d"}\n', ["model.path: character 0", "not Unicode text"]),
        ("kv_transfer: {options: {a: [.nan]}}\n", ["kv_transfer.options.a[0]=nan: expected what JSON has"]),
        ("kv_transfer: {options: {a: {1: 2}}}\n", ["line 1: the key 1 is no text to YAML"]),
        (f"engine: {{num_blocks: {10**30}}}\n", ["engine.num_blocks=", "expected 1 to 4611686018427387904"]),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_place(
    tmp_path: Path, text: str | bytes, texts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "deployment.yaml"))
    assert all(each in message for each in texts), message
    assert "\n" not in message


def test_a_key_that_is_no_text_is_refused_in_plain_data_too() -> None:
    with pytest.raises(ConfigError, match=r"kv_transfer\.options\.a: has the key 1; expected text as keys"):
        convert({"kv_transfer": {"options": {"a": {1: 2}}}})


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("0x10", 16), ("1_000", 1000), ("+8", 8), ("0b11", 3), ("08080", "08080")]
)
def test_numbers_that_are_one_thing_by_every_version_of_yaml_are_read(tmp_path: Path, text: str, value: object) -> None:
    config = load_text(tmp_path, f"kv_transfer: {{options: {{a: {text}, b: 00.5, c: 1.0e+3}}}}\n")
    assert config.kv_transfer.options == {"a": value, "b": 0.5, "c": 1000.0}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_a_folder_is_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_queue_size": 0}, "max_queue_size=0: expected at least 1"),
        ({"max_queue_size": True}, "max_queue_size=True: expected `int`, got `bool`"),
        ({"request_timeout_s": float("nan")}, "request_timeout_s=nan: expected at least 0.001"),
        ({"heartbeat_interval_s": float("inf")}, "heartbeat_interval_s=inf: expected 0.05 to"),
        ({"instance_wait_s": "30"}, "instance_wait_s='30': expected `float`, got `str`"),
    ],
)
def test_a_scheduler_is_configured_in_python_as_in_a_file(given, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        SchedulerConfig(**given)
    with pytest.raises(ConfigError, match=r"^scheduler\."):
        convert({"scheduler": given})


@pytest.mark.parametrize(
    ("section", "values", "problem"),
    [
        (ServerSection, {"port": -1}, "port=-1: expected 0 to 65535"),
        (ServerSection, {"api_servers": "2"}, "api_servers='2': expected `int`, got `str`"),
        (ServerSection, {"cors_origins": ["*", 1]}, "cors_origins[1]=1: expected `str`, got `int`"),
        (ModelSection, {"max_model_len": -4}, "max_model_len=-4: expected at least 1"),
        (EngineSection, {"device": "tpu"}, "device='tpu': expected 'auto', 'cpu' or 'cuda:N'"),
        (KVTransferSection, {"timeout_s": -1}, "timeout_s=-1: expected at least 0.1"),
        (SecuritySection, {"allow_insecure": 1}, "allow_insecure=1: expected `bool`, got `int`"),
        (RaySection, {"resources": {"prefill": 1}}, "resources={'prefill': 1}: expected a mapping, got `int`"),
        (InstanceSection, {"instance_type": "x"}, "instance_type='x': expected one of prefill, decode, hybrid"),
        (DeploymentConfig, {"server": {}}, "server={}: expected `ServerSection`, got `dict`"),
        (
            DeploymentConfig,
            {"gpu_instances": [{"instance_type": "hybrid"}]},
            "gpu_instances=[{'instance_type': 'hybrid'}]: expected `InstanceSection`, got `dict`",
        ),
    ],
)
def test_a_section_that_is_made_in_python_is_checked_as_one_of_a_file(section, values, problem):
    with pytest.raises(ConfigError, match=f"^{re.escape(problem)}$"):
        section(**values)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("server: {api_key: '${KEY}'}", "server.api_key='${KEY}': "),
        ("model: {path: '${HOME:-/root}/model'}", "model.path='${HOME:-/root}/model': "),
        ("server: {cors_origins: ['*', 'http://${HOST}']}", "server.cors_origins[1]='http://${HOST}': "),
        ("server: {served_model_names: ['${NAME}']}", "server.served_model_names[0]='${NAME}': "),
        ("server: {port: '${PORT}'}", "server.port='${PORT}': expected `int`, got `str`; "),
    ],
)
def test_variables_of_the_environment_are_not_taken_for_texts(tmp_path, text, problem):
    """As an API key, the text itself would be one that everybody can guess."""
    path = tmp_path / "of.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {problem}")) as told:
        load_config(path)
    assert str(told.value).endswith("variables of the environment are not replaced in this file")


def test_a_chat_template_may_have_what_looks_like_a_variable(tmp_path):
    path = tmp_path / "of.yaml"
    path.write_text("server: {chat_template: '${a} {{ messages }}'}")
    assert load_config(path).server.chat_template == "${a} {{ messages }}"

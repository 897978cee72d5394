"""Settings are defined once, in hbserve_rpc.settings: the file, PdDisaggConfig and instances take them from there."""

import ast
import inspect
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
import yaml

from hbserve.pd_disagg import PdDisaggConfig
from hbserve.pd_disagg.config import PATHS
from hbserve.processes.launcher import instance_settings
from hbserve_core import InstanceConfig, InvalidInstanceConfig
from hbserve_kv import KVTransferConfig
from hbserve_rpc.settings import ENGINE_KEYS, EngineSettings, KVTransferSettings
from hbserve_scheduler import ConfigError, DeploymentConfig, convert, parse_size

ROOT = Path(__file__).resolve().parent.parent
PAIR = [
    {"instance_id": "p", "instance_type": "prefill", "kv_rank": 0},
    {"instance_id": "d", "instance_type": "decode", "kv_rank": 1},
]
ENGINE_FIELDS = {field.name: field for field in msgspec.structs.fields(EngineSettings)}
OF_NO_KEYWORD = ("gpu_instances", "scheduler", "server", "ray")
"""Sections of the file without settings of instances."""
SIZES = ("buffer_size", "max_body_size")
KV_FIELDS = {field.name: field for field in msgspec.structs.fields(KVTransferSettings)}


def structs() -> list[tuple[str, type[msgspec.Struct]]]:
    """Return the struct of each section of the file, with the section's name."""
    fields = msgspec.structs.fields(DeploymentConfig)
    return [(each.name, get_args(each.type)[0] if get_origin(each.type) is list else each.type) for each in fields]


def sections() -> dict[str, dict[str, Any]]:
    """Return the keys of each section of the file."""
    return {name: {key.name: key for key in msgspec.structs.fields(struct)} for name, struct in structs()}


def plain_type(field: Any) -> Any:
    return get_args(field.type)[0] if hasattr(field.type, "__metadata__") else field.type


def another_value(field: Any) -> Any:
    """Return a value that a field's type and bounds allow, and that is not its default."""
    kind = plain_type(field)
    if kind is bool:
        return not field.default
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != field.default)
    if kind is str:
        return "cpu"
    if kind is float:
        return field.default / 2
    if kind == dict[str, Any]:
        return {"level": 3}
    return 24  # int, or int | None


def of_an_instance(config: DeploymentConfig, number: int = 0) -> InstanceConfig:
    """Return an instance's settings, as it reads them from its launcher."""
    settings = instance_settings(config, config.gpu_instances[number], Path("/model"), log_level="INFO")
    return msgspec.json.decode(msgspec.json.encode(settings), type=InstanceConfig)


@pytest.mark.parametrize("name", ENGINE_KEYS)
def test_a_setting_of_the_engine_arrives_in_each_instance_from_the_file_and_from_its_keyword(name):
    section, key = ENGINE_KEYS[name]
    value = another_value(ENGINE_FIELDS[name])
    from_file = convert({section: {key: value}, "gpu_instances": PAIR})
    from_keyword = PdDisaggConfig("/model", **{name: value}, gpu_instances=PAIR)
    from_assignment = PdDisaggConfig("/model", gpu_instances=PAIR)
    setattr(from_assignment, name, value)
    for config in (from_file, from_keyword.to_deployment(), from_assignment.to_deployment()):
        for number in range(len(PAIR)):
            assert getattr(of_an_instance(config, number), name) == value
    assert getattr(PdDisaggConfig.from_deployment(from_file), name) == value
    assert getattr(InstanceConfig(model_path="/model", **{name: value}), name) == value


@pytest.mark.parametrize("key", KV_FIELDS)
def test_a_setting_of_kv_transfers_arrives_in_each_instance_from_the_file_and_from_its_keyword(key):
    name = next(name for name, place in PATHS.items() if place == ("kv_transfer", key))
    value = another_value(KV_FIELDS[key])
    from_file = convert({"kv_transfer": {key: value}, "gpu_instances": PAIR})
    from_keyword = PdDisaggConfig("/model", **{name: value}, gpu_instances=PAIR)
    for config in (from_file, from_keyword.to_deployment()):
        assert [getattr(of_an_instance(config, number).kv_transfer, key) for number in (0, 1)] == [value, value]
    assert getattr(PdDisaggConfig.from_deployment(from_file), name) == value
    assert getattr(KVTransferConfig(**{key: value}), key) == value


def test_the_file_the_keywords_and_the_instance_have_the_same_settings_with_the_same_types_and_defaults():
    in_file = {(section, key) for section, keys in sections().items() for key in keys}
    assert set(PATHS.values()) == {place for place in in_file if place[0] not in OF_NO_KEYWORD}
    keywords = {field.name: field for field in msgspec.structs.fields(PdDisaggConfig)}
    assert set(keywords) == {*PATHS, "gpu_instances", "scheduler"}
    instance = {field.name: field for field in msgspec.structs.fields(InstanceConfig)}
    for name, field in ENGINE_FIELDS.items():
        section, key = ENGINE_KEYS[name]
        for other in (sections()[section][key], keywords[name], instance[name]):
            assert (other.type, other.default) == (field.type, field.default), name
    for name, (section, key) in PATHS.items():
        if section == "kv_transfer":
            default = keywords[name].default_factory() if key == "options" else keywords[name].default
            assert default == getattr(
                KVTransferConfig(), key, getattr(convert({"gpu_instances": PAIR}).kv_transfer, key)
            )


A_NUMBER = (int, int | None, int | Literal["auto"], float, float | None)
NUMBERS = [name for name, field in ENGINE_FIELDS.items() if plain_type(field) in A_NUMBER]


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_its_bounds_is_refused_by_all_three_with_its_name_there(name):
    section, key = ENGINE_KEYS[name]
    wrong: dict[str, Any] = {name: -1}
    with pytest.raises(ConfigError, match=rf"^{section}\.{key}=-1(\.0)?: expected (at least )?[\d.]+"):
        convert({section: {key: -1}, "gpu_instances": PAIR})
    with pytest.raises(ConfigError, match=rf"^{name}=-1(\.0)?: expected "):
        PdDisaggConfig("/model", **wrong)
    if name != "max_model_len":  # the instance names the model's own limit
        with pytest.raises(InvalidInstanceConfig, match=f"^{name}=-1: expected "):
            InstanceConfig(model_path="/model", **wrong)


A_NEW_KEY = """\
import sys, types
from importlib.util import find_spec
from pathlib import Path

import hbserve_rpc

source = Path(find_spec("hbserve_rpc.settings").origin).read_text()
place = "    device: Annotated"
assert source.count(place) == 1
source = source.replace(place, '    cuda_graph_warmup: Annotated[int, In("cuda_graph"), POSITIVE] = 3\\n' + place)
settings = hbserve_rpc.settings = sys.modules["hbserve_rpc.settings"] = types.ModuleType("hbserve_rpc.settings")
exec(source, vars(settings))

import msgspec
from hbserve.processes.launcher import instance_settings
from hbserve.pd_disagg import PdDisaggConfig
from hbserve_core import InstanceConfig
from hbserve_scheduler import convert

pair = [{"instance_id": r, "instance_type": r, "kv_rank": i} for i, r in enumerate(["prefill", "decode"])]

def of_the_instance(config):
    found = instance_settings(config, config.gpu_instances[0], Path("/model"), log_level="INFO")
    return msgspec.convert(found, InstanceConfig).cuda_graph_warmup

def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)

print(of_the_instance(convert({"gpu_instances": pair})))
print(of_the_instance(convert({"gpu_instances": pair, "cuda_graph": {"warmup": 7}})))
print(of_the_instance(PdDisaggConfig("/model", cuda_graph_warmup=8).to_deployment()))
print(InstanceConfig(model_path="/model", cuda_graph_warmup=9).cuda_graph_warmup)
print(refused(lambda: convert({"gpu_instances": pair, "cuda_graph": {"warmpu": 7}})))
print(refused(lambda: convert({"gpu_instances": pair, "cuda_graph": {"warmup": 0}})))
print(refused(lambda: PdDisaggConfig("/model", cuda_graph_warmup="many")))
print(refused(lambda: InstanceConfig(model_path="/model", cuda_graph_warmup=0)))
"""


def test_a_new_key_written_in_one_place_is_in_the_file_in_pd_disagg_config_and_in_the_instance():
    done = subprocess.run([sys.executable, "-c", A_NEW_KEY], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "3", "7", "8", "9",
        "cuda_graph.warmpu: unknown key; did you mean 'warmup'? expected one of enabled, max_seq_len, warmup",
        "cuda_graph.warmup=0: expected at least 1",
        "cuda_graph_warmup='many': expected `int`, got `str`",
        "cuda_graph_warmup=0: expected at least 1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "struct",
    [*(struct for _, struct in structs()), DeploymentConfig, EngineSettings, KVTransferSettings,
     KVTransferConfig, InstanceConfig, PdDisaggConfig, *PdDisaggConfig.__bases__],
    ids=lambda struct: struct.__name__,
)  # fmt: skip
def test_a_setting_says_where_it_is_defined_what_it_means(struct):
    path = inspect.getsourcefile(struct)
    assert path is not None
    (found,) = [
        each
        for each in ast.parse(Path(path).read_text()).body
        if isinstance(each, ast.ClassDef) and each.name == struct.__name__
    ]
    assert ast.get_docstring(found)
    for field, following in pairwise([*found.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign):
            name = ast.unparse(field.target)
            is_told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            is_told_elsewhere = name.startswith("kv_") and struct in PdDisaggConfig.__bases__
            is_section = struct is DeploymentConfig and name in dict(structs())
            assert is_told or is_told_elsewhere or is_section, name


# ---- docs/configuration.md ---------------------------------------------------------------------------------------


def documented() -> dict[str, dict[str, dict[str, str]]]:
    """Return what docs/configuration.md says about each key, by section and key."""
    text = (ROOT / "docs/configuration.md").read_text()
    found: dict[str, dict[str, dict[str, str]]] = {}
    for section, content in re.findall(r"^## `(\w+)`$(.*?)(?=^## |\Z)", text, re.M | re.S):
        items = re.findall(r"^- `(\w+)`$\n(.*?)(?=^\S|\Z)", content, re.M | re.S)
        assert len(items) == len({key for key, _ in items}), f"{section}: a key is there twice"
        found[section] = {key: dict(re.findall(r"^  - (\w+): (.+)$", said, re.M)) for key, said in items}
    return found


def test_exactly_the_documented_keys_exist():
    in_code = {section: set(keys) for section, keys in sections().items()}
    assert {section: set(keys) for section, keys in documented().items()} == in_code


@pytest.mark.parametrize("section", sections())
def test_a_documented_key_has_the_default_and_the_keyword_that_the_page_says(section):
    for key, field in sections()[section].items():
        said = documented()[section][key]
        default, path = said["default"], f"{section}.{key}"
        assert said["meaning"], path
        if section not in OF_NO_KEYWORD:
            assert PATHS[said["keyword"].strip("`")] == (section, key)
        if default == "required":
            assert (field.default, field.default_factory) == (msgspec.NODEFAULT, msgspec.NODEFAULT), path
            continue
        there = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        written = yaml.safe_load(default.strip("`"))
        assert (parse_size(path, written) if key in SIZES else written) == (
            parse_size(path, there) if key in SIZES else there
        ), path
        assert type(written) is type(there) or key in SIZES or isinstance(there, float), path

"""Reading a DeploymentConfig from a YAML file. Errors name the file, the line and the key."""

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from hbserve_rpc.plain_values import shown
from hbserve_scheduler.config import DeploymentConfig
from hbserve_scheduler.config_check import convert, sections
from hbserve_scheduler.errors import ConfigError

VARIABLE = re.compile(r"\$\{\w+[^\s}]*\}")
KEYS = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
NOT_REPLACED = "variables of the environment are not replaced in this file"


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses a key that is written twice, of which YAML would silently keep the last one, and a text
    with a NUL, which no path, address or name can have."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date that there is not, an integer of more digits than Python reads
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key is a list or a mapping", key.start_mark)
        if key.tag not in KEYS:
            problem = f"the key {key.value} is no text to YAML; write it in quotes"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is written twice", key.start_mark)
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _Loader, node: yaml.ScalarNode) -> str:
    text: str = loader.construct_scalar(node)
    if "\0" in text:
        raise yaml.constructor.ConstructorError(None, None, "a string has a NUL character", node.start_mark)
    return text


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """Construct a number, but refuse 012, which is 10 in YAML 1.1 and 12 in YAML 1.2, and 1:30, which is 90 in YAML 1.1
    and a text in YAML 1.2."""
    is_int = node.tag == "tag:yaml.org,2002:int"
    if ":" in node.value or (is_int and re.fullmatch(r"[+-]?0[0-7_]+", node.value)):
        problem = f"{node.value} is another number by YAML 1.1 than by YAML 1.2, or none; expected decimal digits"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    number: int | float = loader.construct_yaml_int(node) if is_int else loader.construct_yaml_float(node)
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _text)


def load_config(path: str | Path) -> DeploymentConfig:
    """Read and check a configuration file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown or has a wrong type or value.
    """
    path = Path(os.path.expanduser(path))
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a subclass of the safe loader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{path}:{line} {error.problem}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{path}: character {error.position} is {error.character:#x}: {error.reason}") from None
    except RecursionError:
        raise ConfigError(f"{path}: lists or mappings are nested too deep") from None
    if content is None:  # not taken for a deployment of defaults: a file that was cut short would start a demo
        raise ConfigError(f"{path}: the file is empty")
    try:
        config = convert(content)
    except ConfigError as error:
        hint = f"; {NOT_REPLACED}" if VARIABLE.search(str(error)) else ""
        raise ConfigError(f"{path}: {error}{hint}") from None
    _require_no_variables(path, config)
    return config


def _require_no_variables(file: Path, config: DeploymentConfig) -> None:
    """Raise ConfigError if a text has a variable: `api_key: ${KEY}`, which other programs replace, would be a key that
    everybody can guess."""
    for path, section in sections(config):
        for name in section.__struct_fields__:
            value, key = getattr(section, name), f"{path}.{name}"
            texts = {f"{key}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list) else {key: value}
            for where, each in texts.items():
                if isinstance(each, str) and name != "chat_template" and VARIABLE.search(each):
                    raise ConfigError(f"{file}: {where}={shown(each)}: {NOT_REPLACED}")

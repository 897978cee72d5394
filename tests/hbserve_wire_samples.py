"""Samples of the protocol: one encoded message of each type of hbserve_rpc that crosses a wire, in its present version.
Both ends of a KV link have the same version, so there are none of hbserve_kv's messages.

    python tests/hbserve_wire_samples.py

writes samples to `wire_samples.json` beside this file: of types that have none there, or of all types if the version of
the protocol has changed. If a type changes without that, `test_wire_samples.py` fails.
"""

import base64
import importlib
import json
import pkgutil
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec import inspect

import hbserve_rpc
from hbserve_rpc import SamplingParams, wire
from hbserve_rpc.methods import Method, Notification, StreamMethod

FILE = Path(__file__).with_name("wire_samples.json")
UNTYPED = msgspec.msgpack.Decoder().decode


def types() -> dict[str, Any]:
    """Return the types by module and name: frames, requests, and the answers to these."""
    found = {each for frames in (wire.FromClient, wire.FromServer) for each in get_args(frames)}
    for each in pkgutil.iter_modules(hbserve_rpc.__path__, "hbserve_rpc."):
        module = importlib.import_module(each.name)
        for method in vars(module).values():
            if isinstance(method, Method | StreamMethod | Notification):
                found.add(method.request)
                answers = method.item if isinstance(method, StreamMethod) else getattr(method, "reply", None)
                found |= set(get_args(answers)) if get_origin(answers) in (Union, UnionType) else {answers}
    return {f"{each.__module__}.{each.__name__}": each for each in found if each is not None}


def sample_of(kind: Any) -> bytes:
    """Encode a sample of a type. Each field has a value, other than its default if possible."""
    sample = msgspec.msgpack.encode(_value(inspect.type_info(kind)))
    msgspec.msgpack.decode(sample, type=kind)
    return sample


def _value(info: Any) -> Any:
    if type(info) in PLAIN:
        return PLAIN[type(info)]
    match info:
        case inspect.IntType():
            return max(3, info.ge or 0, (info.gt or 0) + 1)
        case inspect.StrType():
            return TRACEPARENT if info.pattern else "text"
        case inspect.LiteralType():
            return info.values[-1]
        case inspect.ListType() | inspect.VarTupleType():
            return [_value(info.item_type)] * max(1, info.min_length or 0)
        case inspect.TupleType():
            return [_value(each) for each in info.item_types]
        case inspect.DictType():
            return {_value(info.key_type): _value(info.value_type)}
        case inspect.UnionType():
            return _value(next(each for each in info.types if not isinstance(each, inspect.NoneType)))
        case inspect.StructType():
            return _fields(info)
    raise TypeError(f"no sample of {info}")


def _fields(info: inspect.StructType) -> Any:
    left_out = LEFT_OUT.get(info.cls, ())
    values = {each.encode_name: _value(each.type) for each in info.fields if each.name not in left_out}
    if info.tag_field is not None:
        values = {info.tag_field: info.tag} | values
    return list(values.values()) if info.array_like else values


PLAIN: dict[type, Any] = {
    inspect.FloatType: 0.5, inspect.BoolType: True, inspect.BytesType: b"bytes",
    inspect.RawType: 3, inspect.AnyType: 3,
}  # fmt: skip
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
LEFT_OUT: dict[type, set[str]] = {SamplingParams: {"structured_outputs"}}
"""Fields that samples leave out, because they exclude another field."""


def read() -> tuple[int, dict[str, bytes]]:
    """Return the version of the stored samples, and the encoded messages by the name of their type."""
    stored = json.loads(FILE.read_text())
    return stored["version"], {name: base64.b64decode(sample) for name, sample in stored["samples"].items()}


def write() -> None:
    version, stored = read() if FILE.exists() else (0, {})
    kept = stored if version == wire.PROTOCOL_VERSION else {}
    samples = {name: kept.get(name) or sample_of(kind) for name, kind in sorted(types().items())}
    encoded = {name: base64.b64encode(sample).decode() for name, sample in samples.items()}
    FILE.write_text(json.dumps({"version": wire.PROTOCOL_VERSION, "samples": encoded}, indent=1) + "\n")


if __name__ == "__main__":
    write()

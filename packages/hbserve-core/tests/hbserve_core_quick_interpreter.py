"""Triton's interpreter without what it does in vain, which took most of its time."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten(patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what takes the language's meaning back; `patch` has the rest to undo.

    It gives the language its meaning once, not again for each launch and each function that a kernel calls; it looks
    for no overflow of integers, which it would only tell in debug mode; it makes types, shapes and constants once; and
    what both sides of an operation have to become it finds out once for each two types, and broadcasts by numpy.
    """
    patch.setattr(interpreter, "_patch_attr", _give_meaning)
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    patch.setattr(interpreter, "_patch_lang", lambda function: SimpleNamespace(restore=lambda: None))
    patch.setattr(interpreter, "_convert_float", _with_8_bit_floats(interpreter._convert_float))
    patch.setattr(interpreter, "_get_np_dtype", _looked_up_once(interpreter._get_np_dtype, lambda of: of.scalar.name))
    patch.setattr(tl.block_type, "__init__", _made_once(tl.block_type.__init__, _block_of))
    patch.setattr(tl.tensor, "__init__", _with_known_shape(tl.tensor.__init__))
    patch.setattr(TritonSemantic, "broadcast_impl_value", _unless_alike(TritonSemantic.broadcast_impl_value))
    pairs = _paired_as_before(TritonSemantic.binary_op_type_checking_impl)
    patch.setattr(TritonSemantic, "binary_op_type_checking_impl", pairs)
    builder = interpreter.interpreter_builder
    patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
    return scope.restore


def _give_meaning(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
    semantic, function = interpreter.interpreter_semantic, getattr(member, "__wrapped__", member)

    def called(*arguments: Any, _semantic: Any = None, **keywords: Any) -> Any:
        return function(*arguments, _semantic=semantic, **keywords)

    scope.set_attr(owner, name, called)


def _looked_up_once(look_up: Callable[[Any], Any], key_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    found: dict[Any, Any] = {}

    def known(of: Any) -> Any:
        key = key_of(of)
        if key not in found:
            found[key] = look_up(of)
        return found[key]

    return known


def _shape_of(shape: Any) -> tuple[Any, ...]:
    return tuple(shape.values if isinstance(shape, tl.tuple) else shape)


def _block_of(element_type: Any, shape: Any) -> Any:
    return element_type.name, _shape_of(shape)


def _made_once(make: Callable[..., None], key_of: Callable[..., Any]) -> Callable[..., None]:
    """An `__init__` by which objects of the same arguments share what they are made of."""
    found: dict[Any, dict[str, Any]] = {}

    def init(made: Any, *arguments: Any) -> None:
        key = key_of(*arguments)
        if key in found:
            made.__dict__.update(found[key])
        else:
            make(made, *arguments)
            found[key] = dict(made.__dict__)

    return init


def _with_known_shape(make: Callable[..., None]) -> Callable[..., None]:
    found: dict[str, tuple[Any, Any]] = {}

    def init(made: Any, handle: Any, kind: Any) -> None:
        if kind.name in found:
            made.handle, made.type, made.dtype, (made.shape, made.numel) = handle, kind, kind.scalar, found[kind.name]
        else:
            make(made, handle, kind)
            found[kind.name] = made.shape, made.numel

    return init


def _unless_alike(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    def broadcast_both(semantic: Any, left: Any, right: Any) -> Any:
        blocks = [each.type for each in (left, right) if each.type.is_block()]
        if not blocks or (len(blocks) == 2 and _shape_of(blocks[0].shape) == _shape_of(blocks[1].shape)):
            return left, right
        return broadcast(semantic, left, right)

    return broadcast_both


def _paired_as_before(pair: Callable[..., Any]) -> Callable[..., Any]:
    """What both sides of an operation become, which only their types say: constants are made once, and a side that is
    only broadcast keeps its data, as numpy broadcasts it anyway."""
    found: dict[Any, tuple[Any, Any]] = {}

    def paired(semantic: Any, left: Any, right: Any, *options: Any, **others: Any) -> Any:
        key = _pair_key(left), _pair_key(right), options, tuple(others.items())
        if key in found:
            return tuple(map(_become, (left, right), found[key]))
        pair_of = pair(semantic, left, right, *options, **others)
        if all(map(_keeps_its_numbers, (left, right), pair_of)):
            found[key] = tuple(map(_what_becomes, (left, right), pair_of))
        return pair_of

    return paired


def _pair_key(side: Any) -> Any:
    return side.type.name if isinstance(side, tl.tensor) else (type(side), repr(side))


def _keeps_its_numbers(given: Any, made: Any) -> bool:
    return not isinstance(given, tl.tensor) or given.dtype == made.dtype


def _what_becomes(given: Any, made: Any) -> Any:
    """Of a side: itself, what it is as a block of that type, or the constant that it is."""
    if made is given:
        return None
    return made.type if isinstance(given, tl.tensor) else made


def _become(given: Any, what: Any) -> Any:
    if what is None:
        return given
    return what if isinstance(what, tl.tensor) else tl.tensor(given.handle, what)


def _with_8_bit_floats(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter rounds 31.5 to 16 in these, not to 32: a carry out of the mantissa is lost."""

    def converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(numbers).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            return torch.from_numpy(numbers).view(torch.float8_e4m3fn).float().numpy()
        return convert(numbers, source, target, rounding)

    return converted
